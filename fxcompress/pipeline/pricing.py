"""What sites cost in the units of budgets, and the problem that the solver is given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fxcompress.budget import Alternatives, Candidate, Entity, Mode, Option
from fxcompress.forms.target import Losses, Ranks
from fxcompress.pipeline.decomposition import Decomposition, narrowing_loss
from fxcompress.pipeline.latency import Table, Timing, entries_for, interpolated
from fxcompress.pipeline.sites import Group, encoded, with_narrowed
from fxcompress.plans.units import CountedUnit
from fxcompress.rules import Bundle, Match

Costs = NDArray[np.float64]


class Pricing(Protocol):
    """What operators cost in one unit, in the recorded example where it depends on one."""

    def dense(self, group: Group) -> float:
        """The operators of a group as they are."""

    def at(self, group: Group, form: str, ranks: Ranks) -> Costs:
        """The operators of a group at ranks of a form, all together."""


@dataclass(frozen=True)
class Counted:
    """What follows from shapes: exact."""

    unit: CountedUnit

    def dense(self, group: Group) -> float:
        """The operators of a group as they are."""
        return float(sum(self.unit.of_operator(shape) for shape in group.shapes))

    def at(self, group: Group, form: str, ranks: Ranks) -> Costs:
        """The operators of a group at ranks of a form, all together."""
        costs: Costs = self.unit.of_form(group.forms[form], ranks).astype(np.float64)
        return costs


@dataclass(frozen=True, eq=False)
class Timed:
    """Seconds, as measured on this machine.

    Attributes:
        times: by the keys of :class:`fxcompress.pipeline.latency.Timing`.
    """

    times: Mapping[str, float]

    def dense(self, group: Group) -> float:
        """The operators of a group as they are."""
        return sum(self.times[Timing((site.shape,)).key] for site in group.sites)

    def at(self, group: Group, form: str, ranks: Ranks) -> Costs:
        """The operators of a group at ranks of a form, all together."""
        return interpolated(self.times, group.forms[form], group.ranks(form), ranks)


def timed(
    groups: Sequence[Group], device: torch.device, table: Table, tick: Callable[[], None]
) -> Timed:
    """Measure whatever of the groups the table does not have.

    Args:
        groups: with all their forms.
        device: that the model is on.
        table: of times that are known.
        tick: called as the measurement goes on.
    """
    entries: list[Timing] = []
    for group in with_narrowed(groups):
        entries += [Timing((shape,)) for shape in group.shapes]
        for name, form in group.forms.items():
            if len(ranks := group.ranks(name)):
                entries += entries_for(form, ranks)
    return Timed(table.measure(entries, device, tick))


def problems(
    groups: Sequence[Group],
    decomposed: Decomposition,
    pricings: Sequence[Pricing],
    excluded: Mapping[str, Collection[str]],
) -> list[tuple[Entity, ...]]:
    """What the solver is to choose, with costs in each of several units.

    Several sites are alternatives of modes: all by themselves, one candidate with the joint forms,
    which has the name of their group, or a hidden value of some width and what that leaves.

    A rank is offered if it saves as much as its rule asks for in one of the units; none of a
    site without a measured influence on the output, unless its rule asks for that.

    Args:
        groups: to choose for.
        decomposed: what their forms lose.
        pricings: one for each unit.
        excluded: forms that are not to be chosen, by the name of a group.
    """
    idle = {*decomposed.idle}

    def measured(group: Group) -> bool:
        return group.name not in idle or group.sites[0].match.limits.unmeasured

    def offers(group: Group) -> list[list[Option]]:
        """Every form that is worth it, at its ranks in every unit."""
        found = []
        dense = [pricing.dense(group) for pricing in pricings]
        for form in group.forms if measured(group) and group.name in decomposed.groups else ():
            if form not in excluded.get(group.name, ()):
                ranks = group.ranks(form)
                costs = [pricing.at(group, form, ranks) for pricing in pricings]
                loss = decomposed.groups[group.name].losses[form]
                if options := _options(form, ranks, loss, costs, dense, group.match):
                    found.append(options)
        return found

    offered = {each.name: offers(each) for each in with_narrowed(groups)}

    def candidate(group: Group, at: int) -> Candidate:
        options = tuple(offer[at] for offer in offered[group.name])
        if len(group.sites) > 1:
            return Candidate(group.name, None, options)
        equal = group.sites[0].match.group if measured(group) and not group.narrowing else None
        return Candidate(group.name, pricings[at].dense(group), options, equal)

    def ways(group: Group, at: int) -> list[Mode]:
        """Several sites as one, or what is left of them at widths of a hidden value."""
        found = [Mode(group.name, (candidate(group, at),))]
        for left in group.narrowed:
            to = left[0].narrowing
            assert to is not None
            loss = narrowing_loss(group, decomposed.groups[group.name], to.form, to.width)
            given_up = to.form in excluded.get(group.name, ())
            if any(offered[each.name] for each in left) and np.isfinite(loss) and not given_up:
                members = tuple(candidate(each, at) for each in left)
                found.append(Mode(f"{group.name}, {to.form} {to.width}", members, loss))
        return found

    several = [group for group in groups if len(group.sites) > 1 and offered[group.name]]
    return [
        tuple(
            _entities(
                {g.name: candidate(g, at) for g in groups if len(g.sites) == 1},
                [(group, ways(group, at)) for group in several],
            )
        )
        for at in range(len(pricings))
    ]


def _entities(
    candidates: Mapping[str, Candidate], several: Sequence[tuple[Group, Sequence[Mode]]]
) -> Iterator[Entity]:
    """Sites by themselves, and sites that are in groups of several as alternatives.

    Args:
        candidates: of the sites.
        several: groups, each with what may be chosen for it instead of its sites by themselves.
    """
    import networkx as nx  # takes a while, and most uses of the package do without

    links = nx.Graph()
    links.add_nodes_from(candidates)
    for group, _ in several:
        nx.add_path(links, [site.name for site in group.sites])
    ways = {group.name: found for group, found in several}
    for names in nx.connected_components(links):
        groups = [group for group, _ in several if group.sites[0].name in names]
        members = [candidate for name, candidate in candidates.items() if name in names]
        if not groups:
            yield from members
            continue
        modes = []
        for chosen in _disjoint(groups):
            taken = {site.name for group in chosen for site in group.sites}
            rest = tuple(member for member in members if member.name not in taken)
            for way in product(*(ways[group.name] for group in chosen)):
                name = " + ".join(mode.name for mode in way) or "single"
                inside = (*rest, *(member for mode in way for member in mode.members))
                modes.append(Mode(name, inside, sum(mode.loss for mode in way)))
        yield Alternatives(" | ".join(group.name for group in groups), tuple(modes))


def _disjoint(groups: Sequence[Group]) -> Iterator[tuple[Group, ...]]:
    """Every set of groups that have no site in common, the empty one first."""
    if not groups:
        yield ()
        return
    first, *others = groups
    own = {site.name for site in first.sites}
    for rest in _disjoint(others):
        yield rest
    for rest in _disjoint(others):
        if own.isdisjoint(site.name for group in rest for site in group.sites):
            yield (first, *rest)


def _options(
    name: str,
    ranks: Ranks,
    loss: Losses,
    costs: Sequence[Costs],
    dense: Sequence[float],
    match: Match | Bundle,
) -> list[Option]:
    """A form at the ranks that save enough, in every unit; none if there are no such ranks.

    Ranks at which a form loses more than at a lower one are left out, too: truncation never
    does, but other projections may in a metric that they are not made for.
    """
    worth = np.zeros(len(ranks), dtype=np.bool_)
    for cost, whole in zip(costs, dense, strict=True):
        worth |= cost <= (1 - match.limits.min_saving) * whole
    worth &= np.isfinite(loss)
    if ranks.ndim == 1:
        worth &= loss <= np.minimum.accumulate(loss)
    if not worth.any():
        return []
    codes, lost = encoded(ranks[worth]), loss[worth]
    return [Option(name, codes, lost, cost[worth]) for cost in costs]
