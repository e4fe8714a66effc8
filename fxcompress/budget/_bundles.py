"""Candidates, groups and bundles reduced to what a solver has to look at.

A bundle becomes two alternatives: the sites of its members, and one :class:`JointSite`.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from fxcompress.budget._frontier import Frontier, total_cost
from fxcompress.budget._sites import Site, sites_of
from fxcompress.budget.problem import Allocation, Bundle, Candidate, Choice
from fxcompress.errors import BudgetError


@dataclass(frozen=True, eq=False)
class JointSite(Frontier):
    """A bundle rewritten as a whole.

    Its top is the joint choice without loss, if there is one that is cheaper than the tops of
    the members together; otherwise it is these, so that the top is never a joint form.

    Attributes:
        whole: the bundle as one site whose "dense" stands for the members' tops.
        apart: the sites of the members.
    """

    whole: Site
    apart: tuple[Site, ...]

    @property
    def either(self) -> tuple[AnySite, ...]:
        """Itself and the sites of its members: of these only one or the others are in use."""
        return (self, *self.apart)

    @property
    def dense_cost(self) -> float:
        """Cost of leaving all members dense."""
        return math.fsum(site.dense_cost for site in self.apart)

    def joint(self, index: int) -> tuple[str, Choice] | None:
        """Name of the bundle and choice for the whole of it; None if it falls apart."""
        if self._is_apart(index):
            return None
        ((name, choice),) = self.whole.choices(index)
        return name, choice

    def choices(self, index: int) -> Iterator[tuple[str, Choice]]:
        """Name and choice of each member."""
        for site in self.apart:
            if self._is_apart(index):
                yield from site.choices(site.last)
            else:
                ((_, whole),) = self.whole.choices(index)
                for member in site.members:
                    yield member.name, Choice(whole.form, whole.rank, 0.0, 0.0)

    def costs(self, index: int) -> tuple[float, ...]:
        """Cost of a joint choice; of each member where the bundle falls apart."""
        if self._is_apart(index):
            return tuple(cost for site in self.apart for cost in site.costs(site.last))
        return (self.cost_at(index),)

    def beyond_apart(self, picks: Mapping[AnySite, int]) -> tuple[float, float]:
        """Cost and loss of its choice minus those of its members' own, correctly rounded."""
        apart = [(site, picks[site]) for site in self.apart]
        cost = [*self.costs(picks[self]), *(-c for site, at in apart for c in site.costs(at))]
        loss = [self.loss_at(picks[self]), *(-site.loss_at(at) for site, at in apart)]
        return math.fsum(cost), math.fsum(loss)

    def _is_apart(self, index: int) -> bool:
        return index == self.last and self.whole.top is None


AnySite: TypeAlias = Site | JointSite


@dataclass(frozen=True)
class Problem:
    """All sites that an allocation may consist of.

    Attributes:
        outside: those outside of bundles.
        bundles: each bundle as a whole, and in it the sites of its members.
    """

    outside: tuple[Site, ...]
    bundles: tuple[JointSite, ...]

    def all_sites(self) -> list[AnySite]:
        """The sites of both modes of every bundle."""
        return [*self.sites([False] * len(self.bundles)), *self.bundles]

    def sites(self, joint: Sequence[bool]) -> list[AnySite]:
        """The sites that are left once it is fixed which bundles are rewritten as a whole."""
        sites: list[AnySite] = list(self.outside)
        for bundle, whole in zip(self.bundles, joint, strict=True):
            sites += (bundle,) if whole else bundle.apart
        return sites

    def cheapest_modes(self) -> list[bool]:
        """Which bundles are cheapest as a whole; where both cost the same, which lose less."""
        first = dict.fromkeys(self.all_sites(), 0)
        return [bundle.beyond_apart(first) < (0.0, 0.0) for bundle in self.bundles]

    def best_modes(self, picks: Mapping[AnySite, int], multiplier: float) -> list[bool]:
        """Which bundles have the lesser ``loss + λ·cost`` as a whole, or else the lesser cost."""
        modes = []
        for bundle in self.bundles:
            cost, loss = bundle.beyond_apart(picks)
            modes.append((loss + multiplier * cost, cost) < (0.0, 0.0))
        return modes


