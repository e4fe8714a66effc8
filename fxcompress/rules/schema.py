"""The shape of a rule file: frozen pydantic models, and the JSON Schema made from them.

The models check shape and numbers.  What needs the vocabulary (operators, attributes,
expressions) is checked by :mod:`fxcompress.rules.checks`, with positions.

>>> rules = RuleSet.model_validate(
...     {"budget": {"keep": 0.8}, "rules": [
...         {"id": "mlp", "match": {"node": {"op": "linear", "name": "*.mlp.*"}},
...          "rewrite": {"form": "pivoted"}}]})
>>> rules.rules[0].match.alternatives[0].bound_name
'node'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    Tag,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, PydanticCustomError

from fxcompress.graph.operator import AttributeValue
from fxcompress.rules.vocabulary import OPERATORS

Form = Literal["low_rank", "pivoted"]


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Text = Annotated[str, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]
Identifier = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Name = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
Globs = Annotated[
    tuple[Text, ...],
    BeforeValidator(_one_or_many, json_schema_input_type=str | list[str]),
    Field(min_length=1),
]
AttributePattern = Annotated[Any, AfterValidator(_freeze)]


class _Model(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", populate_by_name=True)


class Budget(_Model):
    """How much of the model may remain: ``{keep: 0.8, of: matched, unit: parameters}``."""

    keep: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
    of: Literal["matched", "model"] = "matched"
    unit: Literal["parameters", "macs", "bytes"] = "parameters"


class Damping(_Model):
    """Added to each factor's eigenvalues, relative to their mean."""

    input: Annotated[Number, Field(ge=0)] = 1e-3
    output: Annotated[Number, Field(ge=0)] = 1e-1


class Metric(_Model):
    """The distance that decides which components of a weight count."""

    kind: Literal["euclidean", "diagonal", "activation", "kfac"] = "kfac"
    damping: Damping = Damping()
    output: Literal["auto", "categorical", "bernoulli", "gaussian"] = "auto"
    seed: Whole = 0


class Solver(_Model):
    """How ranks are chosen: one global threshold, or the same fraction everywhere."""

    allocation: Literal["global", "uniform"] = "global"


class Defaults(_Model):
    """What holds for every rule that does not say otherwise."""

    tied: Literal["skip"] = "skip"
    multi_call: Literal["once", "skip"] = "once"
    multiple_of: Count = 1
    min_rank: Count = 1
    min_saving: Share = 0.0


class _WithAttributes(BaseModel):
    """A matcher whose further keys are operator attributes."""

    model_config = ConfigDict(frozen=True, extra="allow", populate_by_name=True)
    __pydantic_extra__: dict[str, AttributePattern] = Field(init=False)

    @property
    def attributes(self) -> Mapping[str, AttributeValue]:
        """The attributes asked for: ``{"kernel_size": (3, 3)}``."""
        return cast("Mapping[str, AttributeValue]", self.model_extra or {})

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        # Completion in editors wants the attributes by name, not "anything".
        schema = handler.resolve_ref_schema(handler(core_schema))
        names = {name for attributes in OPERATORS.values() for name in attributes}
        schema["properties"] |= {name: {} for name in sorted(names)}
        schema["additionalProperties"] = False
        if "op" in schema["properties"]:
            schema["properties"]["op"]["enum"] = list(OPERATORS)
        return schema


class NodePattern(_WithAttributes):
    """One operator: ``{op: conv2d, as: c, name: "*.conv1", kernel_size: [3, 3]}``."""

    op: Text
    bound_name: Identifier = Field(default="node", alias="as")
    name: Globs | None = None


class Alternative(_Model):
    """One entry of ``any_of``: ``{node: {...}}``."""

    node: NodePattern


