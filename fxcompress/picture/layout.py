"""Rows and their order for the boxes inside of one box: a layered layout (Sugiyama et al., 1981).

Boxes stand in the row behind the last one that they read, and the order in a row keeps edges
short and crossings few, by barycentres.  An edge over several rows has a place in each of them.
Sizes, and with them coordinates, are up to whoever draws: boxes open and close.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fxcompress.picture.boxes import OUTSIDE, Edge

SWEEPS = 6
LONGEST = 60
"""Rows that an edge has a place in; a longer one is drawn past the others."""


@dataclass(frozen=True)
class Layout:
    """Where boxes and edges stand.

    Attributes:
        rows: from the top; a box by its place, an edge that only passes by -1 minus its own.
    """

    rows: tuple[tuple[int, ...], ...]


def layout(count: int, edges: Sequence[Edge]) -> Layout:
    """The rows of some boxes.

    Args:
        count: how many boxes there are, in the order in which they run.
        edges: among them; an edge to what runs before is no reason to stand lower.
    """
    depth = _depths(count, edges)
    last = max(depth, default=-1)
    rows: list[list[int]] = [[] for _ in range(last + 1)]
    for box in range(count):
        rows[depth[box]].append(box)
    links: list[tuple[int, int]] = []
    for at, edge in enumerate(edges):
        top = -1 if edge.source == OUTSIDE else depth[edge.source]
        end = last + 1 if edge.target == OUTSIDE else depth[edge.target]
        chain = [] if edge.source == OUTSIDE else [(top, edge.source)]
        if 1 < end - top <= LONGEST:
            for row in range(top + 1, end):
                rows[row].append(-1 - at)
                chain.append((row, -1 - at))
        elif end - top > LONGEST or end <= top:
            continue
        if edge.target != OUTSIDE:
            chain.append((end, edge.target))
        links += [(_code(a, count), _code(b, count)) for a, b in pairwise(chain)]
    return Layout(_ordered(rows, links, count))


def _depths(count: int, edges: Sequence[Edge]) -> list[int]:
    """The row of every box: behind all that it reads, and what reads nothing near its readers."""
    depth, reads = [0] * count, [False] * count
    after: dict[int, list[int]] = defaultdict(list)
    for edge in edges:
        if edge.target == OUTSIDE:
            continue
        if edge.source == OUTSIDE:
            reads[edge.target] = True
        elif edge.source < edge.target:
            after[edge.source].append(edge.target)
            reads[edge.target] = True
    for box in range(count):  # edges go to later boxes: their order is a topological one
        for other in after[box]:
            depth[other] = max(depth[other], depth[box] + 1)
    for box in reversed(range(count)):
        if not reads[box] and after[box]:
            depth[box] = min(depth[other] for other in after[box]) - 1
    return depth


def _code(entry: tuple[int, int], count: int) -> int:
    """One number for a box, or for the place of an edge in a row."""
    row, what = entry
    return what if what >= 0 else count + (-1 - what) * (LONGEST_ROWS) + row


LONGEST_ROWS = 1 << 32


def _ordered(
    rows: Sequence[Sequence[int]], links: Sequence[tuple[int, int]], count: int
) -> tuple[tuple[int, ...], ...]:
    """Every row in the order of the mean places of what its entries are linked to."""
    above: dict[int, list[int]] = defaultdict(list)
    below: dict[int, list[int]] = defaultdict(list)
    for a, b in links:
        below[a].append(b)
        above[b].append(a)
    order = [[_code((row, what), count) for what in each] for row, each in enumerate(rows)]
    place: dict[int, float] = {}
    for each in order:
        _number(each, place)
    for sweep in range(SWEEPS):
        down = sweep % 2 == 0
        linked: Mapping[int, list[int]] = above if down else below
        for each in order if down else reversed(order):
            means = {
                one: sum(place[other] for other in linked[one]) / len(linked[one])
                if linked.get(one)
                else place[one]
                for one in each
            }
            each.sort(key=lambda one: means[one])
            _number(each, place)
    return tuple(
        tuple(code if code < count else -1 - (code - count) // LONGEST_ROWS for code in each)
        for each in order
    )


def _number(row: Sequence[int], place: dict[int, float]) -> None:
    """Places of a row from -1 to 1, so that rows of different lengths compare."""
    for at, one in enumerate(row):
        place[one] = (2 * at + 1) / len(row) - 1
