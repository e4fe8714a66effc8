"""The global budget: ``min Σ_l D_l(x_l)  subject to  Σ_l c_l(x_l) <= B`` over all sites at once.

The choice x_l of site l is a form and a rank, or "dense".  This is the multiple-choice knapsack
problem, and it is solved in three steps:

1. *Dual.*  For a multiplier λ >= 0 the sites fall apart: each takes ``argmin D_l + λ·c_l``.  For
   the low-rank form, whose cost is linear, that is hard singular value thresholding with one λ
   for all sites.  Bisection on log λ finds where the total cost crosses the budget.  For every
   λ, ``g(λ) = Σ_l min (D_l + λ·c_l) - λ·B`` is a lower bound on the loss of any allocation
   within the budget; its maximum is the bound that is reported.
2. *Fill.*  The crossing leaves part of the budget unspent.  Single sites are moved up, to any of
   their better choices, always the one with the largest loss reduction per cost, until no
   single move fits.
3. *Search.*  An allocation better than the present one, of gap ``loss - bound``, can give no site
   a choice that is worse by more than the gap than the site's best at λ.  Few choices are left;
   their combinations are searched by dynamic programming over undominated partial allocations.
   It is exact unless the partial allocations outgrow a fixed amount of work.

With n sites of k choices: the dual takes 50 to 70 bisection steps; the first few read all n·k
choices, each later one only what lies between the choices at its two ends, so that time is
O(n·k) unless most choices tie.  The fill reads O(n·k), and O(k) for every move; the search has
a fixed limit.  The arrays of the caller are read in place: the memory needed beyond them is
O(n + k) and what the search holds (at most about 200 MB), and one copy of the arrays of sites
that are in a group, have several forms, or whose cost or loss is not strictly monotone in the
rank.  Ten thousand sites of rank 4096, with linear or concave cost, take 1 to 4 s on one core,
and below 0.1 GB beyond the 0.3 GB of their losses.
"""

from __future__ import annotations

import heapq
import math
import sys
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
from numpy.typing import NDArray

from fxcompress.budget._sites import Site, allocation_of, sites_of, total_cost
from fxcompress.budget.problem import Allocation, Candidate

# Partial allocations that the search may look at, shared out among its sites: about a second.
_SEARCH_LIMIT = 1 << 22


def allocate(candidates: Sequence[Candidate], budget: float) -> Allocation:
    """Choose form and rank of every site so that the total loss is least within the budget.

    The cost of the allocation, summed with :func:`math.fsum`, is never above the budget, and no
    single site (or group) can be given another choice that lowers the loss and keeps within it.
    Equal inputs give equal answers; of equally good choices of a site the cheaper one is taken,
    then "dense", then the first in the order of its options.  In particular a choice without
    loss that costs less than dense is taken whatever the budget.

    Args:
        candidates: the sites, with distinct names.
        budget: limit on the total cost, in the unit of the costs.

    Returns:
        The allocation, its multiplier λ in nats per unit of cost (0 if the budget does not
        bind), and the Lagrangian lower bound.

    Raises:
        BudgetError: if the cheapest choices together exceed the budget (the text holds their
            cost), if the budget is negative or not finite, or if the members of a group have
            no form and rank in common.
        ValueError: if two candidates have one name.
    """
    sites = sites_of(candidates, budget)
    multiplier, picks = _dual(sites, budget)
    bound = _dual_value(sites, multiplier, budget)
    picks = _fill(sites, picks, budget)
    better = _search(sites, picks, budget, multiplier, _total_loss(sites, picks) - bound)
    if better is not None:
        picks = _fill(sites, better, budget)
    return allocation_of(candidates, sites, picks, budget, multiplier=multiplier, bound=bound)


def _total_loss(sites: Sequence[Site], picks: Sequence[int]) -> float:
    """Sum of the losses over all sites, in nats."""
    return math.fsum(site.loss_at(pick) for site, pick in zip(sites, picks, strict=True))


# --- dual -------------------------------------------------------------------------------------


