"""Candidates reduced to what a solver has to look at.

Both allocators work on :class:`Site`: a group merged into one, with the choices that no other
choice beats in cost and loss at once, from the cheapest to the one without loss.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxcompress.budget.problem import Allocation, Candidate, Choice, Option
from fxcompress.errors import BudgetError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Site:
    """A candidate, or a group of them, with its undominated choices 0, ..., k.

    Choice k, the *top*, is the cheapest one without loss: nearly always "leave dense".  It is
    kept apart from the arrays so that these can be views of what the caller gave.

    Attributes:
        members: the candidates, more than one for a group.
        forms: form names, indexed by ``form``.
        form: shape ``(k,)``: index of each choice's form.
        rank: shape ``(k,)``.
        cost: shape ``(k,)``, strictly increasing, below ``top_cost``; summed over the members.
        loss: shape ``(k,)``, strictly decreasing, above 0; summed over the members.
        top: form and rank of the top, None for dense.
        top_cost: cost of the top, summed over the members.
    """

    members: tuple[Candidate, ...]
    forms: tuple[str, ...]
    form: NDArray[np.int64]
    rank: NDArray[np.int64]
    cost: Floats
    loss: Floats
    top: tuple[str, int] | None
    top_cost: float

    @property
    def last(self) -> int:
        """Index of the top."""
        return self.cost.size

    def cost_at(self, index: int) -> float:
        """Cost of a choice, summed over the members."""
        return self.top_cost if index == self.cost.size else float(self.cost[index])

    def loss_at(self, index: int) -> float:
        """Loss of a choice in nats, summed over the members."""
        return 0.0 if index == self.loss.size else float(self.loss[index])

    def choices(self, index: int) -> Iterator[tuple[str, Choice]]:
        """Name and choice of each member."""
        if index < self.last:
            form, rank = self.forms[self.form[index]], int(self.rank[index])
        elif self.top is not None:
            form, rank = self.top
        else:
            for member in self.members:
                yield member.name, Choice(None, None, 0.0, float(member.dense_cost))
            return
        for member in self.members:
            option = next(option for option in member.options if option.form == form)
            at = int(np.searchsorted(option.ranks, rank))
            yield (
                member.name,
                Choice(form, rank, float(option.loss[at]), float(option.cost[at])),
            )

    def costs(self, index: int) -> tuple[float, ...]:
        """Cost of a choice for each member: their exact sum may differ from the rounded one."""
        if len(self.members) == 1:
            return (self.cost_at(index),)
        return tuple(choice.cost for _, choice in self.choices(index))


def sites_of(candidates: Sequence[Candidate], budget: float) -> list[Site]:
    """Check a problem, merge its groups and drop the dominated choices.

    Args:
        candidates: the sites, with distinct names.
        budget: in the unit of the costs.

    Returns:
        One site per candidate or group, in the order of their first members.  The cheapest
        choices (index 0) fit the budget together.

    Raises:
        BudgetError: if they do not, if the budget is negative or not finite, or if the members
            of a group have no (form, rank) in common.
        ValueError: if two candidates have one name.
    """
    if not 0.0 <= budget < math.inf:
        raise BudgetError(f"the budget must be finite and not negative, not {budget}")
    groups: dict[tuple[str, str], list[Candidate]] = {}
    names: set[str] = set()
    for candidate in candidates:
        if candidate.name in names:
            raise ValueError(f"two candidates have the name {candidate.name!r}")
        names.add(candidate.name)
        alone = candidate.group is None
        key = ("site", candidate.name) if alone else ("group", str(candidate.group))
        groups.setdefault(key, []).append(candidate)
    sites = [_site(tuple(members)) for members in groups.values()]
    least = total_cost(sites, [0] * len(sites))
    if least > budget:
        raise BudgetError(
            f"the smallest total cost these rules allow is {_number(least)}, the budget is "
            f"{_number(budget)}; raise the budget, or allow lower ranks (min_rank, multiple_of) "
            "or match more operators"
        )
    return sites


def least_cost(candidates: Sequence[Candidate]) -> float:
    """The smallest budget that can be met.

    Raises:
        BudgetError, ValueError: as :func:`sites_of`.
    """
    sites = sites_of(candidates, sys.float_info.max)
    return total_cost(sites, [0] * len(sites))


def total_cost(sites: Sequence[Site], picks: Sequence[int]) -> float:
    """Sum of the costs over all candidates, correctly rounded: the number the budget limits."""
    return math.fsum(
        cost for site, pick in zip(sites, picks, strict=True) for cost in site.costs(pick)
    )


def allocation_of(
    candidates: Sequence[Candidate],
    sites: Sequence[Site],
    picks: Sequence[int],
    budget: float,
    *,
    multiplier: float,
    bound: float,
) -> Allocation:
    """The answer for one choice per site, with the candidates in their own order."""
    found: dict[str, Choice] = {}
    for site, pick in zip(sites, picks, strict=True):
        found.update(site.choices(pick))
    loss = math.fsum(choice.loss for choice in found.values())
    return Allocation(
        choices={candidate.name: found[candidate.name] for candidate in candidates},
        multiplier=multiplier,
        loss=loss,
        cost=math.fsum(choice.cost for choice in found.values()),
        budget=float(budget),
        # Mathematically the bound lies in between; only rounding can put it outside.
        bound=min(max(bound, 0.0), loss),
    )


def _site(members: tuple[Candidate, ...]) -> Site:
    options = members[0].options if len(members) == 1 else _common_options(members)
    top: tuple[str, int] | None = None
    top_cost = math.fsum(member.dense_cost for member in members)
    for option in options:
        for at in np.flatnonzero(option.loss == 0.0):
            if option.cost[at] < top_cost:
                top, top_cost = (option.form, int(option.ranks[at])), float(option.cost[at])
    form: NDArray[np.int64]
    if len(options) == 1:
        (option,) = options
        # One number seen k times: no memory per rank.
        form = np.broadcast_to(np.int64(0), option.ranks.shape)
        rank, cost, loss = option.ranks, option.cost, option.loss
    else:
        form = np.repeat(np.arange(len(options)), [option.ranks.size for option in options])
        rank = np.concatenate([np.empty(0, np.int64), *(option.ranks for option in options)])
        cost = np.concatenate([np.empty(0), *(option.cost for option in options)])
        loss = np.concatenate([np.empty(0), *(option.loss for option in options)])
    kept = _frontier(cost, loss, top_cost)
    return Site(
        members=members,
        forms=tuple(option.form for option in options),
        form=form[kept],
        rank=rank[kept],
        cost=cost[kept],
        loss=loss[kept],
        top=top,
        top_cost=top_cost,
    )


def _frontier(cost: Floats, loss: Floats, top_cost: float) -> slice | NDArray[np.int64]:
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


def _common_options(members: tuple[Candidate, ...]) -> tuple[Option, ...]:
    """The options of a group: at each form and rank all members have, the sums over them."""
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


def _number(value: float) -> str:
    """A cost in full: integers without exponent, other numbers so that they read back."""
    return str(int(value)) if value.is_integer() and value < 1e18 else repr(value)
