"""The integer programme of a core, solved by HiGHS (``scipy.optimize.milp``).

Minimise the loss such that the budgets are met.  There is a binary variable for each contested
choice, which add up to 1 within a slot, and for each way of an entity that has several open, which
its slots then add up to.  Losses and costs are relative to what is best at λ, so that no large
numbers cancel, and in units of the gap: 1 is what the present allocation loses beyond the bound.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from fxcompress.budget._core import Core, OpenWay
from fxcompress.budget._knapsack import Knapsack, Pick
from fxcompress.budget._slots import Floats

MARGIN = 4e-6
"""By how much of a row's unit HiGHS may exceed it (its tolerance is 1e-6), with some reserve."""


@dataclass(frozen=True)
class _Programme:
    """Variables and equations as they are collected.

    Attributes:
        regrets: of each variable, in nats.
        costs: of each variable, by budget.
        entries: (equation, variable, coefficient).
        equals: right-hand side of each equation.
        picks: what each variable stands for: entity, way, slot (-1: the way), choice.
    """

    regrets: list[float] = field(default_factory=list)
    costs: list[Sequence[float]] = field(default_factory=list)
    entries: list[tuple[int, int, float]] = field(default_factory=list)
    equals: list[float] = field(default_factory=list)
    picks: list[tuple[int, int, int, int]] = field(default_factory=list)

    def variable(
        self, regret: float, cost: Sequence[float], pick: tuple[int, int, int, int]
    ) -> int:
        """Add one; returns its index."""
        self.regrets.append(regret)
        self.costs.append(cost)
        self.picks.append(pick)
        return len(self.regrets) - 1

    def one_of(self, variables: Sequence[int], whole: int | None = None) -> None:
        """Add an equation: variables add up to 1, or to another variable."""
        at = len(self.equals)
        self.entries.extend((at, variable, 1.0) for variable in variables)
        if whole is not None:
            self.entries.append((at, whole, -1.0))
        self.equals.append(1.0 if whole is None else 0.0)


def solved(
    knapsack: Knapsack,
    core: Core,
    prices: Sequence[float],
    gap: float | None,
    nodes: int,
) -> list[Pick] | None:
    """The best allocation that the core holds, as far as it is found.

    Args:
        knapsack: has the budgets, which the answer meets exactly.
        core: what is open; everything else is at its best.
        prices: λ of every budget, in nats per unit of cost.
        gap: of the present allocation, in nats; None if there is none.
        nodes: of the search tree at most; a limit on time would make the answer depend on how
            busy the machine is.

    Returns:
        None if nothing within the budgets was found.
    """
    best = [min(ways, key=lambda way: way.regret) for ways in core.entities]
    base = [(way.index, way.best()) for way in best]
    programme = _Programme()
    for entity, ways in enumerate(core.entities):
        _add(programme, entity, ways, best[entity])
    room = [
        math.fsum([budget, -knapsack.cost(base, at)]) for at, budget in enumerate(knapsack.budgets)
    ]
    for margin in (0.0, MARGIN):
        values = _solution(programme, prices, room, gap, margin, nodes)
        if values is None:
            return None
        picks = _picks(programme, base, core, values)
        if knapsack.fits(picks):
            return picks
    return None


def _add(programme: _Programme, entity: int, ways: Sequence[OpenWay], best: OpenWay) -> None:
    """Variables and equations of one entity, costs relative to its best way."""
    chosen = []
    for each in ways:
        whole = None
        if len(ways) > 1:
            cost = [
                math.fsum(
                    [
                        *each.way.costs(each.best(), at),
                        *(-cost for cost in best.way.costs(best.best(), at)),
                    ]
                )
                for at in range(len(each.way.cost))
            ]
            whole = programme.variable(each.regret, cost, (entity, each.index, -1, 0))
            chosen.append(whole)
        for slot, contest in enumerate(each.contests):
            if contest.choices.size == 1:
                continue
            at = contest.best
            variables = zip(
                (contest.regret - contest.regret[at]).tolist(),
                (contest.cost - contest.cost[at]).tolist(),
                contest.choices.tolist(),
                strict=True,
            )
            programme.one_of(
                [
                    programme.variable(regret, cost, (entity, each.index, slot, choice))
                    for regret, cost, choice in variables
                ],
                whole,
            )
    if chosen:
        programme.one_of(chosen)


def _solution(
    programme: _Programme,
    prices: Sequence[float],
    room: Sequence[float],
    gap: float | None,
    margin: float,
    nodes: int,
) -> Floats | None:
    """Values of the variables; None if nothing was found.

    Args:
        room: what is left of each budget if everything is at its best.
        margin: by how much to stay below it, in the unit of its row.
    """
    size, count = len(programme.regrets), len(room)
    if not size:
        return np.zeros(0) if min(room) >= 0.0 else None
    costs = np.array(programme.costs).reshape(size, count)
    unit = gap or max(programme.regrets) or 1.0
    priced = np.array(prices) / unit
    greatest = np.maximum(np.abs(costs).max(0), np.abs(room))
    scale = np.maximum(priced, 1.0 / np.where(greatest > 0.0, greatest, 1.0))
    highest = np.array(room) * scale - margin
    lowest = np.full(count, -np.inf)
    if gap is not None:  # what is unspent costs at most the gap
        lowest = highest - np.divide(scale, priced, out=-lowest, where=priced > 0.0)
    equations, variables, ones = np.array(programme.entries).reshape(-1, 3).T
    at, budget = np.nonzero(costs)
    first = len(programme.equals)
    rows = np.concatenate([equations, first + budget]).astype(np.int64)
    columns = np.concatenate([variables, at]).astype(np.int64)
    entries = np.concatenate([ones, costs[at, budget] * scale[budget]])
    matrix = coo_array((entries, (rows, columns)), shape=(first + count, size)).tocsr()
    found = milp(
        np.array(programme.regrets) / unit - costs @ priced,  # the losses
        constraints=LinearConstraint(
            matrix, np.append(programme.equals, lowest), np.append(programme.equals, highest)
        ),
        integrality=np.ones(size),
        bounds=Bounds(0.0, 1.0),
        options={"node_limit": nodes, "mip_rel_gap": 0.0},
    )
    return None if found.x is None else np.asarray(found.x, dtype=np.float64)


def _picks(programme: _Programme, base: Sequence[Pick], core: Core, values: Floats) -> list[Pick]:
    """The allocation that some values stand for."""
    ones = [programme.picks[at] for at in np.flatnonzero(values > 0.5).tolist()]
    ways = [index for index, _ in base]
    for entity, way, slot, _ in ones:
        if slot < 0:
            ways[entity] = way
    picks = []
    for index, open_ways in zip(ways, core.entities, strict=True):
        (taken,) = (each for each in open_ways if each.index == index)
        picks.append(list(taken.best()))
    for entity, way, slot, choice in ones:
        if slot >= 0 and way == ways[entity]:
            picks[entity][slot] = choice
    return [(index, tuple(choices)) for index, choices in zip(ways, picks, strict=True)]