def _dual(sites: Sequence[Site], budget: float) -> tuple[float, list[int]]:
    """Find the multiplier at which the total cost crosses the budget.

    Returns:
        λ in nats per unit of cost, and the choices just above it, which are within the budget.
    """
    cheap = [0] * len(sites)
    costly = [site.last for site in sites]
    if total_cost(sites, costly) <= budget:
        return 0.0, costly
    slopes = [_end_slopes(site) for site in sites if site.last]
    # At `above` every site takes its cheapest choice, at `below` its top.
    above = min(2.0 * max(steepest for steepest, _ in slopes), sys.float_info.max)
    below = max(0.5 * min(flattest for _, flattest in slopes), math.ulp(0.0))
    # As λ falls, a site moves from its cheapest choice to its top and never back.  So what it
    # takes at the two ends encloses what it takes between them, and where both agree the site
    # is settled.  It ends when no number lies between the two.
    open_sites = [at for at, site in enumerate(sites) if site.last]
    while below < (middle := math.sqrt(below) * math.sqrt(above)) < above:
        picks = cheap.copy()
        for at in open_sites:
            picks[at] = _pick(sites[at], middle, cheap[at], costly[at])
        if total_cost(sites, picks) <= budget:
            above, cheap = middle, picks
        else:
            below, costly = middle, picks
        open_sites = [at for at in open_sites if cheap[at] < costly[at]]
    return above, cheap


def _end_slopes(site: Site) -> tuple[float, float]:
    """Greatest and least multiplier at which a site is about to move, in nats per unit of cost.

    They are the slopes of the first and the last edge of the lower convex hull of its choices.
    """
    to_top = site.loss / (site.top_cost - site.cost)
    from_first = (site.loss[0] - site.loss[1:]) / (site.cost[1:] - site.cost[0])
    steepest = max(float(to_top[0]), float(from_first.max(initial=0.0)))
    return steepest, float(to_top.min())


def _pick(site: Site, multiplier: float, first: int, last: int) -> int:
    """The choice from ``first`` to ``last`` with the least ``loss + λ·cost``, then least cost."""
    if first == site.last:
        return first
    value = site.cost[first : last + 1] * multiplier
    value += site.loss[first : last + 1]
    at = int(value.argmin())
    if last == site.last and multiplier * site.top_cost < value[at]:
        return last
    return first + at


def _dual_value(sites: Sequence[Site], multiplier: float, budget: float) -> float:
    """g(λ), a lower bound on the loss in nats; every choice of every site is looked at afresh."""
    picks = [_pick(site, multiplier, 0, site.last) for site in sites]
    # Costs and budget are subtracted before they are scaled: at a large λ little is left of both.
    excess = math.fsum([total_cost(sites, picks), -budget])
    return _total_loss(sites, picks) + multiplier * excess


# --- fill -------------------------------------------------------------------------------------


def _fill(sites: Sequence[Site], picks: Sequence[int], budget: float) -> list[int]:
    """Move single sites to better choices while any fits, best loss reduction per cost first."""
    picks = list(picks)
    # Exact, so that "fits" means that math.fsum over all costs is within the budget: like
    # math.fsum, the conversion of a fraction to a float is correctly rounded.
    spent = sum((_exact(site, pick) for site, pick in zip(sites, picks, strict=True)), Fraction(0))

    def best_move(at: int) -> tuple[float, int, int] | None:
        """(loss change per cost, site, choice) of the best move of one site that fits."""
        site, pick = sites[at], picks[at]
        if pick == site.last:
            return None
        cost, loss = site.cost_at(pick), site.loss_at(pick)
        others = spent - _exact(site, pick)
        # A few units in the last place too many, then back to what truly fits.
        limit = cost + float(Fraction(budget) - spent) + 4.0 * math.ulp(budget)
        if limit >= site.top_cost:
            end = site.last
        else:
            end = int(np.searchsorted(site.cost, limit, side="right")) - 1
        while end > pick and float(others + _exact(site, end)) > budget:
            end -= 1
        if end == pick:
            return None
        between = slice(pick + 1, end + 1)
        rates = (site.loss[between] - loss) / (site.cost[between] - cost)
        moves = [(float(rates.min()), at, pick + 1 + int(rates.argmin()))] if rates.size else []
        if end == site.last:
            moves.append((-loss / (site.top_cost - cost), at, end))
        return min(moves)

    moves = [move for at in range(len(sites)) if (move := best_move(at)) is not None]
    heapq.heapify(moves)
    while moves:
        _, at, choice = moves[0]
        after = spent - _exact(sites[at], picks[at]) + _exact(sites[at], choice)
        # The budget left has shrunk since the move was proposed: it may not fit any more.
        if float(after) <= budget:
            spent, picks[at] = after, choice
        following = best_move(at)
        if following is None:
            heapq.heappop(moves)
        else:
            heapq.heapreplace(moves, following)
    return picks


