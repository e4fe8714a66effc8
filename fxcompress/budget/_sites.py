"""Candidates and groups as sites: what the allocators choose for.

A group is merged into one :class:`Site`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxcompress.budget._frontier import Frontier, undominated
from fxcompress.budget.problem import Candidate, Choice, Option
from fxcompress.errors import BudgetError


@dataclass(frozen=True, eq=False)
class Site(Frontier):
    """A candidate, or a group of them, with its undominated choices; sums over the members.

    Attributes:
        members: the candidates, more than one for a group.
        forms: form names, indexed by ``form``.
        form: shape ``(k,)``: index of each choice's form.
        rank: shape ``(k,)``.
        top: form and rank of the top, None for dense.
    """

    members: tuple[Candidate, ...]
    forms: tuple[str, ...]
    form: NDArray[np.int64]
    rank: NDArray[np.int64]
    top: tuple[str, int] | None

    @property
    def dense_cost(self) -> float:
        """Cost of leaving all members dense."""
        return math.fsum(member.dense_cost for member in self.members)

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
        """Cost of a choice for each member."""
        if len(self.members) == 1:
            return (self.cost_at(index),)
        return tuple(choice.cost for _, choice in self.choices(index))


def sites_of(candidates: Sequence[Candidate]) -> list[Site]:
    """Merge the groups and drop the dominated choices.

    Returns:
        One site per candidate or group, in the order of their first members.

    Raises:
        BudgetError: if the members of a group have no (form, rank) in common.
        ValueError: if two candidates have one name.
    """
    groups: dict[tuple[str, str], list[Candidate]] = {}
    names: set[str] = set()
    for candidate in candidates:
        if candidate.name in names:
            raise ValueError(f"two candidates have the name {candidate.name!r}")
        names.add(candidate.name)
        alone = candidate.group is None
        key = ("site", candidate.name) if alone else ("group", str(candidate.group))
        groups.setdefault(key, []).append(candidate)
    return [_site(tuple(members)) for members in groups.values()]


def _site(members: tuple[Candidate, ...]) -> Site:
    options = members[0].options if len(members) == 1 else common_options(members)
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
    kept = undominated(cost, loss, top_cost)
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


def common_options(members: tuple[Candidate, ...]) -> tuple[Option, ...]:
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
