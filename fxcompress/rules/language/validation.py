"""From pydantic's errors to problems with a place and advice."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar, get_args

from pydantic import BaseModel, TypeAdapter, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from fxcompress.metric.words import metric_words
from fxcompress.rules.language import schema
from fxcompress.rules.language.diagnostics import Diagnostic, as_fraction, choices, suggest
from fxcompress.rules.language.document import Document, KeyPath, Placed
from fxcompress.rules.language.vocabulary import LATER_KEYS, LATER_VALUES

_Model = TypeVar("_Model", bound=BaseModel)
_MOST = 200
_ONE_OR_MANY = frozenset({"op", "name", "scope"})
_UNKNOWN_VALUES = {"kind": "unknown-metric"}
_BOUNDS = {
    "greater_than": ("gt", "above"),
    "greater_than_equal": ("ge", "at least"),
    "less_than": ("lt", "below"),
    "less_than_equal": ("le", "at most"),
}
_OTHER_KEYS = {
    ("rewrite", "rank"): "the budget chooses ranks; to set one, min_rank and max_rank: 64",
    ("rewrite", "ratio"): "keep: 0.5 is the share that remains",
    **{("budget", key): "keep: 0.8 is the share that remains" for key in ("ratio", "sparsity")},
    **{("node", key): 'name: "*.mlp.*", a glob' for key in ("regex", "pattern", "path", "module")},
}
"""What to write for a key (behind that of its mapping) that others would have."""

_WANTED = {
    "string_type": "a string",
    "bool_type": "true or false",
    "int_type": "a whole number",
    "float_type": "a number",
    "tuple_type": "a list",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "dict_type": "a mapping",
}


@dataclass(frozen=True)
class Valid:
    """What of a document has the right shape.

    Attributes:
        whole: all of it; None if anything is wrong.
        rules: its rules.  Of one with mistakes in it, all keys whose values are right; the others
            are as if left out, and None if they are required.
        tests: its tests, likewise.
    """

    whole: schema.RuleSet | None
    rules: tuple[schema.Rule, ...]
    tests: tuple[schema.Case, ...]


def validate(document: Document) -> tuple[Valid, list[Diagnostic]]:
    """The rules of a document, and what is wrong with its shape."""
    try:
        whole = schema.RuleSet.model_validate(document.data)
    except ValidationError as error:
        data = document.data if isinstance(document.data, dict) else {}
        valid = Valid(
            None,
            tuple(_salvaged(schema.Rule, data.get("rules"))),
            tuple(_salvaged(schema.Case, data.get("tests"))),
        )
        if not document.complete:
            return valid, []  # what looks missing may stand in the part that was not read
        details = error.errors(include_url=False)
        # pydantic calls a list too short whose items are all wrong; the items say enough.
        told = [d for d in details if d["type"] != "too_short" or not d["input"]]
        return valid, [_diagnostic(document, detail) for detail in told[:_MOST]]
    return Valid(whole, whole.rules, whole.tests), []


def _salvaged(model: type[_Model], items: Any) -> Iterator[_Model]:
    """What is right of each item of a list: keys as they are, or without what is wrong in them."""
    for item in items if isinstance(items, list) else ():
        found = {
            # Not get_default(), which copies: these are frozen.
            name: None if field.is_required() else {} if field.default_factory else field.default
            for name, field in model.model_fields.items()
        }
        for name in found.keys() & item.keys() if isinstance(item, dict) else ():
            with suppress(ValidationError):
                found[name] = _without_mistakes(_FIELDS[model][name], item[name])
        yield model.model_construct(**found)


def _adapter(field: FieldInfo) -> TypeAdapter[Any]:
    kind: Any = Annotated[field.annotation, field]
    return TypeAdapter(kind)


_FIELDS: Mapping[type[BaseModel], Mapping[str, TypeAdapter[Any]]] = {
    model: {name: _adapter(field) for name, field in model.model_fields.items()}
    for model in (schema.Rule, schema.Case)
}
"""Validators of rules and tests, key by key."""

_REFERRED_TO = frozenset({"op", "as", "input", "inputs", "outputs", "weight", "bias"})
"""Keys that cannot be left out without other parts of a rule looking wrong."""


def _without_mistakes(validator: TypeAdapter[Any], value: Any) -> Any:
    """A value validated, without the keys in it that are wrong by themselves."""
    try:
        return validator.validate_python(value)
    except ValidationError as error:
        for detail in error.errors(include_url=False):
            value = _without(value, detail["loc"])
        return validator.validate_python(value)


def _without(value: Any, loc: tuple[int | str, ...]) -> Any:
    """A value without what stands at a place in a mapping; as it is if more hangs on that."""
    if not loc or not isinstance(value, dict | list):
        return value
    part: Any = loc[0]
    rest = loc[1:]
    try:
        inner = value[part]
    except (KeyError, IndexError, TypeError):
        return _without(value, rest)  # a part of pydantic's own, as in _resolve()
    if rest:
        changed = value.copy()
        changed[part] = _without(inner, rest)
        return changed
    if isinstance(inner, dict | list) or isinstance(value, list) or part in _REFERRED_TO:
        return value
    return {key: each for key, each in value.items() if key != part}


def _diagnostic(document: Document, detail: ErrorDetails) -> Diagnostic:
    kind = detail["type"]
    missing = kind == "missing"
    loc = detail["loc"][:-1] if missing else detail["loc"]
    path = _resolve(document, loc)
    entry = document.entries[path]
    key = next((part for part in reversed(path) if isinstance(part, str)), "")
    if missing:
        name = str(detail["loc"][-1])
        owner = {"": "a rule file", "rules": "a rule", "tests": "a test"}.get(key, key)
        code = "no-positive-matcher" if name in ("op", "match") else "missing-key"
        return Diagnostic(code, f"{owner} needs '{name}'", entry.best, _missing_hint(name))
    if kind == "extra_forbidden":
        return _unknown_key(path, entry)
    if kind == "literal_error":
        return _unknown_value(key, detail, entry)
    if kind in _BOUNDS:
        limit, words = _BOUNDS[kind]
        message = f"{key} is {detail['input']}, and has to be {words} {_bound(detail, limit)}"
        hint = as_fraction(detail["input"]) if _bound(detail, limit) == "1" else ""
        return Diagnostic("bad-number", message, entry.value, hint)
    if kind == "finite_number":
        return Diagnostic("bad-number", f"{key} has to be finite", entry.value)
    if kind == "too_short":
        what = "an empty list" if isinstance(detail["input"], list | tuple) else "empty"
        return Diagnostic("empty-list", f"{key} is {what}", entry.best)
    if kind == "too_long":
        most = detail["ctx"]["max_length"]
        message = f"{key} has {len(detail['input'])} entries; at most {most}"
        return Diagnostic("too-many", message, entry.best)
    if kind == "string_pattern_mismatch":
        if detail["loc"][-1] == "[key]":
            message = f"{_shown(detail['input'])} is not an identifier"
            return Diagnostic("bad-name", message, entry.best, "letters, digits and _")
        return _bad_name(path, detail["input"], entry)
    if kind in _WANTED:
        return _wrong_type(key, kind, detail["input"], entry)
    return Diagnostic(kind.replace("_", "-"), detail["msg"], entry.best)


def _resolve(document: Document, loc: tuple[int | str, ...]) -> KeyPath:
    # pydantic adds parts of its own (the tags of a union) to the path of keys.
    path: KeyPath = ()
    for part in loc:
        if (*path, part) in document.entries:
            path = (*path, part)
        elif part == "bound_name" and (*path, "as") in document.entries:
            path = (*path, "as")
    return path


def _missing_hint(name: str) -> str:
    return {
        "budget": "for example budget: {keep: 0.8}",
        "keep": "the fraction to keep, for example keep: 0.8",
        "op": "for example op: linear",
        "match": 'for example match: {node: {op: linear, name: "*.mlp.*"}}',
        "rewrite": "for example rewrite: {form: pivoted}",
        "node": "for example node: {op: linear}",
    }.get(name, "")


def _unknown_key(path: KeyPath, entry: Placed) -> Diagnostic:
    key = str(path[-1])
    model = _model_at(path[:-1])
    parent = next((part for part in reversed(path[:-1]) if isinstance(part, str)), "")
    if key in LATER_KEYS.get(parent, ()):
        message = f"'{key}' is not supported by this version"
        return Diagnostic("not-supported", message, entry.best)
    known = [field.alias or name for name, field in model.model_fields.items()]
    message = f"unknown key '{key}'"
    hint = _OTHER_KEYS.get((parent, key), "") or suggest(key, known) or choices(known)
    return Diagnostic("unknown-key", message, entry.best, hint)


def _model_at(path: KeyPath) -> type[BaseModel]:
    """What a mapping holds, by the keys that lead to it."""
    model: type[BaseModel] = schema.RuleSet
    for part in path:
        # Indices and free keys, such as the names of nodes, lead no deeper.
        for name, field in model.model_fields.items():
            if part == (field.alias or name):
                model = _model_in(field.annotation) or model
    return model


def _model_in(annotation: Any) -> type[BaseModel] | None:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_model_in, get_args(annotation))), None)


def _unknown_value(key: str, detail: ErrorDetails, entry: Placed) -> Diagnostic:
    value = detail["input"]
    expected = str(detail.get("ctx", {}).get("expected", ""))
    known = re.findall(r"'([^']*)'", expected) or [expected]
    later = LATER_VALUES.get(key, ())
    if isinstance(value, str) and value in later:
        message = f"{key} '{value}' is not supported by this version"
        return Diagnostic("not-supported", message, entry.value, choices(known))
    if key == "rewrite":
        hint = "a mapping such as {form: pivoted}, or none to leave the matches dense"
        return Diagnostic("unknown-value", f"unknown rewrite {_shown(value)}", entry.value, hint)
    code = _UNKNOWN_VALUES.get(key, "unknown-value")
    what = "metric" if key == "kind" else key
    hint = (suggest(value, known) if isinstance(value, str) else "") or choices(known)
    return Diagnostic(code, f"unknown {what} {_shown(value)}", entry.value, hint)


def _bad_name(path: KeyPath, value: str, entry: Placed) -> Diagnostic:
    keys = [part for part in path if isinstance(part, str)]
    key = keys[-1]
    shown = _shown(value)
    if key in ("input", "inputs") and keys[-3] in ("nodes", "graph"):
        message = f"{shown} is no reference to a value"
        hint = f"did you mean ${value}?" if value.isidentifier() else "$ and a name: $x"
        return Diagnostic("bad-reference", message, entry.value, hint)
    if value[1:].isidentifier() and value.startswith("$"):
        message = f"{shown} is a reference, and a name is wanted here"
        return Diagnostic("bad-name", message, entry.value, f"without the $: {value[1:]}")
    if key in ("id", "group"):
        message = f"{key} {shown} is not a plain name"
        return Diagnostic("bad-name", message, entry.value, "letters, digits and _ . -")
    message = f"{shown} is not an identifier"
    return Diagnostic("bad-name", message, entry.value, "letters, digits and _")


def _wrong_type(key: str, kind: str, value: Any, entry: Placed) -> Diagnostic:
    hint = ""
    if kind == "tuple_type" and isinstance(value, str):
        hint = 'put it into a list: ["..."]'
    elif kind == "string_type" and isinstance(value, int | float):
        hint = f'quote it: "{entry.raw}"'
    elif isinstance(value, str) and isinstance(_number(value), int | float):
        hint = "without the quotes"
    elif kind == "float_type":
        hint = as_fraction(value)
    elif kind.startswith("model") and isinstance(value, str | int | float):
        hint = _in_a_mapping(key, value)
    span = entry.best if isinstance(value, dict | list) else entry.value
    name = key or "a rule file"
    what = "a string or a list of them" if key in _ONE_OR_MANY else _WANTED[kind]
    return Diagnostic("wrong-type", f"{name} is {what}, not {_shown(value)}", span, hint)


def _in_a_mapping(key: str, value: object) -> str:
    """A value that was written by itself, under the key of the mapping that it is meant for."""
    if key == "metric" and isinstance(value, str):
        words = metric_words()
        meant = (
            value if value in words else suggest(value, words).partition("'")[2].partition("'")[0]
        )
        return f"metric: {{kind: {meant or 'kfac'}}}"
    if key == "budget":
        return as_fraction(value) or "budget: {keep: 0.8}"
    return f"rewrite: {{form: {value}}}" if key == "rewrite" else ""


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _bound(detail: ErrorDetails, limit: str) -> str:
    value = detail.get("ctx", {}).get(limit)
    return f"{value:g}" if isinstance(value, int | float) else str(value)


def _shown(value: object) -> str:
    """A value as YAML would write it, shortened.

    >>> _shown(None), _shown(True), _shown([1])
    ('nothing', 'true', 'a list')
    """
    match value:
        case None:
            return "nothing"
        case bool():
            return "true" if value else "false"
        case list() | tuple():
            return "a list"
        case dict():
            return "a mapping"
        case str():
            return f"'{value[:60]}'"
    return str(value)[:60]
