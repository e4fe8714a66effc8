"""Alternatives with any number of modes, within one, two and three budgets, by brute force."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from fxcompress.budget import (
    Alternatives,
    Candidate,
    Choice,
    Entity,
    Mode,
    Option,
    Resource,
    allocate,
    allocate_uniform,
    allocate_within,
)
from fxcompress.errors import BudgetError

Way = tuple[float, tuple[float, ...]]
"""Loss and costs."""


def narrowed(draw: np.random.Generator, name: str, units: int) -> list[Alternatives]:
    """A hidden value at several widths: at each, the same sites with other options."""
    by_unit: list[list[Mode]] = [[] for _ in range(units)]
    widths = sorted(draw.choice(np.arange(1, 9), int(draw.integers(1, 5)), replace=False))
    for width in widths[::-1]:
        members: list[list[Candidate]] = [[] for _ in range(units)]
        for site in range(int(draw.integers(0, 3))):
            size = int(draw.integers(0, 4))
            ranks = np.sort(draw.choice(np.arange(1, 9), size, replace=False)).astype(np.int64)
            loss = draw.integers(0, 12, size) / 4
            fixed = size > 0 and draw.random() < 0.2
            for unit in range(units):
                cost = draw.integers(0, 4 + width, size).astype(float)
                option = Option("low_rank", ranks, loss, cost)
                dense = None if fixed else float(draw.integers(2, 5 + width))
                members[unit].append(Candidate(f"{name}.{site}", dense, (option,)))
        lost = float(draw.integers(0, 10)) / 8
        for unit in range(units):
            cost = float(draw.integers(0, 4))
            by_unit[unit].append(Mode(f"width {width}", tuple(members[unit]), lost, cost))
    return [Alternatives(name, tuple(modes)) for modes in by_unit]


def instance(seed: int, units: int) -> list[Resource]:
    draw = np.random.default_rng(seed)
    entities: list[list[Entity]] = [[] for _ in range(units)]
    for at in range(int(draw.integers(1, 4))):
        for own, made in zip(entities, narrowed(draw, f"hidden{at}", units), strict=True):
            own.append(made)
    for own in entities:
        own.append(Candidate("alone", float(draw.integers(1, 9)), ()))
    budgets = [float(draw.integers(4, 14)) * len(entities[0]) / 1.5 for _ in range(units)]
    return [
        Resource(f"unit {unit}", budget, tuple(own))
        for unit, (budget, own) in enumerate(zip(budgets, entities, strict=True))
    ]


def ways_of(candidates: tuple[Candidate, ...]) -> list[Way]:
    """All choices of a site, which is given for every budget."""
    first = candidates[0]
    ways: list[Way] = []
    if first.dense_cost is not None:
        ways.append((0.0, tuple(each.dense_cost or 0.0 for each in candidates)))
    for options in zip(*(each.options for each in candidates), strict=True):
        ways += [
            (float(options[0].loss[at]), tuple(float(o.cost[at]) for o in options))
            for at in range(len(options[0].ranks))
        ]
    return ways


def total(parts: tuple[Way, ...]) -> Way:
    return sum(loss for loss, _ in parts), tuple(
        map(sum, zip(*(costs for _, costs in parts), strict=True))
    )


def every_way(resources: list[Resource]) -> list[Way]:
    factors = []
    for each in zip(*(resource.entities for resource in resources), strict=True):
        if isinstance(each[0], Candidate):
            factors.append(ways_of(each))
            continue
        ways: list[Way] = []
        for modes in zip(*(entity.modes for entity in each), strict=True):
            fixed: Way = (modes[0].loss, tuple(mode.cost for mode in modes))
            members = zip(*(mode.members for mode in modes), strict=True)
            ways += map(total, itertools.product([fixed], *map(ways_of, members)))
        factors.append(ways)
    return [total(parts) for parts in itertools.product(*factors)]


@pytest.mark.parametrize("units", [1, 2, 3])
def test_is_the_optimum(units: int) -> None:
    possible, modes = 0, set()
    for seed in range(120):
        resources = instance(seed, units)
        losses = [
            loss
            for loss, costs in every_way(resources)
            if all(cost <= r.budget for cost, r in zip(costs, resources, strict=True))
        ]
        if not losses:
            with pytest.raises(BudgetError):
                allocate_within(resources)
            continue
        possible += 1
        found = allocate_within(resources)
        allocation = found.allocation
        assert allocation.loss == pytest.approx(min(losses), abs=1e-12), seed
        assert found.bound <= min(losses) + 1e-9
        # What is told is what was given: the modes, their members and what all of it costs.
        for resource in resources:
            costs, lost = [], []
            expected = []
            for entity in resource.entities:
                if isinstance(entity, Candidate):
                    expected.append(entity)
                    continue
                (mode,) = (m for m in entity.modes if m.name == allocation.modes[entity.name])
                modes.add(entity.modes.index(mode))
                costs.append(mode.cost)
                lost.append(mode.loss)
                expected += mode.members
            assert list(allocation.choices) == [candidate.name for candidate in expected]
            for candidate, choice in zip(expected, allocation.choices.values(), strict=True):
                assert (choice.form is not None) or candidate.dense_cost is not None
                costs.append(cost_in(candidate, choice))
                lost.append(choice.loss)
            assert found.costs[resource.name] == math.fsum(costs) <= resource.budget
            assert allocation.loss == math.fsum(lost)
    assert possible > 40
    assert len(modes) > 2  # not always the first


def cost_in(candidate: Candidate, choice: Choice) -> float:
    if choice.form is None:
        return candidate.dense_cost or 0.0
    (option,) = (option for option in candidate.options if option.form == choice.form)
    return float(option.cost[option.ranks.tolist().index(choice.rank)])


def test_one_budget_has_the_bound_of_the_dual_and_uniform_keeps_it() -> None:
    for seed in range(120):
        (resource,) = instance(seed, 1)
        ways = every_way([resource])
        if min(cost for _, (cost,) in ways) > resource.budget:
            continue
        found = allocate(resource.entities, resource.budget)
        points = np.array(sorted({(cost, loss) for loss, (cost,) in ways}))
        costs, losses = points[:, 0], points[:, 1]
        with np.errstate(divide="ignore", invalid="ignore"):
            slopes = (losses[:, None] - losses) / (costs - costs[:, None])
        corners = np.unique(slopes[np.isfinite(slopes) & (slopes > 0)])
        dual = max(
            float((losses + price * (costs - resource.budget)).min()) for price in [0.0, *corners]
        )
        assert found.bound == pytest.approx(min(max(dual, 0.0), found.loss), abs=1e-9), seed
        baseline = allocate_uniform(resource.entities, resource.budget)
        assert found.loss <= baseline.loss + 1e-12
        assert baseline.cost <= resource.budget


def test_a_width_is_worth_what_its_members_make_of_it() -> None:
    """Half the width loses more at once, but its ranks lose less at the same total cost."""
    ranks = np.arange(1, 5)

    def up(width: int, scale: float) -> Candidate:
        option = Option("low_rank", ranks, scale * (4.0 - ranks), ranks * (2.0 + width))
        return Candidate("up", 4.0 * width, (option,))

    wide = Mode("8", (up(8, 1.0),), cost=1.0)
    half = Mode("4", (up(4, 0.1),), loss=0.7, cost=0.5)
    hidden = Alternatives("hidden", (wide, half))
    for budget, mode, rank in (
        (33.0, "8", None),
        (32.0, "4", None),
        (16.5, "4", None),
        (13.0, "4", 2),
    ):
        found = allocate([hidden], budget)
        assert (found.modes["hidden"], found.choices["up"].rank) == (mode, rank), budget
    assert found.loss == pytest.approx(0.7 + 0.2)
    assert found.cost == 0.5 + 12.0


def test_many_widths() -> None:
    """A network of narrowed blocks, three sites each: certified, and never above the budget."""
    draw = np.random.default_rng(0)
    entities: list[Entity] = []
    ranks = np.arange(1, 65)
    for block in range(30):
        modes = []
        scale = float(draw.exponential())
        energy = np.sort(draw.exponential(size=(3, 64)) ** 2)[:, ::-1] * scale
        for width in range(64, 8, -8):
            members = []
            for site in range(3):
                tail = np.append(np.cumsum(energy[site, :width][::-1])[::-1], 0.0)[1:]
                cost = ranks[:width] * (64.0 + width)
                option = Option("low_rank", ranks[:width], tail, cost)
                members.append(Candidate(f"{block}.{site}", 64.0 * width, (option,)))
            lost = scale * (1.0 - width / 64) ** 2 * 40.0
            modes.append(Mode(str(width), tuple(members), lost, float(width)))
        entities.append(Alternatives(f"block {block}", tuple(modes)))
    budget = 0.6 * 30 * (3 * 64 * 64 + 64)
    found = allocate(entities, budget)
    assert found == allocate(entities, budget)
    assert found.cost <= budget
    assert len(set(found.modes.values())) > 2
    assert 0.0 < found.bound <= found.loss <= found.bound * 1.005