def _exact(site: Site, choice: int) -> Fraction:
    """Cost of a choice, without rounding."""
    return sum(map(Fraction, site.costs(choice)), Fraction(0))


# --- search -----------------------------------------------------------------------------------


def _search(
    sites: Sequence[Site], picks: Sequence[int], budget: float, multiplier: float, gap: float
) -> list[int] | None:
    """Look for a better allocation among the few choices that one can contain.

    Args:
        picks: the choices at hand, within the budget.
        multiplier: λ of the dual, in nats per unit of cost.
        gap: loss of ``picks`` minus the dual value at λ, in nats.

    Returns:
        Choices with a lower loss, within the budget; None if none were found.
    """
    # Regret: how much worse than the site's best a choice is at λ.  The loss of an allocation
    # within the budget is at least the dual value plus its regrets.  The margin is for rounding.
    allowed = max(gap, 0.0) * (1.0 + 1e-9)
    contested: list[tuple[int, NDArray[np.int64], NDArray[np.float64]]] = []
    for at, site in enumerate(sites):
        value = site.loss + multiplier * site.cost
        regret = np.append(value, multiplier * site.top_cost)
        regret -= regret.min()
        choices = np.flatnonzero(regret <= allowed)
        if choices.size > 1 or choices[0] != picks[at]:
            contested.append((at, choices, regret[choices]))
    # Small ones first, while the list of partial allocations grows.
    contested.sort(key=lambda entry: entry[1].size)

    # Partial allocations over the contested sites so far, relative to `picks`.
    costs, losses, regrets = np.zeros(1), np.zeros(1), np.zeros(1)
    steps: list[tuple[int, NDArray[np.int64], NDArray[np.int64]]] = []
    for at, choices, regret in contested:
        site, pick = sites[at], picks[at]
        room = max(1, _SEARCH_LIMIT // (len(contested) * choices.size))
        if costs.size > room:
            kept = np.sort(np.argsort(regrets, kind="stable")[:room])
            costs, losses, regrets = costs[kept], losses[kept], regrets[kept]
        else:
            kept = np.arange(costs.size)
        listed = choices.tolist()
        cost = np.array([site.cost_at(choice) for choice in listed]) - site.cost_at(pick)
        loss = np.array([site.loss_at(choice) for choice in listed]) - site.loss_at(pick)
        costs = np.add.outer(costs, cost).ravel()
        losses = np.add.outer(losses, loss).ravel()
        regrets = np.add.outer(regrets, regret).ravel()
        # By cost, each costlier one better than all before; none that regrets too much.
        order = np.flatnonzero(regrets <= allowed)
        order = order[np.lexsort((losses[order], costs[order]))]
        least = np.minimum.accumulate(losses[order])
        order = order[np.append(True, least[1:] < least[:-1])]
        costs, losses, regrets = costs[order], losses[order], regrets[order]
        steps.append((at, kept[order // choices.size], choices[order % choices.size]))

    present = _total_loss(sites, picks)
    # The costliest that fits is the best: losses fall along the list.
    left = math.fsum([budget, -total_cost(sites, picks)]) + 4.0 * math.ulp(budget)
    for end in range(int(np.searchsorted(costs, left, side="right")) - 1, -1, -1):
        found, state = list(picks), end
        for at, parents, chosen in reversed(steps):
            found[at] = int(chosen[state])
            state = int(parents[state])
        if _total_loss(sites, found) >= present:
            return None
        if total_cost(sites, found) <= budget:
            return found
    return None
