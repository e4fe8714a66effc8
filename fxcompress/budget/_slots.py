"""Candidates and groups as slots: what the allocators choose for, one choice each."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxcompress.budget.problem import Candidate, Choice, Option
from fxcompress.errors import BudgetError

Floats = NDArray[np.float64]
Indices = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Slot:
    """A candidate, or a group of them, with k choices of form and rank, and dense as the last.

    Losses and costs are sums over the members; costs are in the unit of each budget, of which
    there are u.  If that is one, only undominated choices are here, from the cheapest to the one
    of least loss.

    Attributes:
        members: for every budget the candidates, more than one for a group.
        forms: form names, indexed by ``form``.
        form: shape ``(k,)``: index of each choice's form.
        rank: shape ``(k,)``.
        loss: shape ``(k,)``, in nats.
        cost: for every budget, shape ``(k,)``.
        dense: for every budget the cost of leaving all members as they are; None if that is no
            choice.
    """

    members: tuple[tuple[Candidate, ...], ...]
    forms: tuple[str, ...]
    form: Indices
    rank: Indices
    loss: Floats
    cost: tuple[Floats, ...]
    dense: tuple[float, ...] | None

    @property
    def last(self) -> int:
        """Index of the last choice: dense, if that is one."""
        return self.loss.size - (self.dense is None)

    def loss_at(self, choice: int) -> float:
        """Loss of a choice in nats."""
        return 0.0 if choice == self.loss.size else float(self.loss[choice])

    def cost_at(self, choice: int, budget: int = 0) -> float:
        """Cost of a choice in the unit of one budget."""
        if self.dense is not None and choice == self.loss.size:
            return self.dense[budget]
        return float(self.cost[budget][choice])

    def costs(self, choice: int, budget: int = 0) -> tuple[float, ...]:
        """Cost of a choice for each member: their exact sum may differ from the rounded one."""
        if len(self.members[budget]) == 1:
            return (self.cost_at(choice, budget),)
        return tuple(each.cost for _, each in self.choices(choice, budget))

    def choices(self, choice: int, budget: int = 0) -> Iterator[tuple[str, Choice]]:
        """Name and choice of each member, with its cost in the unit of one budget."""
        members = self.members[budget]
        if choice == self.loss.size:
            for member in members:
                yield member.name, Choice(None, None, 0.0, float(member.dense_cost or 0.0))
            return
        form, rank = self.forms[self.form[choice]], int(self.rank[choice])
        for member in members:
            option = next(option for option in member.options if option.form == form)
            at = int(np.searchsorted(option.ranks, rank))
            loss, cost = float(option.loss[at]), float(option.cost[at])
            yield member.name, Choice(form, rank, loss, cost)

    def best(self, prices: Sequence[float]) -> int:
        """The choice of least ``loss + λ·cost``; of equal ones the first.

        Args:
            prices: λ of every budget, in nats per unit of cost.
        """
        if not self.loss.size:
            return 0
        value = self._values(prices)
        at = int(value.argmin())
        dense = self._dense_value(prices)
        return self.loss.size if dense < value[at] else at

    def regrets(self, prices: Sequence[float]) -> Floats:
        """How much worse at λ each choice is than the best, in nats; the last of dense, (k + 1)."""
        value = np.append(self._values(prices), self._dense_value(prices))
        value -= value.min()
        return value

    def _values(self, prices: Sequence[float]) -> Floats:
        value = self.cost[0] * prices[0]
        value += self.loss
        for price, cost in zip(prices[1:], self.cost[1:], strict=True):
            value += price * cost
        return value

    def _dense_value(self, prices: Sequence[float]) -> float:
        if self.dense is None:
            return math.inf
        return math.fsum(price * cost for price, cost in zip(prices, self.dense, strict=True))


def slots_of(candidates: Sequence[tuple[Candidate, ...]]) -> list[Slot]:
    """Merge the groups; for one budget, drop the dominated choices.

    Args:
        candidates: each as it is for every budget.

    Returns:
        One slot per candidate or group, in the order of their first members.

    Raises:
        BudgetError: if the members of a group have no (form, rank) in common.
    """
    groups: dict[tuple[str, str], list[tuple[Candidate, ...]]] = {}
    for each in candidates:
        alone = each[0].group is None
        key = ("candidate", each[0].name) if alone else ("group", str(each[0].group))
        groups.setdefault(key, []).append(each)
    return [_slot(tuple(zip(*members, strict=True))) for members in groups.values()]


def _slot(members: tuple[tuple[Candidate, ...], ...]) -> Slot:
    """The slot of candidates, which are given for every budget."""
    options = [these[0].options if len(these) == 1 else _common(these) for these in members]
    dense: tuple[float, ...] | None = None
    if all(member.dense_cost is not None for member in members[0]):
        dense = tuple(math.fsum(each.dense_cost or 0.0 for each in these) for these in members)
    first = options[0]
    form: Indices
    if len(first) == 1:
        # One number seen k times: no memory per rank.
        form = np.broadcast_to(np.int64(0), first[0].ranks.shape)
        rank, loss = first[0].ranks, first[0].loss
        cost = tuple(only.cost for (only,) in options)
    else:
        form = np.repeat(np.arange(len(first)), [option.ranks.size for option in first])
        rank = np.concatenate([np.empty(0, np.int64), *(option.ranks for option in first)])
        loss = np.concatenate([np.empty(0), *(option.loss for option in first)])
        cost = tuple(np.concatenate([np.empty(0), *(o.cost for o in these)]) for these in options)
    if len(members) == 1:
        kept = _undominated(cost[0], loss, math.inf if dense is None else dense[0])
        form, rank, loss, cost = form[kept], rank[kept], loss[kept], (cost[0][kept],)
        if loss.size and loss[-1] == 0.0:
            dense = None  # which would cost more for nothing
    return Slot(members, tuple(option.form for option in first), form, rank, loss, cost, dense)


def _undominated(cost: Floats, loss: Floats, dense: float) -> slice | Indices:
    """Where the choices are that none beats: cheaper than dense, each costlier one better.

    Of equal ones the first is kept.  A slice, hence views, for costs and losses that are strict
    as they come, which is the rule.
    """
    if np.all(cost[1:] > cost[:-1]) and np.all(loss[1:] < loss[:-1]):
        return slice(int(np.searchsorted(cost, dense)))
    order = np.lexsort((loss, cost))
    order = order[: int(np.searchsorted(cost[order], dense))]
    best = np.minimum.accumulate(loss[order])
    better = np.ones(order.size, dtype=np.bool_)
    better[1:] = best[1:] < best[:-1]
    return order[better]


def _common(members: tuple[Candidate, ...]) -> tuple[Option, ...]:
    """The options of a group: at each form and rank all members have, the sums over them.

    Raises:
        BudgetError: they have none in common.
    """
    if not any(member.options for member in members):
        return ()
    merged = []
    for first in members[0].options:
        same = [
            option for member in members for option in member.options if option.form == first.form
        ]
        if len(same) < len(members):
            continue
        ranks = first.ranks
        for option in same:
            ranks = np.intersect1d(ranks, option.ranks, assume_unique=True)
        if ranks.size:
            at = [np.searchsorted(option.ranks, ranks) for option in same]
            loss = np.sum([option.loss[i] for option, i in zip(same, at, strict=True)], axis=0)
            cost = np.sum([option.cost[i] for option, i in zip(same, at, strict=True)], axis=0)
            merged.append(Option(first.form, ranks, loss, cost))
    if not merged:
        names = ", ".join(repr(member.name) for member in members)
        raise BudgetError(
            f"group {members[0].group!r}: its members have no form and rank in common, so they "
            f"cannot be given the same: {names}; let them use the same form and overlapping "
            "ranks (min_rank, max_rank, multiple_of), or take them out of the group"
        )
    return tuple(merged)
