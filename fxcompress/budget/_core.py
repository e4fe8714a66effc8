"""The core of a problem: the few choices that a better allocation can contain.

How much worse than the best of its slot a choice is at λ is its *regret*, and likewise that of a
way.  The loss of an allocation within the budgets is at least the bound plus its regrets plus what
is unspent, at the prices.  So an allocation that is better than the present one, of gap ``loss -
bound``, has no choice that regrets more than the gap: all others are fixed (Dembo and Hammer 1980).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from fxcompress.budget._knapsack import Knapsack, Way, best_pick
from fxcompress.budget._slots import Floats, Indices, Slot

CHOICES = 1 << 20
"""Choices that a core holds at most, but for the best of each slot."""


@dataclass(frozen=True, eq=False)
class Contest:
    """The undominated choices of a slot that regret at most some amount.

    Attributes:
        slot: whose they are.
        choices: shape ``(k,)``, increasing, at least one.
        regret, loss: shape ``(k,)``, in nats.
        cost: shape ``(k, u)``, in the unit of every budget.
    """

    slot: Slot
    choices: Indices
    regret: Floats
    loss: Floats
    cost: Floats

    @property
    def best(self) -> int:
        """Where the choice is that regrets least."""
        return int(self.regret.argmin())

    def within(self, allowed: float) -> Contest:
        """The choices that regret at most some amount, one at least."""
        kept = self.regret <= max(allowed, float(self.regret.min()))
        return Contest(
            self.slot, self.choices[kept], self.regret[kept], self.loss[kept], self.cost[kept]
        )

    def place(self, choice: int) -> int:
        """Where a choice is, or one that is no worse; -1 if there is none."""
        at = int(np.searchsorted(self.choices, choice))
        if at < self.choices.size and self.choices[at] == choice:
            return at
        cost = [self.slot.cost_at(choice, u) for u in range(self.cost.shape[1])]
        no_worse = (self.loss <= self.slot.loss_at(choice)) & (self.cost <= cost).all(1)
        return int(no_worse.argmax()) if no_worse.any() else -1


@dataclass(frozen=True, eq=False)
class OpenWay:
    """A way that an allocation may take.

    Attributes:
        index: among those of its entity.
        regret: how much worse than the best way of the entity it is at λ, in nats.
        contests: of its slots.
    """

    index: int
    way: Way
    regret: float
    contests: tuple[Contest, ...]

    def best(self) -> tuple[int, ...]:
        """The choice of each slot that regrets least."""
        return tuple(int(contest.choices[contest.best]) for contest in self.contests)

    def within(self, allowed: float) -> OpenWay:
        """The way without choices with which it regrets more than some amount."""
        contests = tuple(each.within(allowed - self.regret) for each in self.contests)
        return replace(self, contests=contests)


@dataclass(frozen=True, eq=False)
class Core:
    """What is open: every choice or way that regrets at most ``allowed``, but dominated ones.

    Attributes:
        allowed: in nats.
        entities: for each entity the open ways, at least one.
    """

    allowed: float
    entities: tuple[tuple[OpenWay, ...], ...]

    def regrets(self) -> Floats:
        """Regrets of all that is open, but for the best of each slot; in no order."""
        found = [np.zeros(0)]
        for ways in self.entities:
            for way in ways:
                found += [way.regret + np.delete(c.regret, c.best) for c in way.contests]
        return np.concatenate(found)

    def within(self, allowed: float) -> Core:
        """The core of a smaller gap: what regrets at most some amount."""
        entities = tuple(
            tuple(way.within(allowed) for way in ways if way.regret <= allowed)
            for ways in self.entities
        )
        return Core(min(allowed, self.allowed), entities)


def core_of(knapsack: Knapsack, prices: Sequence[float], allowed: float) -> Core:
    """The core for a gap; for a smaller one if it would hold more than :data:`CHOICES`."""
    while True:
        entities, room = [], CHOICES
        for ways in knapsack.entities:
            entities.append(tuple(_open_ways(ways, prices, allowed)))
            room -= sum(c.choices.size - 1 for way in entities[-1] for c in way.contests)
            if room < 0 and allowed > 0.0:
                break
        else:
            return Core(allowed, tuple(entities))
        allowed = _less(knapsack, prices, allowed)


def _less(knapsack: Knapsack, prices: Sequence[float], allowed: float) -> float:
    """A smaller amount to allow: of what cannot be counted, the greatest regret there is."""
    if math.isfinite(allowed):
        return allowed / 8.0
    regrets = (
        slot.regrets(prices) for ways in knapsack.entities for way in ways for slot in way.slots
    )
    return max(float(each[np.isfinite(each)].max()) for each in regrets)


def _open_ways(ways: Sequence[Way], prices: Sequence[float], allowed: float) -> Iterator[OpenWay]:
    values = [0.0] if len(ways) == 1 else [_least(way, prices) for way in ways]
    for at, (way, value) in enumerate(zip(ways, values, strict=True)):
        if (regret := value - min(values)) <= allowed:
            contests = tuple(_contest(slot, prices, allowed - regret) for slot in way.slots)
            yield OpenWay(at, way, regret, contests)


def _least(way: Way, prices: Sequence[float]) -> float:
    """The least ``loss + λ·cost`` of a way, in nats."""
    _, choices = best_pick((way,), prices)
    costs = (
        price * cost for budget, price in enumerate(prices) for cost in way.costs(choices, budget)
    )
    return math.fsum([*way.losses(choices), *costs])


def _contest(slot: Slot, prices: Sequence[float], allowed: float) -> Contest:
    regret = slot.regrets(prices)
    choices = np.flatnonzero((regret <= allowed) & np.isfinite(regret))
    dense = bool(choices.size) and int(choices[-1]) == slot.loss.size
    own = choices[:-1] if dense else choices
    loss = np.append(slot.loss[own], [0.0] if dense else [])
    columns = [
        np.append(cost[own], [slot.dense[at]] if dense and slot.dense is not None else [])
        for at, cost in enumerate(slot.cost)
    ]
    cost = np.stack(columns, axis=1)
    kept = _undominated(loss, cost, dense) if len(columns) > 1 else np.arange(loss.size)
    return Contest(slot, choices[kept], regret[choices[kept]], loss[kept], cost[kept])


def _undominated(loss: Floats, cost: Floats, dense: bool) -> Indices:
    """Places that no other beats in everything, in increasing order.

    Of equal ones dense is kept, which is the last place, or the first.
    """
    index = np.arange(loss.size)
    if dense:
        index[-1] = -1
    order = np.lexsort((index, *cost.T[::-1], loss))
    kept: list[int] = []
    for at in order.tolist():
        if not kept or not (cost[kept] <= cost[at]).all(1).any():
            kept.append(at)
    return np.sort(np.array(kept, dtype=np.int64))
