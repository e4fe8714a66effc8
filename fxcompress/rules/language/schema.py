"""The shape of a rule file, as frozen pydantic models.

The models check shape and numbers.  What needs the vocabulary (operators, attributes,
expressions) is checked by :mod:`fxcompress.rules.language.checks`, with positions.  The
docstrings of fields become the descriptions of the JSON Schema, which editors show.

>>> rules = RuleSet.model_validate(
...     {"budget": {"keep": 0.8}, "rules": [
...         {"id": "mlp", "match": {"node": {"op": "linear", "name": "*.mlp.*"}},
...          "rewrite": {"form": "pivoted"}}]})
>>> rules.rules[0].match.alternatives[0].names
('node',)
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from fxcompress.rules.language.fields import (
    Bytes,
    Count,
    Flag,
    FrozenModel,
    Globs,
    Identifier,
    Name,
    Reference,
    Share,
    Text,
    Whole,
    WithAttributes,
    Words,
)
from fxcompress.rules.language.settings import Budget, Defaults, Metric, Solver, different_budgets

MOST_NODES = 32
"""Operators in one pattern."""

MOST_OPTIONAL = 8
"""Optional operators of one pattern; each doubles the number of variants."""


@dataclass(frozen=True)
class Limits:
    """What a rewrite is bound to: the keys of a rule, or the file's defaults, or these.

    A field is filled from the keys of its name in :class:`Rewrite` and :class:`Defaults`.

    Attributes:
        min_rank: lowest rank.
        max_rank: highest rank, None if it is free.
        multiple_of: what ranks are a multiple of.
        min_saving: share of an operator's cost that a rewrite has to save to be made at all.
        fold_batch_norm: whether a batch norm behind an operator is to be folded into it.
        unmeasured: whether operators without a measured influence on the output are rewritten.
    """

    min_rank: int = 1
    max_rank: int | None = None
    multiple_of: int = 1
    min_saving: float = 0.0
    fold_batch_norm: bool = False
    unmeasured: bool = False

    @classmethod
    def of(cls, rewrite: Rewrite | None, defaults: Defaults) -> Limits:
        """The limits of a rule; of one with ``rewrite: none``, the defaults."""
        given = {
            field.name: value
            for source in (defaults, rewrite)
            for field in fields(cls)
            if (value := getattr(source, field.name, None)) is not None
        }
        return cls(**given)


class NodePattern(WithAttributes):
    """One operator: ``{op: conv2d, as: c, name: "*.conv1", kernel_size: [3, 3]}``."""

    op: Words
    """The operator, or a list of which it is one."""
    bound_name: Identifier = Field(
        default="node", alias="as", description="The operator's name in expressions."
    )
    name: Globs | None = None
    """Globs on the module path; * crosses dots, {q,k} is an or."""


class GroupPattern(NodePattern):
    """All operators on one input: ``{op: linear, as: fc, name: "*.{q,k,v}_proj"}``."""

    min: Count = 2
    """The fewest members of a group."""
    max: Count | None = None
    """The most members of a group."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_range(self.min, self.max)
        return self


class GraphNode(WithAttributes):
    """One of several operators: ``{op: linear, input: $x, name: "*.q_proj"}``."""

    op: Words
    """The operator, or a list of which it is one."""
    name: Globs | None = None
    """Globs on the module path; * crosses dots, {q,k} is an or."""
    input: Reference | None = None
    """The one value that it reads: $x."""
    inputs: Annotated[tuple[Reference | None, ...], Field(min_length=1)] | None = None
    """The values that it reads, in order; null is any value."""
    optional: Flag = False
    """Whether a match may do without it."""


