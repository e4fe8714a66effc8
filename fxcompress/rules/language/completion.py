"""The JSON Schema of rule files, for completion in editors.

It is made from the models of :mod:`fxcompress.rules.language.schema`, their docstrings, and
the words of the vocabulary.  ``rules/schema.json`` is what ``fxcompress schema`` prints without
plug-ins.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fxcompress.forms.template import OPERATORS as TEMPLATE_OPERATORS
from fxcompress.forms.words import form_words
from fxcompress.metric.words import metric_words
from fxcompress.rules.language.schema import PATTERN_KINDS, REWRITE_KINDS, RuleSet
from fxcompress.rules.language.vocabulary import ALL_OPERATORS, INPUT, OPERATORS, AttributeType

SHIPPED = Path(__file__).parents[1] / "schema.json"
"""The schema as a file of the package."""

_OPERATORS: Mapping[str, tuple[Collection[str], bool]] = {
    # model -> operators that it may name, and whether it may list several (attributes, too)
    "NodePattern": (OPERATORS, True),
    "GroupPattern": (OPERATORS, True),
    "GraphNode": (ALL_OPERATORS, True),
    "CaseNode": ((*ALL_OPERATORS, INPUT), False),
    "TemplateNode": (TEMPLATE_OPERATORS, False),
}
_EXACTLY_ONE = {
    "Alternative": tuple(kind for kind in PATTERN_KINDS if kind != "any_of"),
    "Pattern": PATTERN_KINDS,
    "Rewrite": REWRITE_KINDS,
    "Case": ("graph", "model"),
}


def json_schema() -> dict[str, Any]:
    """The JSON Schema of a rule file, with the forms and metrics that are registered.

    >>> [sorted(either["required"]) for either in json_schema()["anyOf"]]
    [['budget', 'rules'], ['extends']]
    """
    schema = RuleSet.model_json_schema(by_alias=True, mode="validation")
    models: dict[str, Any] = schema["$defs"]
    for name, (operators, several) in _OPERATORS.items():
        one: dict[str, Any] = {"type": "string", "enum": list(operators)}
        many = {"type": "array", "minItems": 1, "items": one}
        op = models[name]["properties"]["op"]
        models[name]["properties"]["op"] = {
            "description": op["description"],
            **({"anyOf": [one, many]} if several else one),
        }
        if models[name]["additionalProperties"] is not False:
            _name_attributes(models[name], operators, several)
    _name_attributes(models["Exclusion"], OPERATORS, True)
    shares = models["Exclusion"]["properties"]["shares_weight_with"]
    _restrict(shares, OPERATORS)
    models["Metric"]["properties"]["kind"]["enum"] = list(metric_words())
    rewrite = models["Rewrite"]["properties"]
    _restrict(rewrite["form"], form_words())
    rewrite["any_of"]["anyOf"][0]["items"] = {"type": "string", "enum": list(form_words())}
    alone = [name for name, word in form_words().items() if not (word.joint or word.hidden)]
    one, many = rewrite["then"]["anyOf"][0]["anyOf"]
    one["enum"] = many["items"]["enum"] = alone
    for name, keys in _EXACTLY_ONE.items():
        models[name]["oneOf"] = [{"required": [key]} for key in keys]
    # What builds on another file may leave out what that says.
    schema["anyOf"] = [{"required": schema.pop("required")}, {"required": ["extends"]}]
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _name_attributes(model: dict[str, Any], operators: Collection[str], several: bool) -> None:
    """Completion wants the attributes by name, not "anything"."""
    kinds: dict[str, dict[AttributeType, list[str]]] = {}
    for op in operators:
        for attribute, kind in ALL_OPERATORS.get(op, {}).items():
            kinds.setdefault(attribute, {}).setdefault(kind, []).append(op)
    for attribute, found in sorted(kinds.items()):
        ops = [op for each in found.values() for op in each]
        names = dict.fromkeys(name for kind in found for name in kind.kind.split("|"))
        model["properties"][attribute] = {
            "description": f"Attribute of {', '.join(ops)}.",
            "anyOf": [option for name in names for option in _values(name, several)],
        }
    model["additionalProperties"] = False


_VALUES: Mapping[str, list[dict[str, Any]]] = {
    "int": [{"type": "integer"}],
    "float": [{"type": "number"}],
    "bool": [{"type": "boolean"}],
    "str": [{"type": "string"}],
    "ints": [
        {"type": "integer"},
        {"type": "array", "minItems": 1, "items": {"type": "integer"}},
    ],
}


def _values(kind: str, several: bool) -> list[dict[str, Any]]:
    """What an attribute may be; a list of values is an "or"."""
    one = _VALUES[kind]
    return [*one, {"type": "array", "minItems": 1, "items": one[-1]}] if several else one


def _restrict(field: dict[str, Any], words: Collection[str]) -> None:
    """An optional string becomes one of some words."""
    field["anyOf"][0]["enum"] = list(words)
