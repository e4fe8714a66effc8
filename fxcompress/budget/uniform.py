"""The classical baseline: every site keeps the same fraction of its dense cost.

It is what the global budget (:mod:`fxcompress.budget.solver`) is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fxcompress.budget._knapsack import (
    Knapsack,
    Pick,
    Ways,
    allocation_of,
    beyond,
    check_budget,
    knapsack_of,
)
from fxcompress.budget._slots import Slot
from fxcompress.budget.problem import Allocation, Entity

# Halvings of [0, 1]: finer than the fractions of two ranks of a site can be apart.
_HALVINGS = 60


def allocate_uniform(entities: Sequence[Entity], budget: float) -> Allocation:
    """Give every site (or group, or alternatives) the same fraction q of its dense cost.

    Each site takes the choice of least loss that costs at most q times its dense cost; its
    cheapest choice if none is that cheap; dense only at q = 1, or if nothing else is cheaper.
    Alternatives have the dense cost of their first mode, of which a member that cannot stay dense
    takes part like all others.  Of two modes that cost at most q times that, the one that loses
    less is taken; if not both do, the cheaper one.
    q is found by bisection: at q the total cost is within the budget, at the next number it is
    not.  Without alternatives that is the greatest such q in [0, 1]; with them there can be others,
    as they can become cheaper when the mode changes.  Sites of one shape move together, so a part
    of the budget can stay unspent.

    Args:
        entities: the sites, and the alternatives for some of them together.
        budget: limit on the total cost, in the unit of the costs.

    Returns:
        The allocation.  Nothing is minimised over the sites together, so there is no multiplier
        (NaN), and the only lower bound known is that no loss is negative (``bound`` 0).

    Raises:
        BudgetError, ValueError: as :func:`fxcompress.budget.allocate`.
    """
    knapsack = knapsack_of([entities], [budget])
    check_budget(knapsack)
    picks = _at(knapsack, 1.0)
    if knapsack.cost(picks) > budget:
        below, above = 0.0, 1.0
        picks = _at(knapsack, 0.0)
        for _ in range(_HALVINGS):
            middle = 0.5 * (below + above)
            tried = _at(knapsack, middle)
            if knapsack.cost(tried) <= budget:
                below, picks = middle, tried
            else:
                above = middle
    return allocation_of(entities, knapsack, picks, multiplier=math.nan, bound=0.0)


def _at(knapsack: Knapsack, fraction: float) -> list[Pick]:
    """What every entity takes at a fraction of its dense cost."""
    return [_pick(ways, fraction) for ways in knapsack.entities]


def _pick(ways: Ways, fraction: float) -> Pick:
    whole = math.fsum(map(_dense_cost, ways[0].slots)) + ways[0].cost[0]
    picks = []
    for at, way in enumerate(ways):
        # What cannot stay dense stands for all that the alternatives are about.
        limits = [fraction * (_dense_cost(slot) or whole) for slot in way.slots]
        choices = [_within(slot, limit) for slot, limit in zip(way.slots, limits, strict=True)]
        picks.append((at, tuple(choices)))
    best = picks[0]
    for other in picks[1:]:
        loss, (cost,) = beyond(ways, other, best)
        costs = [math.fsum(ways[at].costs(choices)) for at, choices in (best, other)]
        # The better way if both are within the fraction, otherwise the cheaper one.
        if max(costs) <= fraction * whole:
            better = (loss, cost) < (0.0, 0.0)
        else:
            better = (cost, loss) < (0.0, 0.0)
        best = other if better else best
    return best


def _dense_cost(slot: Slot) -> float:
    """Cost of leaving all members dense; 0 if they cannot be."""
    return math.fsum(member.dense_cost or 0.0 for member in slot.members[0])


def _within(slot: Slot, limit: float) -> int:
    """The best choice within a limit on its cost; the cheapest if there is none."""
    if slot.cost_at(slot.last) <= limit:
        return slot.last
    return max(int(np.searchsorted(slot.cost[0], limit, side="right")) - 1, 0)
