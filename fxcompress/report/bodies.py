"""What the body of each form consists of, in symbols: n features in, m out, rank r.

::

    low_rank   down (n→r), up (r→m)
    pivoted    pivot (n→r), combine (r→m-r), then cat, index_select
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Part:
    """One layer of a body; ``inputs`` and ``outputs`` are ``n``, ``m``, ``r`` or ``m-r``."""

    name: str
    op: str
    inputs: str
    outputs: str


@dataclass(frozen=True)
class Body:
    """Layers in order, and what becomes of the last one's output (nothing if empty)."""

    parts: tuple[Part, ...]
    tail: str = ""


BODIES: dict[str, Body] = {
    "low_rank": Body((Part("down", "linear", "n", "r"), Part("up", "linear", "r", "m"))),
    "pivoted": Body(
        (Part("pivot", "linear", "n", "r"), Part("combine", "linear", "r", "m-r")),
        tail="cat, index_select (rows back in order)",
    ),
}
"""Forms that are not listed are shown as one line."""


def part_text(part: Part, n: int, m: int, ranks: Sequence[int]) -> str:
    """``linear r→1536-r``, or ``linear 128→1408`` if there is only one rank."""
    rank = ranks[0] if min(ranks) == max(ranks) else None

    def features(symbol: str) -> str:
        if symbol == "n":
            return str(n)
        if symbol == "m":
            return str(m)
        if symbol == "r":
            return "r" if rank is None else str(rank)
        return f"{m}-r" if rank is None else str(m - rank)

    return f"{part.op} {features(part.inputs)}→{features(part.outputs)}"
