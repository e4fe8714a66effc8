"""Greedy improvement of an allocation within its core: what is unspent goes to better choices."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Sequence
from fractions import Fraction

import numpy as np

from fxcompress.budget._core import Contest, Core
from fxcompress.budget._knapsack import Knapsack, Pick


def settled(core: Core, picks: Sequence[Pick]) -> list[Pick]:
    """An allocation without choices that another one of the core beats in loss and in cost."""
    found = []
    for ways, (index, choices) in zip(core.entities, picks, strict=True):
        for open_way in ways:
            if open_way.index == index:
                places = [c.place(x) for c, x in zip(open_way.contests, choices, strict=True)]
                choices = tuple(
                    int(contest.choices[place]) if place >= 0 else choice
                    for contest, place, choice in zip(
                        open_way.contests, places, choices, strict=True
                    )
                )
        found.append((index, choices))
    return found


def filled(knapsack: Knapsack, core: Core, picks: Sequence[Pick]) -> list[Pick]:
    """Move single slots to better choices of the core while any fits, ways as they are.

    It is always the move with the largest loss reduction per cost.
    """
    taken = [list(choices) for _, choices in picks]
    # Exact, so that "fits" means that math.fsum over all costs is within the budget: like
    # math.fsum, the conversion of a fraction to a float is correctly rounded.
    spent = [_exact(knapsack.costs(picks, at)) for at in range(len(knapsack.budgets))]
    places = [
        (entity, at, contest)
        for entity, (ways, (index, _)) in enumerate(zip(core.entities, picks, strict=True))
        for open_way in ways
        if open_way.index == index
        for at, contest in enumerate(open_way.contests)
        if contest.choices.size > 1 or contest.choices[0] != picks[entity][1][at]
    ]
    shares = 1.0 / np.maximum(np.array(knapsack.budgets), 1e-200)

    def after(contest: Contest, now: int, then: int) -> list[Fraction]:
        return [
            total - _exact(contest.slot.costs(now, at)) + _exact(contest.slot.costs(then, at))
            for at, total in enumerate(spent)
        ]

    def fits(totals: Sequence[Fraction]) -> bool:
        return all(float(x) <= limit for x, limit in zip(totals, knapsack.budgets, strict=True))

    def best_move(place: int) -> tuple[float, int, int] | None:
        """(loss change per cost, place, choice) of the best move of one slot that fits."""
        entity, at, contest = places[place]
        now = taken[entity][at]
        cost = np.array([contest.slot.cost_at(now, u) for u in range(len(spent))])
        change = contest.cost - cost
        gain = contest.slot.loss_at(now) - contest.loss
        # A few units in the last place too many, then back to what truly fits.
        room = [
            float(Fraction(limit) - total) + 4.0 * math.ulp(limit)
            for limit, total in zip(knapsack.budgets, spent, strict=True)
        ]
        possible = np.flatnonzero((gain > 0.0) & (change <= room).all(1))
        used = np.maximum((change[possible] * shares).clip(0.0).sum(1), 1e-18)
        rates = -gain[possible] / used
        for move in np.argsort(rates, kind="stable").tolist():
            choice = int(contest.choices[possible[move]])
            if fits(after(contest, now, choice)):
                return float(rates[move]), place, choice
        return None

    while True:
        moves = [move for at in range(len(places)) if (move := best_move(at)) is not None]
        heapq.heapify(moves)
        moved = False
        while moves:
            _, place, choice = moves[0]
            entity, at, contest = places[place]
            totals = after(contest, taken[entity][at], choice)
            # The budget left has shrunk since the move was proposed: it may not fit any more.
            if fits(totals):
                spent, taken[entity][at], moved = totals, choice, True
            following = best_move(place)
            if following is None:
                heapq.heappop(moves)
            else:
                heapq.heapreplace(moves, following)
        # A move may make room in one of several budgets, for moves that did not fit before.
        if not moved or len(spent) == 1:
            return [(index, tuple(own)) for (index, _), own in zip(picks, taken, strict=True)]


def _exact(costs: Iterable[float]) -> Fraction:
    return sum(map(Fraction, costs), Fraction(0))
