"""The global budget: ``min Σ_l D_l(x_l)  subject to  Σ_l c_l(x_l) <= B`` over all sites at once.

The choice x_l of site l is a form and a rank, or "dense"; of alternatives it is a mode, with a
choice for each of its members.  This is the multiple-choice knapsack problem, solved in three
steps:

1. *Dual* (:mod:`fxcompress.budget._dual`).  For a multiplier λ >= 0 the sites fall apart: each
   takes ``argmin D_l + λ·c_l``.  For the low-rank form, whose cost is linear, that is hard singular
   value thresholding with one λ for all sites.  For every λ,
   ``g(λ) = Σ_l min (D_l + λ·c_l) - λ·B`` is a lower bound on the loss of any allocation within the
   budget; its maximum is the bound that is reported.  A mode contributes its own loss and cost and
   the minima of its members, alternatives the least of their modes.
2. *Fill* (:mod:`fxcompress.budget._fill`).  The dual leaves part of the budget unspent.  Single
   sites are moved up, to any of their better choices, always the one with the largest loss
   reduction per cost, until no single move fits.
3. *Integer rest* (:mod:`fxcompress.budget._core`, :mod:`fxcompress.budget._integer`).  An
   allocation better than the present one, of gap ``loss - bound``, can give no site a choice that
   is worse by more than the gap than the site's best at λ.  The few hundred choices that are
   nearest to it go to an integer programme, four times as many to the next one; a better
   allocation makes the gap smaller.  It ends when the gap allows nothing that was left out, or
   nothing better is found.  It is exact if a programme held all that the gap allows, and its search
   did not outgrow a fixed number of nodes.  There is no limit on time, so that equal inputs give
   equal answers on any machine.

With n sites of k choices: the dual reads all n·k choices about ten times, those of sites that are
settled no more.  The arrays of the caller are read in place: the memory needed beyond them is
O(n + k) and what the core holds, and one copy of the arrays of sites that are in a group, have
several forms, or whose cost or loss is not strictly monotone in the rank.  On one core, 210 to
1,000 sites of rank 576 to 1,024, single, in groups or with joint forms, take 0.1 to 3 s, for the
most part in the integer programmes, and end 1e-9 to 2e-4 of the loss above the bound.  Ten thousand
sites of rank 4,096 take 7 s, and below 0.1 GB beyond the 0.3 GB of their losses.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from fxcompress.budget._core import Core, core_of
from fxcompress.budget._dual import Dual, maximum
from fxcompress.budget._fill import filled, settled
from fxcompress.budget._integer import solved
from fxcompress.budget._knapsack import (
    Knapsack,
    Pick,
    allocation_of,
    check_budget,
    knapsack_of,
)
from fxcompress.budget.problem import Allocation, Entity

SIZES = (200, 800, 3200)
"""Choices that integer programmes are about, one after the other while they find something better;
the best of each site is not counted."""

NODES = 200
"""Nodes of the search tree of one integer programme."""


def allocate(entities: Sequence[Entity], budget: float) -> Allocation:
    """Choose form and rank of every site so that the total loss is least within the budget.

    The cost of the allocation, summed with :func:`math.fsum`, is never above the budget, and no
    single candidate (or group) can be given another choice that lowers the loss and keeps within
    it.  Equal inputs give equal answers; of equally good choices of a site the cheaper one is
    taken, then "dense", then the first in the order of its options.  In particular a choice without
    loss that costs less than dense is taken whatever the budget.

    Args:
        entities: the sites, and the alternatives for some of them together.
        budget: limit on the total cost, in the unit of the costs.

    Returns:
        The allocation, its multiplier λ in nats per unit of cost (0 if the budget does not
        bind), and the Lagrangian lower bound.

    Raises:
        BudgetError: if the cheapest choices together exceed the budget (the text holds their
            cost), if the budget is negative or not finite, or if the members of a group have
            no form and rank in common.
        ValueError: if two candidates or two alternatives have one name.
    """
    knapsack = knapsack_of([entities], [budget])
    check_budget(knapsack)
    dual = maximum(knapsack)
    picks = completed(knapsack, dual)
    assert picks is not None  # the dual of one budget has an allocation to start from
    return allocation_of(entities, knapsack, picks, multiplier=dual.prices[0], bound=dual.bound)


def completed(knapsack: Knapsack, dual: Dual) -> list[Pick] | None:
    """The least loss within the budgets, given the maximum of the dual; None if none was found."""
    picks = dual.picks
    for size in SIZES:
        core, picks = _filled(knapsack, dual, picks)
        gap = None if picks is None else knapsack.loss(picks) - dual.bound
        if picks is not None and core.allowed <= 1e-14 * knapsack.loss(picks):
            return picks
        regrets = core.regrets()
        whole = regrets.size <= size
        nearest = core if whole else core.within(float(np.partition(regrets, size)[size]))
        found = solved(knapsack, nearest, dual.prices, gap, NODES)
        if found is None or (picks is not None and knapsack.loss(found) >= knapsack.loss(picks)):
            if whole or picks is not None:
                return picks
            continue
        picks = found
        # Whether nothing that was left out can be in a better allocation.
        if whole or _gap(knapsack, dual, picks) <= nearest.allowed:
            break
    return _filled(knapsack, dual, picks)[1]


def _filled(
    knapsack: Knapsack, dual: Dual, picks: list[Pick] | None
) -> tuple[Core, list[Pick] | None]:
    """An allocation that no single move makes better, and what a better one can contain."""
    if picks is None:
        return core_of(knapsack, dual.prices, math.inf), None
    gap = _gap(knapsack, dual, picks)
    while True:
        core = core_of(knapsack, dual.prices, gap)
        picks = filled(knapsack, core, settled(core, picks))
        gap, before = _gap(knapsack, dual, picks), gap
        # A core that was too large for the gap leaves moves out.
        if core.allowed >= gap or gap > 0.5 * before:
            return core.within(gap), picks


def _gap(knapsack: Knapsack, dual: Dual, picks: list[Pick]) -> float:
    """What a better allocation can regret, in nats; the margin is for rounding."""
    return max(knapsack.loss(picks) - dual.bound, 0.0) * (1.0 + 1e-9)