class Alternative(FrozenModel):
    """A pattern: one operator, several that are connected, or all on one input."""

    node: NodePattern | None = None
    """One operator."""
    nodes: Annotated[
        dict[Identifier, GraphNode] | None, Field(min_length=1, max_length=MOST_NODES)
    ] = None
    """Several operators, by name; each says where its inputs come from."""
    group: GroupPattern | None = None
    """All operators of one kind that read the same value."""
    inputs: tuple[Identifier, ...] | None = None
    """Names of the values that come from outside of 'nodes'."""
    outputs: Annotated[tuple[Identifier, ...], Field(min_length=1)] | None = None
    """Nodes whose values may be used outside of the match; if left out, those that no other
    node of the pattern reads."""
    scope: Globs | None = None
    """Globs on the path of a module that has to enclose the whole match."""

    @model_validator(mode="after")
    def _exactly_one(self) -> Self:
        kinds = tuple(k for k in PATTERN_KINDS if k in type(self).model_fields)
        self._has_one_of(kinds, "match", "no-positive-matcher")
        self._have_beside_them(("inputs", "outputs"), "nodes")
        return self

    @property
    def names(self) -> tuple[str, ...]:
        """Names that the pattern binds."""
        if self.nodes is not None:
            return tuple(self.nodes)
        one = self.node or self.group
        return (one.bound_name,) if one is not None else ()


PATTERN_KINDS = ("node", "nodes", "group", "any_of")
"""Keys of a pattern, of which it has exactly one."""


class Pattern(Alternative):
    """What a rule is about: one pattern, or ``{any_of: [{...}, ...]}`` of several (or)."""

    any_of: Annotated[tuple[Alternative, ...], Field(min_length=1)] | None = None
    """Patterns of which one has to match; all bind the same names."""

    @model_validator(mode="after")
    def _scope_inside(self) -> Self:
        if self.any_of is not None and self.scope is not None:
            message = "'scope' goes into the patterns of any_of"
            raise PydanticCustomError("wrong-place", message)
        return self

    @property
    def alternatives(self) -> tuple[Alternative, ...]:
        """The patterns, of which one has to match."""
        return (self,) if self.any_of is None else self.any_of

    @property
    def keyed(self) -> tuple[tuple[tuple[str | int, ...], Alternative], ...]:
        """The alternatives, each behind the keys in the rule that lead to it."""
        if self.any_of is None:
            return ((("match",), self),)
        return tuple((("match", "any_of", index), one) for index, one in enumerate(self.any_of))

    @property
    def node_count(self) -> int:
        """Number of nodes in the pattern: larger patterns win an overlap."""
        return max(
            len(one.nodes) if one.nodes is not None else one.group.min if one.group else 1
            for one in self.alternatives
        )


class Exclusion(WithAttributes):
    """One entry of ``unless``; all of its keys together exclude an operator."""

    name: Globs | None = None
    """Globs on the module path."""
    scope: Globs | None = None
    """Globs on the path of the module that calls the operator."""
    node: Identifier | None = None
    """The operator of the pattern that is meant; any of them, if left out."""
    shares_weight_with: Text | None = None
    """An operator that reads the same weight, such as embedding."""

    @model_validator(mode="after")
    def _something(self) -> Self:
        if not self.model_fields_set:
            raise PydanticCustomError(
                "no-positive-matcher", "an empty entry of 'unless' excludes nothing"
            )
        return self


class TemplateNode(FrozenModel):
    """One operator of a template: ``{op: linear, input: $x, weight: fc.right}``."""

    op: Text
    """The operator."""
    input: Reference | None = None
    """The one value that it reads: $x."""
    inputs: Annotated[tuple[Reference, ...], Field(min_length=1)] | None = None
    """The values that it reads, in order."""
    weight: Text | None = None
    """Where its weight comes from: fc.right (r x n), fc.left (m x r), joint.right."""
    bias: Text | None = None
    """Where its bias comes from: fc.bias."""


