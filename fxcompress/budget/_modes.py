"""Search over the modes of bundles: rewritten as a whole, or each member by itself.

An allocation better than the present one, of gap ``loss - bound``, has no bundle in a mode that
is worse by more than the gap at λ.  That fixes the modes of most bundles.  Each of the others is
merged into one site, whose choices are those of both modes that such an allocation can contain;
then it is the search over single sites again, and as exact.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from fxcompress.budget._bundles import AnySite, JointSite, Problem
from fxcompress.budget._frontier import Frontier, total_cost, total_loss, undominated
from fxcompress.budget._search import SEARCH_LIMIT, Partials, allowed_regret, contested, search

# One choice of one mode of a bundle: the sites in use, and what each takes.
Way: TypeAlias = tuple[tuple[AnySite, int], ...]


@dataclass(frozen=True, eq=False)
class _Merged(Frontier):
    """A bundle with choices of both modes.

    Attributes:
        ways: what each choice stands for, the top included.
        start: the choice that is no worse than the present one.
    """

    ways: tuple[Way, ...]
    start: int

    def costs(self, index: int) -> tuple[float, ...]:
        return tuple(cost for site, pick in self.ways[index] for cost in site.costs(pick))


def search_modes(
    problem: Problem,
    present: Mapping[AnySite, int],
    budget: float,
    multiplier: float,
    bound: float,
) -> dict[AnySite, int] | None:
    """Look for an allocation that is better with other modes.

    Args:
        present: the sites in use and their choices, within the budget.
        multiplier: λ of the dual, in nats per unit of cost.
        bound: the dual value at λ, in nats.

    Returns:
        Sites and choices with a lower loss, within the budget; None if none were found.
    """
    loss = total_loss(list(present), list(present.values()))
    allowed = allowed_regret(loss, bound)
    leads = {bundle: _lead(bundle, multiplier) for bundle in problem.bundles}
    doubtful = [bundle for bundle in problem.bundles if abs(leads[bundle]) <= allowed]
    if not doubtful:
        return None
    limit = SEARCH_LIMIT // len(doubtful)
    settled = dict(present)
    merged = []
    for bundle in doubtful:
        now = tuple((site, settled.pop(site)) for site in bundle.either if site in settled)
        merged.append(_merge(bundle, now, multiplier, leads[bundle], allowed, limit))
    sites = [*settled, *merged]
    start = [*settled.values(), *(bundle.start for bundle in merged)]
    found = search(sites, start, budget, multiplier, present=loss, bound=bound)
    if found is None:
        return None
    better = dict(zip(settled, found, strict=False))
    for each, pick in zip(merged, found[len(settled) :], strict=True):
        better.update(each.ways[pick])
    return better


def _lead(bundle: JointSite, multiplier: float) -> float:
    """How much better the members by themselves are at λ than the whole, in nats."""
    best = {site: site.best(multiplier) for site in bundle.either}
    cost, loss = bundle.beyond_apart(best)
    return loss + multiplier * cost


def _merge(
    bundle: JointSite, now: Way, multiplier: float, lead: float, allowed: float, limit: int
) -> _Merged:
    """One site for both modes, with the choices that regret at most ``allowed``, in nats.

    Args:
        now: the present choice, which is among the choices or beaten by one of them.
        lead: of the members by themselves, in nats.
        limit: how many combinations may be looked at.
    """
    # What each mode regrets even at its best.
    regret_apart, regret_whole = max(-lead, 0.0), max(lead, 0.0)
    partials = Partials()
    for site in bundle.apart:
        choices, regret = contested(site, multiplier, allowed - regret_apart)
        listed = choices.tolist()
        partials.extend(
            choices,
            np.array([site.cost_at(choice) for choice in listed]),
            np.array([site.loss_at(choice) for choice in listed]),
            regret,
            allowed=allowed - regret_apart,
            limit=limit // len(bundle.apart),
        )
    whole, regret = contested(bundle, multiplier, allowed - regret_whole)
    whole, regret = whole[whole < bundle.last], regret[whole < bundle.last]
    sites, picks = zip(*now, strict=True)
    present = total_cost(sites, picks)
    costs = np.concatenate([[present], partials.costs, bundle.cost[whole]])
    losses = np.concatenate([[total_loss(sites, picks)], partials.losses, bundle.loss[whole]])
    regrets = np.concatenate([[0.0], partials.regrets + regret_apart, regret + regret_whole])
    # As many as leave the search equal room for choices and for partial allocations; the present
    # one is always among them.
    room = max(1, math.isqrt(limit))
    kept = np.sort(np.argsort(regrets, kind="stable")[:room])
    kept = kept[losses[kept] > 0.0]
    kept = kept[undominated(costs[kept], losses[kept], bundle.top_cost)]

    def way(at: int) -> Way:
        if at == 0:
            return now
        if at > partials.costs.size:
            return ((bundle, int(whole[at - 1 - partials.costs.size])),)
        return tuple(zip(reversed(bundle.apart), partials.choices(at - 1), strict=True))

    return _Merged(
        costs[kept],
        losses[kept],
        bundle.top_cost,
        ways=(*map(way, kept.tolist()), ((bundle, bundle.last),)),
        # The costliest choice that costs no more than the present one, hence is no worse.
        start=max(int(np.searchsorted([*costs[kept], bundle.top_cost], present, "right")) - 1, 0),
    )
