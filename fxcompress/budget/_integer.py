"""The integer programme of a core, solved by HiGHS (``scipy.optimize.milp``).

Minimise the regrets, and what is unspent at the prices, both in units of the gap: 1 is the present
allocation, 0 the bound.  There is a binary variable for each contested choice, which add up to 1
within a slot, and for each way of an entity that has several open, which its slots then add up to.
Costs are relative to the present allocation, so that no large numbers cancel.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.optimize import Bounds, LinearConstraint, milp
from scipy.sparse import coo_array

from fxcompress.budget._core import Core, OpenWay
from fxcompress.budget._instance import Instance, Pick
from fxcompress.budget._slots import Floats

MARGIN = 4e-6
"""By how much of a row's unit HiGHS may exceed it (its tolerance is 1e-6), with some reserve."""


@dataclass
class _Programme:
    """Variables and rows as they are collected.

    Attributes:
        objective: of each variable, in nats.
        costs: of each variable, by budget.
        rows: (row, variable, coefficient).
        equals: right-hand side of each row.
        picks: what each binary variable stands for: entity, way, slot (-1: the way), choice.
    """

    objective: list[float] = field(default_factory=list)
    costs: list[Sequence[float]] = field(default_factory=list)
    rows: list[tuple[int, int, float]] = field(default_factory=list)
    equals: list[float] = field(default_factory=list)
    picks: list[tuple[int, int, int, int]] = field(default_factory=list)

    def variable(
        self, objective: float, cost: Sequence[float], pick: tuple[int, int, int, int]
    ) -> int:
        self.objective.append(objective)
        self.costs.append(cost)
        self.picks.append(pick)
        return len(self.objective) - 1

    def row(self, variables: Sequence[int], equals: float) -> int:
        self.rows += [(len(self.equals), at, 1.0) for at in variables]
        self.equals.append(equals)
        return len(self.equals) - 1


def solved(
    instance: Instance,
    core: Core,
    prices: Sequence[float],
    gap: float | None,
    nodes: int,
) -> list[Pick] | None:
    """The best allocation that the core holds, as far as it is found.

    Args:
        instance: has the budgets, which the answer meets exactly.
        core: what is open; everything else is at its best.
        prices: λ of every budget, in nats per unit of cost.
        gap: of the present allocation, in nats; None if there is none.
        nodes: of the search tree at most, for equal answers however busy the machine is.

    Returns:
        None if nothing within the budgets was found.
    """
    base = [
        (ways[0].index, tuple(int(c.choices[c.regret.argmin()]) for c in ways[0].contests))
        for ways in (tuple(sorted(each, key=_regret)) for each in core.entities)
    ]
    programme = _Programme()
    for entity, ways in enumerate(core.entities):
        _add(programme, entity, ways, base[entity])
    room = [
        math.fsum([budget, -instance.cost(base, at)]) for at, budget in enumerate(instance.budgets)
    ]
    for margin in (0.0, MARGIN):
        values = _solution(programme, prices, room, gap, margin, nodes)
        if values is None:
            return None
        picks = _picks(programme, base, core, values)
        if instance.fits(picks):
            return picks
    return None


def _regret(way: OpenWay) -> float:
    return way.regret


def _add(programme: _Programme, entity: int, ways: Sequence[OpenWay], base: Pick) -> None:
    """Variables and rows of one entity, costs relative to what it takes in the base."""
    count = len(ways[0].way.cost)
    before = next(way.way for way in ways if way.index == base[0])
    chosen = []
    for open_way in ways:
        best = [int(contest.regret.argmin()) for contest in open_way.contests]
        least = [int(c.choices[at]) for c, at in zip(open_way.contests, best, strict=True)]
        own = None
        if len(ways) > 1:
            cost = [
                math.fsum([*open_way.way.costs(least, u), *(-x for x in before.costs(base[1], u))])
                for u in range(count)
            ]
            own = programme.variable(open_way.regret, cost, (entity, open_way.index, -1, 0))
            chosen.append(own)
        for slot, (contest, at) in enumerate(zip(open_way.contests, best, strict=True)):
            if contest.choices.size == 1:
                continue
            costs = (contest.cost - contest.cost[at]).tolist()
            row = programme.row(
                [
                    programme.variable(regret, cost, (entity, open_way.index, slot, choice))
                    for regret, cost, choice in zip(
                        (contest.regret - contest.regret[at]).tolist(),
                        costs,
                        contest.choices.tolist(),
                        strict=True,
                    )
                ],
                1.0 if own is None else 0.0,
            )
            if own is not None:
                programme.rows.append((row, own, -1.0))
    if chosen:
        programme.row(chosen, 1.0)


def _solution(
    programme: _Programme,
    prices: Sequence[float],
    room: Sequence[float],
    gap: float | None,
    margin: float,
    nodes: int,
) -> Floats | None:
    """Values of the binary variables; None if nothing was found."""
    size, count = len(programme.objective), len(room)
    if not size:
        return np.zeros(0) if min(room) >= 0.0 else None
    costs = np.array(programme.costs).reshape(size, count)
    unit = gap or max(programme.objective) or 1.0
    # In a row, a unit of the gap is about 1.
    priced = np.array(prices) / unit
    greatest = np.maximum(np.abs(costs).max(0), np.abs(room))
    scale = np.maximum(priced, 1.0 / np.where(greatest > 0.0, greatest, 1.0))
    highest = np.array(room) * scale - margin
    lowest = np.full(count, -np.inf)
    if gap is not None:  # what is unspent costs at most the gap
        lowest = highest - np.divide(scale, priced, out=-lowest, where=priced > 0.0)
    at, row = np.nonzero(costs)
    first = len(programme.equals)
    entries = np.array(programme.rows, dtype=np.float64).reshape(-1, 3)
    matrix = coo_array(
        (
            np.concatenate([entries[:, 2], costs[at, row] * scale[row]]),
            (
                np.concatenate([entries[:, 0], first + row]).astype(int),
                np.concatenate([entries[:, 1], at]).astype(int),
            ),
        ),
        shape=(first + count, size),
    ).tocsr()
    found = milp(
        np.array(programme.objective) / unit - costs @ priced,
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
        picks.append([int(c.choices[c.regret.argmin()]) for c in taken.contests])
    for entity, way, slot, choice in ones:
        if slot >= 0 and way == ways[entity]:
            picks[entity][slot] = choice
    return [(index, tuple(choices)) for index, choices in zip(ways, picks, strict=True)]
