"""What other budgets would have cost and lost, site by site: the frontier as a plan keeps it."""

from __future__ import annotations

import math
from typing import Self

from pydantic import model_validator

from fxcompress.forms.target import Rank
from fxcompress.plans.record import Frozen, Whole

CLOSE = 1e-6
"""Relative difference of a sum from its parts that is rounding."""


class Closest(Frozen):
    """What came closest to being worth it, of a site that stays dense.

    Attributes:
        form, rank: of it.
        saved: what it would save, in the unit of the (first) budget.
        worth: what that is worth at the price of all budgets, in the unit of the loss.
        loss: what it would lose, by the moments that the ranks were chosen by.
    """

    form: str
    rank: Rank
    saved: float
    worth: float
    loss: float


class Offer(Frozen):
    """A choice for sites that are decided on together.

    Attributes:
        text: form and rank, ``"pivoted 96"``, or ``"dense"``.
        cost: of all of them, in the unit of the budget.
        loss: of all of them, as what was minimized.
    """

    text: str
    cost: float
    loss: float


class Curve(Frozen):
    """What sites that are decided on together take along the frontier.

    Attributes:
        sites: their names.
        offers: what they take at some point, each once, by falling price.
        taken: at every point of the frontier the place of what they take in ``offers``.
    """

    sites: tuple[str, ...]
    offers: tuple[Offer, ...]
    taken: tuple[Whole, ...]


class Tradeoff(Frozen):
    """Least losses by cost, and what every site would take.

    At each point no plan of that cost or less loses less; losses are those that were minimized
    (``BudgetOutcome.fitted``), costs are of the matched operators in the unit of the budget.

    Attributes:
        costs, losses: of the points, by rising cost.
        now: the point of the budget: the dearest within it.  The plan itself spends what that
            leaves, too.
        more, less: the points with which the next one percent of the dense cost is spent or saved;
            the last or the first if there is none.
        curves: of all sites, what is decided on together as one.
    """

    costs: tuple[float, ...]
    losses: tuple[float, ...]
    now: Whole
    more: Whole
    less: Whole
    curves: tuple[Curve, ...]

    @model_validator(mode="after")
    def _sums(self) -> Self:
        size = len(self.costs)
        if len(self.losses) != size or not self.less <= self.now <= self.more < size:
            raise ValueError("the points of the trade-off are out of order")
        for curve in self.curves:
            if len(curve.taken) != size or max(curve.taken, default=0) >= len(curve.offers):
                raise ValueError("a curve of the trade-off does not fit its points")
        for at in range(size):
            offers = [curve.offers[curve.taken[at]] for curve in self.curves]
            for total, parts in (
                (self.costs[at], [offer.cost for offer in offers]),
                (self.losses[at], [offer.loss for offer in offers]),
            ):
                if not math.isclose(total, math.fsum(parts), rel_tol=CLOSE, abs_tol=1e-12):
                    raise ValueError("a point of the trade-off is not the sum of its parts")
        return self
