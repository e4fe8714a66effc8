"""Widths of the values of a template: sums of whole multiples of 1, r and sizes of operators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

Width = Mapping[str, int]
"""A width as a sum: symbol (``""`` for 1, ``"r"``, ``"fc.in_features"``) -> how many of it."""


def source_shape(source: str) -> tuple[Width, Width]:
    """Rows and columns of a weight source, ``"fc.right"``: (r x fc.in_features)."""
    owner, _, part = source.partition(".")
    if part == "left":
        return {f"{owner}.out_features": 1}, {"r": 1}
    return {"r": 1}, {f"{owner}.in_features": 1}


def size_of(width: Width, sizes: Mapping[str, int]) -> int:
    """A width in numbers.

    >>> size_of({"r": 2, "fc.in_features": 1, "": 3}, {"r": 4, "fc.in_features": 10})
    21
    """
    return sum(count * (sizes[symbol] if symbol else 1) for symbol, count in width.items())


def sum_of(widths: Sequence[Width]) -> Width:
    """The width of several values side by side."""
    total: dict[str, int] = {}
    for width in widths:
        for symbol, count in width.items():
            total[symbol] = total.get(symbol, 0) + count
    return total


def substituted(width: Width, sizes: Mapping[str, int]) -> Width:
    """A width with sizes in the place of symbols; the rank stays one."""
    return sum_of(
        [{"": n * sizes[s]} if s in sizes else {s: n} for s, n in width.items() if n] or [{}]
    )


def never_equal(one: Width, other: Width) -> bool:
    """Whether two widths differ whatever their symbols stand for.

    The rank varies freely from site to site, so its multiples have to agree; other symbols may
    happen to be equal.
    """
    if one == other:
        return False
    if one.get("r", 0) != other.get("r", 0):
        return True
    symbols = {symbol for symbol in (*one, *other) if symbol not in ("", "r")}
    return not symbols


def text_of(width: Width) -> str:
    """A width in words: ``r``, ``fc.in_features``, ``2 r + 16``."""
    parts = [
        (str(count) if not symbol else symbol if count == 1 else f"{count} {symbol}")
        for symbol, count in width.items()
        if count
    ]
    return " + ".join(parts) or "0"
