"""What sites cost in the units of budgets, and the problem that the solver is given."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from fxcompress.budget import Bundle as BudgetBundle
from fxcompress.budget import Candidate, Option
from fxcompress.forms.target import Losses, Ranks
from fxcompress.pipeline.decomposition import Decomposition
from fxcompress.pipeline.latency import Entry, Table, entries_for, interpolated
from fxcompress.pipeline.sites import CountUnit, Site, SiteBundle, encoded
from fxcompress.rules import Bundle, Match

Costs = NDArray[np.float64]


class Pricing(Protocol):
    """What operators cost in one unit, in the recorded example where it depends on one."""

    def dense(self, site: Site) -> float:
        """A site as it is."""

    def single(self, site: Site, form: str, ranks: Ranks) -> Costs:
        """A site at ranks of a form of its own."""

    def joint(self, bundle: SiteBundle, form: str, ranks: Ranks) -> Costs:
        """Sites at ranks of a joint form, all together."""


@dataclass(frozen=True)
class Counted:
    """Parameters, multiply-accumulates or bytes: exact."""

    unit: CountUnit

    def dense(self, site: Site) -> float:
        """A site as it is."""
        return float(getattr(site.dense_size(), self.unit))

    def single(self, site: Site, form: str, ranks: Ranks) -> Costs:
        """A site at ranks of a form of its own."""
        return site.counts(form, ranks)[self.unit].astype(np.float64)

    def joint(self, bundle: SiteBundle, form: str, ranks: Ranks) -> Costs:
        """Sites at ranks of a joint form, all together."""
        return bundle.counts(form, ranks)[self.unit].astype(np.float64)


@dataclass(frozen=True, eq=False)
class Timed:
    """Seconds, as measured on this machine.

    Attributes:
        times: by the keys of :class:`fxcompress.pipeline.latency.Entry`.
    """

    times: Mapping[str, float]

    def dense(self, site: Site) -> float:
        """A site as it is."""
        return self.times[Entry((site.shape,)).key]

    def single(self, site: Site, form: str, ranks: Ranks) -> Costs:
        """A site at ranks of a form of its own."""
        chosen, permitted = site.forms[form], site.ranks(form)
        return interpolated(self.times, (site.shape,), chosen, permitted, ranks)

    def joint(self, bundle: SiteBundle, form: str, ranks: Ranks) -> Costs:
        """Sites at ranks of a joint form, all together."""
        chosen, permitted = bundle.forms[form], bundle.ranks(form)
        return interpolated(self.times, bundle.shapes, chosen, permitted, ranks)


def timed(
    sites: Sequence[Site],
    bundles: Sequence[SiteBundle],
    device: torch.device,
    table: Table,
    tick: Callable[[], None],
) -> Timed:
    """Measure whatever of sites and bundles the table does not have.

    Args:
        sites, bundles: with all their forms.
        device: that the model is on.
        table: of times that are known.
        tick: called as the measurement goes on.
    """
    entries: list[Entry] = []
    for site in sites:
        entries.append(Entry((site.shape,)))
        for name, form in site.forms.items():
            if len(ranks := site.ranks(name)):
                entries += entries_for((site.shape,), form, ranks)
    for bundle in bundles:
        for name, joint in bundle.forms.items():
            if len(ranks := bundle.ranks(name)):
                entries += entries_for(bundle.shapes, joint, ranks)
    return Timed(table.measure(entries, device, tick))


@dataclass(frozen=True, eq=False)
class Problem:
    """Sites and bundles as the solver sees them, with their costs in one unit.

    Attributes:
        candidates: one per site, in their order.
        bundles: one per bundle.
    """

    candidates: tuple[Candidate, ...]
    bundles: tuple[BudgetBundle, ...]


def problems(
    sites: Sequence[Site],
    bundles: Sequence[SiteBundle],
    decomposed: Decomposition,
    pricings: Sequence[Pricing],
    excluded: Mapping[str, Collection[str]],
) -> list[Problem]:
    """The same choices with their costs in each of several units.

    A rank is offered if it saves as much as its rule asks for in one of the units; none of a
    site without a measured influence on the output, unless its rule asks for that.

    Args:
        sites, bundles: to choose for.
        decomposed: what their forms lose.
        pricings: one for each unit.
        excluded: forms that are not to be chosen, by the name of a site or bundle.
    """
    idle = {*decomposed.idle}

    def measured(site: Site) -> bool:
        return site.name not in idle or site.match.limits.unmeasured

    singles = []
    for site in sites:
        dense = [pricing.dense(site) for pricing in pricings]
        offers = []
        for form in site.forms if measured(site) else ():
            if form not in excluded.get(site.name, ()):
                ranks = site.ranks(form)
                costs = [pricing.single(site, form, ranks) for pricing in pricings]
                loss = decomposed.sites[site.name].losses[form]
                offers.append(_options(form, ranks, loss, costs, dense, site.match))
        singles.append((site, dense, offers))
    joints = []
    for bundle in bundles:
        dense = [sum(pricing.dense(site) for site in bundle.sites) for pricing in pricings]
        offers = []
        for form in bundle.forms:
            if form not in excluded.get(bundle.name, ()):
                ranks = bundle.ranks(form)
                costs = [pricing.joint(bundle, form, ranks) for pricing in pricings]
                loss = decomposed.bundles[bundle.name].losses[form]
                offers.append(_options(form, ranks, loss, costs, dense, bundle.match))
        joints.append((bundle, offers))
    return [
        Problem(
            tuple(
                Candidate(
                    site.name,
                    dense[at],
                    _taken(offers, at),
                    site.match.group if measured(site) else None,
                )
                for site, dense, offers in singles
            ),
            tuple(
                BudgetBundle(bundle.name, tuple(s.name for s in bundle.sites), _taken(offers, at))
                for bundle, offers in joints
            ),
        )
        for at in range(len(pricings))
    ]


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