class Pattern(_Model):
    """What a rule is about: ``{node: {...}}``, or ``{any_of: [{node: {...}}, ...]}`` (or)."""

    node: NodePattern | None = None
    any_of: Annotated[tuple[Alternative, ...], Field(min_length=1)] | None = None

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        if (self.node is None) == (self.any_of is None):
            found = "has neither" if self.node is None else "has both"
            raise PydanticCustomError(
                "no-positive-matcher", f"match takes one of 'node' and 'any_of'; it {found}"
            )
        return self

    @property
    def alternatives(self) -> tuple[NodePattern, ...]:
        """The operator patterns, of which one has to match."""
        if self.node is not None:
            return (self.node,)
        return tuple(alternative.node for alternative in self.any_of or ())

    @property
    def node_count(self) -> int:
        """Number of nodes in the pattern: larger patterns win an overlap."""
        return 1


class Exclusion(_WithAttributes):
    """One entry of ``unless``; all of its keys together exclude an operator."""

    name: Globs | None = None
    scope: Globs | None = None
    shares_weight_with: Text | None = None

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise PydanticCustomError(
                "no-positive-matcher", "an empty entry of 'unless' excludes nothing"
            )
        return self


class Rewrite(_Model):
    """What becomes of a match: ``{form: pivoted}`` or ``{any_of: [pivoted, low_rank]}``."""

    form: Form | None = None
    any_of: Annotated[tuple[Form, ...], Field(min_length=1)] | None = None
    min_rank: Count | None = None
    min_saving: Share | None = None
    max_rank: Count | None = None
    multiple_of: Count | None = None
    group: Name | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.form is None) == (self.any_of is None):
            found = "has neither" if self.form is None else "has both"
            raise PydanticCustomError(
                "missing-form", f"rewrite takes one of 'form' and 'any_of'; it {found}"
            )
        low, high = self.min_rank, self.max_rank
        if low is not None and high is not None and low > high:
            raise PydanticCustomError("bad-number", f"min_rank {low} is above max_rank {high}")
        return self

    @property
    def forms(self) -> tuple[Form, ...]:
        """The forms that the solver may choose from."""
        return (self.form,) if self.form is not None else self.any_of or ()


class Range(_Model):
    """A range of counts, ends included; an end left out is open."""

    min: Annotated[int, Field(strict=True, ge=0)] = 0
    max: Annotated[int, Field(strict=True, ge=0)] | None = None

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.max is not None and self.min > self.max:
            raise PydanticCustomError("bad-number", f"min {self.min} is above max {self.max}")
        return self


class Expect(_Model):
    """How many sites a rule has to match: ``{matches: 12}`` or ``{matches: {min: 1}}``."""

    matches: Annotated[
        Annotated[int, Field(strict=True, ge=0), Tag("count")] | Annotated[Range, Tag("range")],
        Discriminator(lambda value: "range" if isinstance(value, dict | Range) else "count"),
    ]

    @property
    def range(self) -> Range:
        """The expectation as a range of counts."""
        if isinstance(self.matches, Range):
            return self.matches
        return Range(min=self.matches, max=self.matches)


class Rule(_Model):
    """One rule: what it matches, what it leaves out, and what becomes of the rest."""

    id: Name
    description: Text = ""
    priority: Whole = 0
    match: Pattern
    unless: tuple[Exclusion, ...] = ()
    where: tuple[Text, ...] = ()
    rewrite: Annotated[
        Annotated[Literal["none"], Tag("word")] | Annotated[Rewrite, Tag("mapping")],
        Discriminator(lambda value: "mapping" if isinstance(value, dict | Rewrite) else "word"),
    ]
    expect: Expect | None = None


class RuleSet(_Model):
    """A whole rule file."""

    version: Literal[1] = 1
    budget: Budget
    metric: Metric = Metric()
    solver: Solver = Solver()
    defaults: Defaults = Defaults()
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a rule file, for completion in editors.

    >>> sorted(json_schema()["required"])
    ['budget', 'rules']
    """
    schema = RuleSet.model_json_schema(by_alias=True, mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
