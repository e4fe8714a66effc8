"""What sites cost in the units of budgets, and the problem that the solver is given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fxcompress.budget import Alternatives, Candidate, Entity, Mode, Option
from fxcompress.forms.target import Losses, Ranks
from fxcompress.pipeline.decomposition import Decomposition
from fxcompress.pipeline.latency import Table, Timing, entries_for, interpolated
from fxcompress.pipeline.sites import Group, encoded
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
    for group in groups:
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

    Several sites are alternatives of two modes: all by themselves, or one candidate with the joint
    forms, which has the name of their group.  Hidden values of equal widths are alternatives
    together: of all sites of all of them, by themselves, or one candidate for each value.

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

    offered = []
    for group in groups:
        dense = [pricing.dense(group) for pricing in pricings]
        offers = []
        for form in group.forms if measured(group) else ():
            if form not in excluded.get(group.name, ()):
                ranks = group.ranks(form)
                costs = [pricing.at(group, form, ranks) for pricing in pricings]
                loss = decomposed.groups[group.name].losses[form]
                offers.append(_options(form, ranks, loss, costs, dense, group.match))
        offered.append((group, dense, offers))
    return [
        tuple(
            _entities(
                {
                    group.name: Candidate(
                        group.name,
                        dense[at],
                        _taken(offers, at),
                        group.equal if measured(group) else None,
                    )
                    for group, dense, offers in offered
                    if len(group.sites) == 1
                },
                [
                    (group, _taken(offers, at))
                    for group, _, offers in offered
                    if len(group.sites) > 1
                ],
            )
        )
        for at in range(len(pricings))
    ]


def _entities(
    candidates: Mapping[str, Candidate], several: Sequence[tuple[Group, tuple[Option, ...]]]
) -> Iterator[Entity]:
    """Sites by themselves, and sites that are in groups of several as alternatives."""
    import networkx as nx  # takes a while, and most uses of the package do without

    links = nx.Graph()
    links.add_nodes_from(candidates)
    wholes = list(_wholes(several))
    for whole in wholes:
        nx.add_path(links, whole.sites)
    for names in nx.connected_components(links):
        own = [whole for whole in wholes if whole.sites[0] in names]
        members = [candidate for name, candidate in candidates.items() if name in names]
        if not own:
            yield from members
            continue
        modes = []
        for chosen in _disjoint(own):
            taken = {site for whole in chosen for site in whole.sites}
            rest = (member for member in members if member.name not in taken)
            name = " + ".join(whole.name for whole in chosen) or "single"
            together = (candidate for whole in chosen for candidate in whole.candidates)
            modes.append(Mode(name, (*rest, *together)))
        yield Alternatives(" | ".join(whole.name for whole in own), tuple(modes))


@dataclass(frozen=True)
class _Whole:
    """Sites that are rewritten together or not at all: a group, or all hidden values of one width.

    Attributes:
        candidates: one for each group.
    """

    name: str
    sites: tuple[str, ...]
    candidates: tuple[Candidate, ...]


def _wholes(several: Sequence[tuple[Group, tuple[Option, ...]]]) -> Iterator[_Whole]:
    """Groups of several sites that have options; those of equal widths only if all have."""
    together: dict[str, list[tuple[Group, tuple[Option, ...]]]] = {}
    for group, options in several:
        key = group.name if group.equal is None else f"group {group.equal}"
        together.setdefault(key, []).append((group, options))
    for name, groups in together.items():
        if all(options for _, options in groups):
            yield _Whole(
                name,
                tuple(site.name for group, _ in groups for site in group.sites),
                tuple(Candidate(g.name, None, options, g.equal) for g, options in groups),
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


def _taken(offers: Sequence[Sequence[Option]], at: int) -> tuple[Option, ...]:
    """The options in one unit; a form without a rank that is worth it offers none."""
    return tuple(offer[at] for offer in offers if offer)


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
