"""The frontier: what the least loss would be at other budgets, and what every site would take.

Every point is what all sites take at some price λ: no allocation of that cost or less loses less.
The budget of today and those a step beside it are among them, so that the difference between
neighbours says where a little more would go.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from fxcompress.budget._dual import crossing
from fxcompress.budget._knapsack import (
    Knapsack,
    Pick,
    best_pick,
    cheapest_picks,
    knapsack_of,
    top_picks,
)
from fxcompress.budget.problem import Candidate, Choice, Entity

POINTS = 16
"""Points of a frontier beside the three about today's budget."""


@dataclass(frozen=True)
class Taken:
    """What sites that are decided on together take at some price.

    Attributes:
        mode: that of alternatives; empty of what has one only.
        choices: by the names of candidates.
        cost: of all of them, in the unit of the budget.
        loss: of all of them and of the mode, in nats.
    """

    mode: str
    choices: Mapping[str, Choice]
    cost: float
    loss: float


@dataclass(frozen=True)
class Frontier:
    """Least losses by cost.

    Attributes:
        costs, losses: of the points, by rising cost.
        taken: at every point what every candidate by itself, group or alternatives takes; all
            points have the same order of them.
        now: the point of the budget: the dearest that it allows.
        more, less: the cheapest that costs more than a step above that, and the dearest that costs
            a step less or still less; the last or the first if there is none.
    """

    costs: tuple[float, ...]
    losses: tuple[float, ...]
    taken: tuple[tuple[Taken, ...], ...]
    now: int
    more: int
    less: int


def frontier(entities: Sequence[Entity], budget: float, step: float) -> Frontier:
    """Least losses from the cheapest choices to those that lose least.

    Args:
        entities: as of :func:`fxcompress.budget.allocate`.
        budget: of today, which can be met.
        step: by how much it might be changed, in the unit of the costs.
    """
    knapsack = knapsack_of([entities], [budget])
    cheapest, top = cheapest_picks(knapsack), top_picks(knapsack)
    _, _, now = crossing(knapsack, budget)
    spent, least = knapsack.cost(now), knapsack.cost(cheapest)
    _, more, _ = crossing(knapsack, spent + step)
    less = cheapest if spent - step < least else crossing(knapsack, spent - step)[2]
    found = {knapsack.cost(picks): picks for picks in (cheapest, less, now, more, top)}
    _refine(knapsack, found)
    costs = sorted(found)
    at = {cost: place for place, cost in enumerate(costs)}
    names = [entity for entity in entities if not isinstance(entity, Candidate)]
    modes = [[mode.name for mode in entity.modes] for entity in names]
    return Frontier(
        costs=tuple(costs),
        losses=tuple(knapsack.loss(found[cost]) for cost in costs),
        taken=tuple(_taken(knapsack, modes, found[cost]) for cost in costs),
        now=at[knapsack.cost(now)],
        more=at[knapsack.cost(more)],
        less=at[knapsack.cost(less)],
    )


def _refine(knapsack: Knapsack, found: dict[float, list[Pick]]) -> None:
    """Split the widest gap between costs, again and again, where something lies inside of it."""
    closed: set[float] = set()
    for _ in range(POINTS):
        costs = sorted(found)
        gaps = [(b - a, a, b) for a, b in pairwise(costs) if a not in closed]
        if not gaps:
            return
        _, low, high = max(gaps)
        above, below = found[low], found[high]
        price = (knapsack.loss(above) - knapsack.loss(below)) / (high - low)
        price = min(max(price, 0.0), sys.float_info.max)
        picks = [
            one if one == other else best_pick(ways, (price,))
            for one, other, ways in zip(above, below, knapsack.entities, strict=True)
        ]
        cost = knapsack.cost(picks)
        if low < cost < high:
            found[cost] = picks
        else:
            closed.add(low)


def _taken(
    knapsack: Knapsack, modes: Sequence[Sequence[str]], picks: Sequence[Pick]
) -> tuple[Taken, ...]:
    """Alternatives come first in the knapsack, in their order."""
    out = []
    for at, (ways, (way, choices)) in enumerate(zip(knapsack.entities, picks, strict=True)):
        chosen: dict[str, Choice] = {}
        for slot, choice in zip(ways[way].slots, choices, strict=True):
            chosen.update(slot.choices(choice))
        out.append(
            Taken(
                modes[at][way] if at < len(modes) else "",
                chosen,
                math.fsum(ways[way].costs(choices)),
                math.fsum(ways[way].losses(choices)),
            )
        )
    return tuple(out)
