"""The classical baseline: every site keeps the same fraction of its dense cost.

It is what the global budget (:mod:`fxcompress.budget.solver`) is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fxcompress.budget._bundles import AnySite, Problem, allocation_of, check_budget, problem_of
from fxcompress.budget._frontier import total_cost
from fxcompress.budget.problem import Allocation, Bundle, Candidate

# Halvings of [0, 1]: finer than the fractions of two ranks of a site can be apart.
_HALVINGS = 60


def allocate_uniform(
    candidates: Sequence[Candidate], budget: float, bundles: Sequence[Bundle] = ()
) -> Allocation:
    """Give every site (or group, or bundle) the same fraction q of its dense cost.

    Each site takes the choice of least loss that costs at most q times its dense cost; its
    cheapest choice if none is that cheap; dense only at q = 1, or if nothing else is cheaper.
    A bundle is rewritten jointly if that loses less than its members by themselves; if not both
    cost at most q times its dense cost, the cheaper of the two is taken.
    q is found by bisection: at q the total cost is within the budget, at the next number it is
    not.  Without bundles that is the greatest such q in [0, 1]; with them there can be others,
    as a bundle can become cheaper when it changes to its members.  Sites of one shape move
    together, so a part of the budget can stay unspent.

    Args:
        candidates: the sites, with distinct names.
        budget: limit on the total cost, in the unit of the costs.
        bundles: candidates that a joint form may rewrite together, with distinct names.

    Returns:
        The allocation.  Nothing is minimised over the sites together, so there is no multiplier
        (NaN), and the only lower bound known is that no loss is negative (``bound`` 0).

    Raises:
        BudgetError, ValueError: as :func:`fxcompress.budget.allocate`.
    """
    problem = problem_of(candidates, bundles)
    check_budget(problem, budget)
    sites, picks = _at(problem, 1.0)
    if total_cost(sites, picks) > budget:
        below, above = 0.0, 1.0
        sites, picks = _at(problem, 0.0)
        for _ in range(_HALVINGS):
            middle = 0.5 * (below + above)
            tried_sites, tried = _at(problem, middle)
            if total_cost(tried_sites, tried) <= budget:
                below, sites, picks = middle, tried_sites, tried
            else:
                above = middle
    return allocation_of(candidates, sites, picks, budget, multiplier=math.nan, bound=0.0)


def _at(problem: Problem, fraction: float) -> tuple[list[AnySite], list[int]]:
    """The sites in use and their choices at a fraction of the dense cost."""
    picks: dict[AnySite, int] = {site: _pick(site, fraction) for site in problem.all_sites()}
    joint = []
    for bundle in problem.bundles:
        limit = fraction * bundle.dense_cost
        cost, loss = bundle.beyond_apart(picks)
        apart = total_cost(bundle.apart, [picks[site] for site in bundle.apart])
        # The better mode if both are within the fraction, otherwise the cheaper one.
        both = max(apart, bundle.cost_at(picks[bundle])) <= limit
        joint.append((loss, cost) < (0.0, 0.0) if both else (cost, loss) < (0.0, 0.0))
    sites = problem.sites(joint)
    return sites, [picks[site] for site in sites]


def _pick(site: AnySite, fraction: float) -> int:
    """The best choice within a fraction of the dense cost; the cheapest if there is none."""
    limit = fraction * site.dense_cost
    if site.top_cost <= limit:
        return site.last
    return max(int(np.searchsorted(site.cost, limit, side="right")) - 1, 0)