def problem_of(candidates: Sequence[Candidate], bundles: Sequence[Bundle]) -> Problem:
    """Check a problem, merge its groups, and drop the dominated choices.

    Raises:
        BudgetError: if the members of a group have no (form, rank) in common.
        ValueError: if two candidates or two bundles have one name, or a member of a bundle is
            unknown, in a second bundle, or in a group.
    """
    sites = sites_of(candidates)
    alone = {site.members[0].name: site for site in sites if site.members[0].group is None}
    groups = {candidate.name: candidate.group for candidate in candidates}
    bundle_of: dict[str, str] = {}
    wholes: dict[str, JointSite] = {}
    for bundle in bundles:
        if bundle.name in wholes:
            raise ValueError(f"two bundles have the name {bundle.name!r}")
        for name in bundle.members:
            if name in bundle_of:
                problem = f"is in bundle {bundle_of[name]!r} already"
            elif name not in groups:
                problem = "is not a candidate"
            elif name not in alone:
                problem = f"is in group {groups[name]!r}, which gives it the ranks of others"
            else:
                bundle_of[name] = bundle.name
                continue
            raise ValueError(f"bundle {bundle.name!r}: its member {name!r} {problem}")
        apart = tuple(alone[name] for name in bundle.members)
        tops = total_cost(apart, [site.last for site in apart])
        (whole,) = sites_of([Candidate(bundle.name, tops, bundle.options)])
        wholes[bundle.name] = JointSite(whole.cost, whole.loss, whole.top_cost, whole, apart)
    outside = tuple(site for site in sites if site.members[0].name not in bundle_of)
    return Problem(outside, tuple(wholes.values()))


def check_budget(problem: Problem, budget: float) -> None:
    """Raise BudgetError for a budget that is malformed, or below what the cheapest choices cost."""
    if not 0.0 <= budget < math.inf:
        raise BudgetError(f"the budget must be finite and not negative, not {budget}")
    least = _least(problem)
    if least > budget:
        raise BudgetError(
            f"the smallest total cost these rules allow is {_number(least)}, the budget is "
            f"{_number(budget)}; raise the budget, or allow lower ranks (min_rank, multiple_of) "
            "or match more operators"
        )


def least_cost(candidates: Sequence[Candidate], bundles: Sequence[Bundle] = ()) -> float:
    """The smallest budget that can be met.

    Raises:
        BudgetError: if it is not finite, or the members of a group have no (form, rank) in common.
        ValueError: as :func:`fxcompress.budget.allocate`.
    """
    problem = problem_of(candidates, bundles)
    check_budget(problem, sys.float_info.max)
    return _least(problem)


def allocation_of(
    candidates: Sequence[Candidate],
    sites: Sequence[AnySite],
    picks: Sequence[int],
    budget: float,
    *,
    multiplier: float,
    bound: float,
) -> Allocation:
    """The answer for one choice per site, with the candidates in their own order."""
    found: dict[str, Choice] = {}
    joint: dict[str, Choice] = {}
    for site, pick in zip(sites, picks, strict=True):
        found.update(site.choices(pick))
        if isinstance(site, JointSite) and (whole := site.joint(pick)) is not None:
            name, joint[name] = whole
    counted = [*found.values(), *joint.values()]
    loss = math.fsum(choice.loss for choice in counted)
    return Allocation(
        choices={candidate.name: found[candidate.name] for candidate in candidates},
        multiplier=multiplier,
        loss=loss,
        cost=math.fsum(choice.cost for choice in counted),
        budget=float(budget),
        # Mathematically the bound lies in between; only rounding can put it outside.
        bound=min(max(bound, 0.0), loss),
        joint=joint,
    )


def _least(problem: Problem) -> float:
    sites = problem.sites(problem.cheapest_modes())
    return total_cost(sites, [0] * len(sites))


def _number(value: float) -> str:
    """A cost in full: integers without exponent, other numbers so that they read back."""
    return str(int(value)) if value.is_integer() and value < 1e18 else repr(value)