class Rewrite(FrozenModel):
    """What becomes of a match."""

    form: Text | None = None
    """The form that its operators take."""
    any_of: Annotated[tuple[Text, ...], Field(min_length=1)] | None = None
    """Forms that the solver chooses from."""
    then: Words | None = None
    """Of a form that narrows a hidden value (narrow): the forms that each of its operators may take
    beside that, at widths of a coarse grid."""
    graph: Annotated[dict[Identifier, TemplateNode] | None, Field(min_length=1, max_length=64)] = (
        None
    )
    """A subgraph of your own, by node names."""
    outputs: Annotated[dict[Identifier, Identifier] | None, Field(min_length=1)] = None
    """Operator of the match -> node of 'graph' that takes its place."""
    cost: Text | None = None
    """Parameters of 'graph' (biases left out) as an expression in the rank r; it is checked
    against the graph."""
    nodes: Annotated[tuple[Identifier, ...], Field(min_length=1)] | None = None
    """The operators of the match that are rewritten; if left out, all that a form applies to."""
    min_rank: Count | None = None
    """The lowest rank."""
    min_saving: Share | None = None
    """The share of an operator's cost that a rewrite has to save to be made."""
    max_rank: Count | None = None
    """The highest rank."""
    multiple_of: Count | None = None
    """Ranks are multiples of this."""
    group: Name | None = None
    """A name; sites of one group get equal ranks."""
    keep: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)] | None = None
    """The share that remains at most of what this rule matches, in the unit of every budget."""
    fold_batch_norm: Flag = False
    """Whether a batch norm that follows a convolution becomes part of it, whatever its rank; in
    eval mode that changes nothing, in training it no longer normalizes."""
    unmeasured: Flag = False
    """Whether operators without a measured influence on the output are rewritten, too: those that
    no gradient came back to, or only zeros.  Every rank of them then counts as free of loss."""

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        self._has_one_of(REWRITE_KINDS, "rewrite", "missing-form")
        self._have_beside_them(("outputs", "cost"), "graph")
        if self.then is not None and self.graph is not None:
            raise PydanticCustomError("wrong-place", "'then' goes with 'form' or 'any_of'")
        low, high = self.min_rank, self.max_rank
        if low is not None and high is not None and low > high:
            raise PydanticCustomError("bad-number", f"min_rank {low} is above max_rank {high}")
        return self

    @property
    def forms(self) -> tuple[str, ...]:
        """The registered forms that the solver may choose from; none for a ``graph``."""
        return (self.form,) if self.form is not None else self.any_of or ()


REWRITE_KINDS = ("form", "any_of", "graph")
"""Keys of a rewrite, of which it has exactly one."""


class Range(FrozenModel):
    """A range of counts, ends included; an end left out is open."""

    min: Annotated[int, Field(strict=True, ge=0)] = 0
    """The fewest."""
    max: Annotated[int, Field(strict=True, ge=0)] | None = None
    """The most."""

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        _check_range(self.min, self.max)
        return self


def _check_range(low: int, high: int | None) -> None:
    if high is not None and low > high:
        raise PydanticCustomError("bad-number", f"min {low} is above max {high}")


class Expect(FrozenModel):
    """How many sites a rule has to match: ``{matches: 12}`` or ``{matches: {min: 1}}``."""

    matches: Annotated[
        Annotated[int, Field(strict=True, ge=0), Tag("count")] | Annotated[Range, Tag("range")],
        Discriminator(lambda value: "range" if isinstance(value, dict | Range) else "count"),
    ]
    """A count, or a range of counts."""

    @property
    def range(self) -> Range:
        """The expectation as a range of counts."""
        if isinstance(self.matches, Range):
            return self.matches
        return Range(min=self.matches, max=self.matches)


class Rule(FrozenModel):
    """One rule: what it matches, what it leaves out, and what becomes of the rest."""

    id: Name
    """Its name in reports; unique in the file."""
    description: Text = ""
    """In words, for people."""
    priority: Whole = 0
    """Of two rules that match one operator, the one with the higher priority gets it."""
    match: Pattern
    """What the rule is about."""
    unless: tuple[Exclusion, ...] = ()
    """What is taken out again; any entry that hits does it."""
    where: tuple[Text, ...] = ()
    """Conditions that all have to hold: "fc.in_features >= 256"."""
    rewrite: Annotated[
        Annotated[Literal["none"], Tag("word")] | Annotated[Rewrite, Tag("mapping")],
        Discriminator(lambda value: "mapping" if isinstance(value, dict | Rewrite) else "word"),
    ]
    """What becomes of a match; none leaves it as it is, whatever other rules say."""
    expect: Expect | None = None
    """How many sites the rule has to match."""


