"""The classical baseline: every site keeps the same fraction of its dense cost.

It is what the global budget (:mod:`fxcompress.budget.solver`) is compared with.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fxcompress.budget._sites import Site, allocation_of, sites_of, total_cost
from fxcompress.budget.problem import Allocation, Candidate

# Halvings of [0, 1]: finer than the fractions of two ranks of a site can be apart.
_HALVINGS = 60


def allocate_uniform(candidates: Sequence[Candidate], budget: float) -> Allocation:
    """Give every site (or group) the same fraction q of its dense cost.

    Each site takes the choice of least loss that costs at most q times its dense cost; its
    cheapest choice if none is that cheap; dense only at q = 1, or if nothing else is cheaper.
    q is the greatest fraction in [0, 1], found by bisection, at which the total cost is within
    the budget.  Sites of one shape move together, so a part of the budget can stay unspent.

    Args:
        candidates: the sites, with distinct names.
        budget: limit on the total cost, in the unit of the costs.

    Returns:
        The allocation.  Nothing is minimised over the sites together, so there is no multiplier
        (NaN), and the only lower bound known is that no loss is negative (``bound`` 0).

    Raises:
        BudgetError, ValueError: as :func:`fxcompress.budget.allocate`.
    """
    sites = sites_of(candidates, budget)
    picks = [_pick(site, 1.0) for site in sites]
    if total_cost(sites, picks) > budget:
        below, above = 0.0, 1.0
        picks = [0] * len(sites)
        for _ in range(_HALVINGS):
            middle = 0.5 * (below + above)
            tried = [_pick(site, middle) for site in sites]
            if total_cost(sites, tried) <= budget:
                below, picks = middle, tried
            else:
                above = middle
    return allocation_of(candidates, sites, picks, budget, multiplier=math.nan, bound=0.0)


def _pick(site: Site, fraction: float) -> int:
    """The best choice within a fraction of the dense cost; the cheapest if there is none."""
    limit = fraction * math.fsum(member.dense_cost for member in site.members)
    if site.top_cost <= limit:
        return site.last
    return max(int(np.searchsorted(site.cost, limit, side="right")) - 1, 0)
