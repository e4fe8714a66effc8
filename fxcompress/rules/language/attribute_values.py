"""Whether a value as written in a rule file fits an operator's attribute."""

from __future__ import annotations

from typing import Any

from fxcompress.rules.language.vocabulary import AttributeType

_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
}


def wrong_value(value: Any, kind: AttributeType) -> str:
    """What is wrong with a value, as the end of a sentence; empty if nothing is.

    A list of values is an "or", except for attributes that are lists themselves.

    >>> wrong_value([3, 3, 3], AttributeType("ints", 2))
    'has 2 numbers, not 3'
    >>> wrong_value([3, 5], AttributeType("int"))
    ''
    """
    if kind.kind in ("ints", "ints|str"):
        if isinstance(value, str) and kind.kind == "ints|str":
            return ""
        if not isinstance(value, list):
            return "" if _is(value, "int") else f"is a number or a list of numbers, not {value!r}"
        if value and all(isinstance(item, list) for item in value):
            return next((w for w in (wrong_value(item, kind) for item in value) if w), "")
        if not all(_is(item, "int") for item in value):
            return f"is a list of whole numbers, not {value!r}"
        if len(value) != kind.length:
            return f"has {kind.length} number{'s' * (kind.length > 1)}, not {len(value)}"
        return ""
    items = value if isinstance(value, list) else [value]
    if not items:
        return "is one of nothing: the list is empty"
    wrong = [item for item in items if not _is(item, kind.kind)]
    return f"is {_WORDS[kind.kind]}, not {wrong[0]!r}" if wrong else ""


def value_hint(kind: AttributeType) -> str:
    """An example, or where such a condition goes."""
    if kind.kind == "ints" and kind.length > 1:
        return f"for example [{', '.join(['3'] * kind.length)}]"
    return "conditions on numbers go into 'where'" if kind.kind in ("int", "float") else ""


def _is(value: Any, kind: str) -> bool:
    # A boolean is an integer to Python, and never what was meant here.
    if isinstance(value, bool):
        return kind == "bool"
    types: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
    return isinstance(value, types.get(kind, ()))
