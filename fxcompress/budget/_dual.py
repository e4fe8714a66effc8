"""The Lagrangian dual: the prices λ of the budgets at which the lower bound is greatest.

For prices λ >= 0 the entities fall apart: each takes ``argmin D + λ·c``, with the total loss
``D(λ)`` and costs ``C(λ)``.  ``g(λ) = D(λ) + λ·(C(λ) - B)`` is a lower bound on the loss of any
allocation within the budgets B.  It is concave and piecewise linear, and ``C(λ) - B`` is its slope:
each evaluation gives a plane that lies above g.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, replace

import numpy as np
from scipy.optimize import linprog

from fxcompress.budget._knapsack import (
    Knapsack,
    Pick,
    best_pick,
    best_picks,
    cheapest_picks,
    top_picks,
)
from fxcompress.budget._slots import Floats

PLANES = 150
"""Evaluations of the dual of several budgets at most."""


@dataclass(frozen=True)
class Dual:
    """The maximum of the dual.

    Attributes:
        prices: λ of every budget, in nats per unit of cost.
        bound: no allocation within the budgets has a lower loss, in nats.
        picks: an allocation within the budgets, of those that are optimal at the prices if there is
            one budget; None if several were not met by any that was looked at.
    """

    prices: tuple[float, ...]
    bound: float
    picks: list[Pick] | None


def _value(knapsack: Knapsack, prices: tuple[float, ...], picks: list[Pick]) -> float:
    """``loss + λ·(cost - budget)`` in nats: g(λ) if the picks are the best at λ."""
    # Costs and budget are subtracted before they are scaled: at a large λ little is left of both.
    excess = [
        price * math.fsum([knapsack.cost(picks, at), -budget])
        for at, (price, budget) in enumerate(zip(prices, knapsack.budgets, strict=True))
    ]
    return math.fsum([knapsack.loss(picks), *excess])


def maximum(knapsack: Knapsack) -> Dual:
    """The dual of one budget, which the cheapest choices meet."""
    (budget,) = knapsack.budgets
    price, _, within = crossing(knapsack, budget)
    if price == 0.0:
        return Dual((0.0,), knapsack.loss(within), within)
    picks = best_picks(knapsack, (price,))  # every choice is looked at afresh
    return Dual((price,), _value(knapsack, (price,), picks), within)


def crossing(knapsack: Knapsack, budget: float) -> tuple[float, list[Pick], list[Pick]]:
    """The price at which the cost of what is taken crosses an amount.

    Between a price at which the budget is exceeded and one at which it is met, the next to try is
    where their lines meet.  It ends when there is no line below that point: what was taken at the
    higher price is optimal there, too.

    Args:
        knapsack: of one budget.
        budget: the amount, which the cheapest choices do not exceed.

    Returns:
        The price, and what is optimal at it: above the amount, and within it.  With a price of 0
        both are the choices of least loss, which are within it.
    """
    below, above = top_picks(knapsack), cheapest_picks(knapsack)
    if knapsack.cost(below) <= budget:
        return 0.0, below, below
    open_entities = [at for at in range(len(below)) if below[at] != above[at]]
    while True:
        more, less = knapsack.cost(below), knapsack.cost(above)
        price = (knapsack.loss(above) - knapsack.loss(below)) / (more - less)
        price = min(price, sys.float_info.max)
        picks = above.copy()
        for at in open_entities:
            picks[at] = best_pick(knapsack.entities[at], (price,))
        cost = knapsack.cost(picks)
        if not less < cost < more:
            return price, below, above
        if cost <= budget:
            above = picks
        else:
            below = picks
        # What an entity takes at both ends it takes everywhere between them.
        open_entities = [at for at in open_entities if below[at] != above[at]]


def maximum_of_several(knapsack: Knapsack) -> Dual | None:
    """The dual of several budgets, by cutting planes (Kelley 1960); None if it has no maximum.

    The next prices are those at which the least of all planes so far is greatest, a small linear
    programme.  The bound is that of prices that were evaluated, hence holds however early it ends.
    Without a maximum the budgets cannot be met together.
    """
    budgets = np.array(knapsack.budgets)
    # A price is looked for as what the whole budget costs at it, in nats.
    share = 1.0 / np.maximum(budgets, max(1e-9 * budgets.max(), 1e-200))
    greatest = _greatest_loss(knapsack)
    paid, limit = np.zeros(len(budgets)), max(10.0 * greatest, sys.float_info.min)
    losses: list[float] = []
    slopes: list[Floats] = []
    seen: set[tuple[Pick, ...]] = set()
    best = Dual((0.0,) * len(budgets), -math.inf, None)
    least = math.inf
    for _ in range(PLANES):
        prices = tuple((paid * share).tolist())
        picks = best_picks(knapsack, prices)
        found = _value(knapsack, prices, picks)
        if found > greatest * (1.0 + 1e-9):
            return None
        if found > best.bound:
            best = replace(best, prices=prices, bound=found)
            if (paid > 0.99 * limit).any():
                limit *= 30.0
        costs = np.array([knapsack.cost(picks, at) for at in range(len(budgets))])
        loss = knapsack.loss(picks)
        if loss < least and (costs <= budgets).all():
            best, least = replace(best, picks=picks), loss
        if tuple(picks) in seen:
            break
        seen.add(tuple(picks))
        losses.append(loss)
        slopes.append((costs - budgets) * share)
        # In the unit, numbers near the maximum are about 1.
        unit = best.bound if best.bound > 0.0 else greatest or 1.0
        paid, highest = _highest(losses, slopes, limit, unit)
        if highest <= best.bound + 1e-9 * abs(best.bound):
            break
    return best


def _highest(
    losses: list[float], slopes: list[Floats], limit: float, unit: float
) -> tuple[Floats, float]:
    """Where the least of some planes is greatest, within 0 and a limit, and how great it is."""
    size = len(slopes[0])
    found = linprog(
        np.append(np.zeros(size), -1.0),
        A_ub=np.column_stack([-np.array(slopes), np.ones(len(slopes))]),
        b_ub=np.array(losses) / unit,
        bounds=[(0.0, limit / unit)] * size + [(None, None)],
        method="highs-ds",
    )
    if found.x is None:
        return np.zeros(size), -math.inf
    paid: Floats = np.maximum(found.x[:-1], 0.0) * unit
    return paid, float(found.x[-1]) * unit


def _greatest_loss(knapsack: Knapsack) -> float:
    """What no allocation loses more than, in nats."""
    return math.fsum(
        max(
            way.loss + math.fsum(float(slot.loss.max(initial=0.0)) for slot in way.slots)
            for way in ways
        )
        for ways in knapsack.entities
    )
