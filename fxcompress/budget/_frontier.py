"""What the solver works on: choices that no other choice beats in cost and loss at once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Frontier:
    """Undominated choices 0, ..., k, from the cheapest to the one without loss.

    Choice k, the *top*, is the cheapest one without loss: nearly always "leave dense".  It is
    kept apart from the arrays so that these can be views of what the caller gave.

    Attributes:
        cost: shape ``(k,)``, strictly increasing, below ``top_cost``.
        loss: shape ``(k,)``, strictly decreasing, above 0.
        top_cost: cost of the top.
    """

    cost: Floats
    loss: Floats
    top_cost: float

    @property
    def last(self) -> int:
        """Index of the top."""
        return self.cost.size

    def cost_at(self, index: int) -> float:
        """Cost of a choice, summed over all that it is about."""
        return self.top_cost if index == self.cost.size else float(self.cost[index])

    def loss_at(self, index: int) -> float:
        """Loss of a choice in nats, summed over all that it is about."""
        return 0.0 if index == self.loss.size else float(self.loss[index])

    def costs(self, index: int) -> tuple[float, ...]:
        """Costs that a choice is made of: their exact sum may differ from the rounded one."""
        return (self.cost_at(index),)

    def best(self, multiplier: float, first: int = 0, last: int | None = None) -> int:
        """The choice of least ``loss + λ·cost``, then of least cost.

        Args:
            multiplier: λ >= 0 in nats per unit of cost.
            first, last: the choices to look at; ``last`` None for the top.
        """
        if last is None:
            last = self.last
        if first == self.last:
            return first
        value = self.cost[first : last + 1] * multiplier
        value += self.loss[first : last + 1]
        at = int(value.argmin())
        if last == self.last and multiplier * self.top_cost < value[at]:
            return last
        return first + at


def total_cost(sites: Sequence[Frontier], picks: Sequence[int]) -> float:
    """Sum of the costs, correctly rounded: the number the budget limits."""
    return math.fsum(
        cost for site, pick in zip(sites, picks, strict=True) for cost in site.costs(pick)
    )


def total_loss(sites: Sequence[Frontier], picks: Sequence[int]) -> float:
    """Sum of the losses over all sites, in nats."""
    return math.fsum(site.loss_at(pick) for site, pick in zip(sites, picks, strict=True))


def undominated(cost: Floats, loss: Floats, top_cost: float) -> slice | NDArray[np.int64]:
    """Where the choices are that none beats: cheaper than the top, each costlier one better.

    Of equal ones the first is kept.  A slice, hence views, for costs and losses that are strict
    as they come, which is the rule.
    """
    if np.all(cost[1:] > cost[:-1]) and np.all(loss[1:] < loss[:-1]):
        return slice(int(np.searchsorted(cost, top_cost)))
    order = np.lexsort((loss, cost))
    order = order[: int(np.searchsorted(cost[order], top_cost))]
    best = np.minimum.accumulate(loss[order])
    better = np.ones(order.size, dtype=np.bool_)
    better[1:] = best[1:] < best[:-1]
    return order[better]
