"""What sites cost in the units of budgets, and the problem that the solver is given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, Protocol

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
    which has the name of their group, or a hidden value of some width and what that leaves.  Hidden
    values of equal widths are alternatives together, of all sites of all of them.

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
            return Candidate(group.name, None, options, group.equal)
        equal = group.equal if measured(group) and not group.narrowing else None
        return Candidate(group.name, pricings[at].dense(group), options, equal)

    def ways(group: Group, at: int) -> dict[str, Mode]:
        """Several sites as one, or what is left of them at widths of a hidden value."""
        if not offered[group.name]:
            return {}
        found = {"": Mode(group.name, (candidate(group, at),))}
        for left in group.narrowed:
            to = left[0].narrowing
            assert to is not None
            loss = narrowing_loss(group, decomposed.groups[group.name], to.form, to.width)
            given_up = to.form in excluded.get(group.name, ())
            if any(offered[each.name] for each in left) and np.isfinite(loss) and not given_up:
                text = f"{to.form} {to.width}"
                members = tuple(candidate(each, at) for each in left)
                found[text] = Mode(f"{group.name}, {text}", members, loss)
        return found

    several = [group for group in groups if len(group.sites) > 1]
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
    candidates: Mapping[str, Candidate], several: Sequence[tuple[Group, Mapping[str, Mode]]]
) -> Iterator[Entity]:
    """Sites by themselves, and sites that are in groups of several as alternatives.

    Args:
        candidates: of the sites.
        several: groups, each with what may be chosen for it instead of its sites by themselves.
    """
    import networkx as nx  # takes a while, and most uses of the package do without

    wholes = list(_wholes(several))
    links = _linked(candidates, wholes)
    crowded = [names for names in nx.connected_components(links) if _own(names, wholes)[MOST:]]
    if crowded:
        left = [_apart(_own(names, wholes)) for names in crowded]
        full = {name for names in crowded for name in names}
        wholes = [whole for whole in wholes if whole.sites[0] not in full]
        wholes += [whole for apart in left for whole in apart]
        links = _linked(candidates, wholes)
    for names in nx.connected_components(links):
        own = _own(names, wholes)
        members = [candidate for name, candidate in candidates.items() if name in names]
        if not own:
            yield from members
            continue
        modes = []
        for chosen in _disjoint(own):
            taken = {site for whole in chosen for site in whole.sites}
            rest = tuple(member for member in members if member.name not in taken)
            for way in product(*(whole.modes for whole in chosen)):
                name = " + ".join(mode.name for mode in way) or "single"
                inside = (*rest, *(member for mode in way for member in mode.members))
                modes.append(Mode(name, inside, sum(mode.loss for mode in way)))
        yield Alternatives(" | ".join(whole.name for whole in own), tuple(modes))


MOST = 8
"""Groups that overlap one another, of which every combination is offered to the solver.

In a chain of convolutions each is the consumer of one hidden value and makes the next one: the
combinations grow with the golden ratio.  Of longer chains every second value is offered.
"""


def _linked(candidates: Collection[str], wholes: Sequence[_Whole]) -> Any:
    """A graph of sites, those linked that are rewritten together."""
    import networkx as nx

    links = nx.Graph()
    links.add_nodes_from(candidates)
    for whole in wholes:
        nx.add_path(links, whole.sites)
    return links


def _own(names: Collection[str], wholes: Sequence[_Whole]) -> list[_Whole]:
    """The groups whose sites are among some that are connected."""
    return [whole for whole in wholes if whole.sites[0] in names]


def _apart(wholes: Sequence[_Whole]) -> list[_Whole]:
    """Some of them without a site in common, in graph order: the first, and whatever is free."""
    taken: set[str] = set()
    found = []
    for whole in wholes:
        if taken.isdisjoint(whole.sites):
            found.append(whole)
            taken |= {*whole.sites}
    return found


@dataclass(frozen=True)
class _Whole:
    """Sites that are rewritten together or not at all: a group, or all hidden values of one width.

    Attributes:
        modes: in which that can be done.
    """

    name: str
    sites: tuple[str, ...]
    modes: tuple[Mode, ...]


def _wholes(several: Sequence[tuple[Group, Mapping[str, Mode]]]) -> Iterator[_Whole]:
    """Groups of several sites that have modes; those of equal widths only if all have."""
    together: dict[str, list[tuple[Group, Mapping[str, Mode]]]] = {}
    for group, modes in several:
        key = group.name if group.equal is None else f"group {group.equal}"
        together.setdefault(key, []).append((group, modes))
    for name, groups in together.items():
        common = [key for key in groups[0][1] if all(key in modes for _, modes in groups)]
        if not common:
            continue
        joined = []
        for key in common:
            own = [modes[key] for _, modes in groups]
            members = tuple(member for mode in own for member in mode.members)
            text = own[0].name if len(own) == 1 else f"{name} {key}".rstrip()
            joined.append(Mode(text, members, sum(mode.loss for mode in own)))
        yield _Whole(
            name, tuple(site.name for group, _ in groups for site in group.sites), tuple(joined)
        )


def _disjoint(wholes: Sequence[_Whole]) -> Iterator[tuple[_Whole, ...]]:
    """Every set of them that have no site in common, the empty one first."""
    if not wholes:
        yield ()
        return
    first, *others = wholes
    for rest in _disjoint(others):
        yield rest
    for rest in _disjoint(others):
        if {*first.sites}.isdisjoint(site for whole in rest for site in whole.sites):
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