class CaseNode(WithAttributes):
    """One operator of a test's graph: ``{op: linear, path: layers.0.fc, input: $x}``.

    Attributes that are left out: of operators with a weight, 64 for widths, 3 for kernel sizes,
    1 for strides, paddings, dilations and groups, float32, with a bias; others have none.
    """

    op: Text
    """The operator."""
    path: Text | None = None
    """Its module path; its name in the graph, if left out."""
    scope: Text | None = None
    """Path of the module that calls it; the parent of 'path', if left out."""
    input: Reference | None = None
    """The one value that it reads; a name that is no node is a value from outside."""
    inputs: Annotated[tuple[Reference, ...], Field(min_length=1)] | None = None
    """The values that it reads, in order."""
    weight: Text | None = None
    """Name of the weight that it reads, for ties; 'path' and .weight, if left out."""


Members = Annotated[
    Annotated[Text, Tag("path")] | Annotated[tuple[Text, ...], Field(min_length=1), Tag("members")],
    Discriminator(lambda value: "members" if isinstance(value, list | tuple) else "path"),
]


class Case(FrozenModel):
    """A test of the rules: what they match and miss in a small graph or a model.

    Tests run by ``fxcompress test`` only, never when rules are used.
    """

    name: Text
    """What is tested, in words."""
    graph: Annotated[dict[Identifier, CaseNode] | None, Field(min_length=1, max_length=256)] = None
    """A small graph, operator by operator."""
    model: Text | None = None
    """file.py:function for a function that returns a model; the file stands next to the rules.
    It is run by 'fxcompress test --run-models' only."""
    data: Text | None = None
    """file.py:function for a function that returns batches; goes with 'model'."""
    matches: dict[Text, tuple[Members, ...]] = Field(default_factory=dict)
    """Rule -> module paths of all that it matches; for a rule about several operators, a list
    of lists has the members of each match."""
    misses: dict[Text, dict[Text, Text]] = Field(default_factory=dict)
    """Rule -> module path -> the step at which it is lost, or text of the reason."""

    @model_validator(mode="after")
    def _whole(self) -> Self:
        self._has_one_of(("graph", "model"), "a test", "missing-graph")
        self._have_beside_them(("data",), "model")
        if not self.matches and not self.misses:
            message = "a test expects something: it needs 'matches' or 'misses'"
            raise PydanticCustomError("nothing-expected", message)
        return self


def reads(node: GraphNode | TemplateNode | CaseNode) -> tuple[str | None, ...]:
    """Names of the values that a node reads, in order; None for one that may be any."""
    given = (node.input,) if node.input is not None else node.inputs or ()
    return tuple(None if reference is None else reference[1:] for reference in given)


class RuleSet(FrozenModel):
    """A whole rule file."""

    version: Literal[1] = 1
    """Of the rule language."""
    extends: Text | None = None
    """A preset, or the path of another rule file from here: what is said there holds unless it is
    said here, too; a rule replaces the one with its id, others are appended."""
    budget: Annotated[
        Annotated[Budget, Tag("one")]
        | Annotated[
            tuple[Budget, ...],
            Field(min_length=1),
            AfterValidator(different_budgets),
            Tag("several"),
        ],
        Discriminator(lambda value: "several" if isinstance(value, list | tuple) else "one"),
    ]
    """How much of the model may remain; a list of budgets has to be met at once."""
    metric: Metric = Metric()
    """The distance that decides which components of a weight count."""
    solver: Solver = Solver()
    """How ranks are chosen."""
    defaults: Defaults = Defaults()
    """What holds for every rule that does not say otherwise."""
    memory: Bytes | None = None
    """What the work may take beside the model and the data, as in ``8GiB``; by default most of what
    is free."""
    rules: Annotated[tuple[Rule, ...], Field(min_length=1)]
    """The rules."""
    tests: tuple[Case, ...] = ()
    """What the rules match and miss; run by 'fxcompress test'."""

    @property
    def budgets(self) -> tuple[Budget, ...]:
        """The budgets that have to be met at once."""
        return (self.budget,) if isinstance(self.budget, Budget) else self.budget
