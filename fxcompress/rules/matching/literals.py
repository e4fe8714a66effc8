"""Attributes of operators compared with the literals of a rule."""

from __future__ import annotations

from fxcompress.graph.operator import AttributeValue, Operator
from fxcompress.rules.language.vocabulary import OPERATORS, PLAIN_OPERATORS


def matches_literal(operator: Operator, attribute: str, wanted: AttributeValue) -> bool:
    """Whether an operator's attribute is the literal, or one of a list of literals.

    A number stands for itself in every dimension, as in PyTorch: ``kernel_size: 3`` is
    ``[3, 3]`` for a ``conv2d``.
    """
    if attribute not in operator.attributes:
        return False
    found = operator.attributes[attribute]
    options: tuple[AttributeValue, ...] = (wanted,)
    if isinstance(wanted, tuple):
        words = OPERATORS.get(operator.op) or PLAIN_OPERATORS.get(operator.op, {})
        known = words.get(attribute)
        value_is_list = known is not None and known.kind.startswith("ints")
        if not value_is_list or any(isinstance(item, tuple) for item in wanted):
            options = wanted
    return any(_equal(found, option) for option in options)


def _equal(found: AttributeValue, wanted: AttributeValue) -> bool:
    if isinstance(found, tuple) and not isinstance(wanted, tuple):
        return bool(found) and all(item == wanted for item in found)
    if isinstance(wanted, tuple) and not isinstance(found, tuple):
        return bool(wanted) and all(item == found for item in wanted)
    return found == wanted


def show(value: AttributeValue) -> str:
    """A value as YAML would write it.

    >>> show((3, 3)), show(True), show(None)
    ('[3, 3]', 'true', 'absent')
    """
    if isinstance(value, tuple):
        return f"[{', '.join(show(item) for item in value)}]"
    if isinstance(value, bool):
        return "true" if value else "false"
    return "absent" if value is None else str(value)
