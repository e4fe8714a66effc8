"""The global budget: ``min Σ_l D_l(x_l)  subject to  Σ_l c_l(x_l) <= B`` over all sites at once.

The choice x_l of site l is a form and a rank, or "dense"; a bundle is one site with a joint
choice, or as many as it has members.  This is the multiple-choice knapsack problem, and it is
solved in four steps:

1. *Dual.*  For a multiplier λ >= 0 the sites fall apart: each takes ``argmin D_l + λ·c_l``.  For
   the low-rank form, whose cost is linear, that is hard singular value thresholding with one λ
   for all sites.  Bisection on log λ finds where the total cost crosses the budget.  For every
   λ, ``g(λ) = Σ_l min (D_l + λ·c_l) - λ·B`` is a lower bound on the loss of any allocation
   within the budget; its maximum is the bound that is reported.  A bundle contributes the lesser
   of its joint minimum and the sum of its members' minima, so that the bound holds for joint
   and separate allocations alike.  Which of the two it is fixes the mode of the bundle.
2. *Fill.*  The crossing leaves part of the budget unspent.  Single sites are moved up, to any of
   their better choices, always the one with the largest loss reduction per cost, until no
   single move fits.
3. *Search.*  An allocation better than the present one, of gap ``loss - bound``, can give no site
   a choice that is worse by more than the gap than the site's best at λ.  Few choices are left;
   their combinations are searched by dynamic programming over undominated partial allocations.
   It is exact unless the partial allocations outgrow a fixed amount of work.
4. *Modes.*  The gap left leaves few bundles in doubt about their mode.  Each of them is merged
   into one site with the choices of both modes, and step 3 is repeated, as exact as before.

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
from collections.abc import Mapping, Sequence
from fractions import Fraction

import numpy as np

from fxcompress.budget._bundles import AnySite, Problem, allocation_of, check_budget, problem_of
from fxcompress.budget._frontier import Frontier, total_cost, total_loss
from fxcompress.budget._modes import search_modes
from fxcompress.budget._search import search
from fxcompress.budget.problem import Allocation, Bundle, Candidate


def allocate(
    candidates: Sequence[Candidate], budget: float, bundles: Sequence[Bundle] = ()
) -> Allocation:
    """Choose form and rank of every site so that the total loss is least within the budget.

    The cost of the allocation, summed with :func:`math.fsum`, is never above the budget, and no
    single site (or group, or bundle rewritten jointly) can be given another choice that lowers
    the loss and keeps within it.
    Equal inputs give equal answers; of equally good choices of a site the cheaper one is taken,
    then "dense", then the first in the order of its options.  In particular a choice without
    loss that costs less than dense is taken whatever the budget.

    Args:
        candidates: the sites, with distinct names.
        budget: limit on the total cost, in the unit of the costs.
        bundles: candidates that a joint form may rewrite together, with distinct names.

    Returns:
        The allocation, its multiplier λ in nats per unit of cost (0 if the budget does not
        bind), and the Lagrangian lower bound.

    Raises:
        BudgetError: if the cheapest choices together exceed the budget (the text holds their
            cost), if the budget is negative or not finite, or if the members of a group have
            no form and rank in common.
        ValueError: if two candidates or two bundles have one name, or a member of a bundle is
            unknown, in a second bundle, or in a group.
    """
    problem = problem_of(candidates, bundles)
    check_budget(problem, budget)
    multiplier, joint, at_multiplier = _dual(problem, budget)
    bound = _dual_value(problem, multiplier, budget)
    sites = problem.sites(joint)
    picks = _fill(sites, [at_multiplier[site] for site in sites], budget)
    present = total_loss(sites, picks)
    better = search(sites, picks, budget, multiplier, present=present, bound=bound)
    if better is not None:
        picks = _fill(sites, better, budget)
    other = search_modes(problem, dict(zip(sites, picks, strict=True)), budget, multiplier, bound)
    if other is not None:
        sites = list(other)
        picks = _fill(sites, list(other.values()), budget)
    return allocation_of(candidates, sites, picks, budget, multiplier=multiplier, bound=bound)


# --- dual -------------------------------------------------------------------------------------


def _dual(problem: Problem, budget: float) -> tuple[float, list[bool], dict[AnySite, int]]:
    """Find the multiplier at which the total cost crosses the budget.

    Returns:
        λ in nats per unit of cost, and just above it the modes of the bundles and the choices of
        the sites of both modes.  Those in use are within the budget.
    """
    sites = problem.all_sites()
    cheap: dict[AnySite, int] = dict.fromkeys(sites, 0)
    costly: dict[AnySite, int] = {site: site.last for site in sites}
    tops = problem.best_modes(costly, 0.0)
    if _cost(problem, tops, costly) <= budget:
        return 0.0, tops, costly
    modes = problem.cheapest_modes()
    slopes = [_end_slopes(site) for site in sites if site.last]
    steepest = [first for first, _ in slopes]
    # The edge from the cheapest choice of a bundle to the cheapest of its other mode.
    for bundle in problem.bundles:
        cost, loss = bundle.beyond_apart(cheap)
        if cost < 0.0 < loss or loss < 0.0 < cost:
            steepest.append(-loss / cost)
    # At `above` every site takes its cheapest choice, at `below` its top.
    above = min(2.0 * max(steepest), sys.float_info.max)
    below = max(0.5 * min(flattest for _, flattest in slopes), math.ulp(0.0))
    # As λ falls, a site moves from its cheapest choice to its top and never back.  So what it
    # takes at the two ends encloses what it takes between them, and where both agree the site
    # is settled.  It ends when no number lies between the two.
    open_sites = [site for site in sites if site.last]
    while below < (middle := math.sqrt(below) * math.sqrt(above)) < above:
        picks = cheap.copy()
        for site in open_sites:
            picks[site] = site.best(middle, cheap[site], costly[site])
        tried = problem.best_modes(picks, middle)
        if _cost(problem, tried, picks) <= budget:
            above, modes, cheap = middle, tried, picks
        else:
            below, costly = middle, picks
        open_sites = [site for site in open_sites if cheap[site] < costly[site]]
    return above, modes, cheap


def _cost(problem: Problem, joint: Sequence[bool], picks: Mapping[AnySite, int]) -> float:
    sites = problem.sites(joint)
    return total_cost(sites, [picks[site] for site in sites])


def _end_slopes(site: Frontier) -> tuple[float, float]:
    """Greatest and least multiplier at which a site is about to move, in nats per unit of cost.

    They are the slopes of the first and the last edge of the lower convex hull of its choices.
    """
    to_top = site.loss / (site.top_cost - site.cost)
    from_first = (site.loss[0] - site.loss[1:]) / (site.cost[1:] - site.cost[0])
    steepest = max(float(to_top[0]), float(from_first.max(initial=0.0)))
    return steepest, float(to_top.min())


def _dual_value(problem: Problem, multiplier: float, budget: float) -> float:
    """g(λ), a lower bound on the loss in nats; every choice of every site is looked at afresh."""
    best = {site: site.best(multiplier) for site in problem.all_sites()}
    sites = problem.sites(problem.best_modes(best, multiplier))
    picks = [best[site] for site in sites]
    # Costs and budget are subtracted before they are scaled: at a large λ little is left of both.
    excess = math.fsum([total_cost(sites, picks), -budget])
    return total_loss(sites, picks) + multiplier * excess


# --- fill -------------------------------------------------------------------------------------


def _fill(sites: Sequence[Frontier], picks: Sequence[int], budget: float) -> list[int]:
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


def _exact(site: Frontier, choice: int) -> Fraction:
    """Cost of a choice, without rounding."""
    return sum(map(Fraction, site.costs(choice)), Fraction(0))
