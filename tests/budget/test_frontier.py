"""The frontier against all allocations of small instances."""

from __future__ import annotations

import math
from itertools import product

import numpy as np
import pytest

from fxcompress.budget import Alternatives, Candidate, Entity, Mode, Option, allocate, frontier


def option(draw: np.random.Generator, form: str, size: int, dense: float) -> Option:
    ranks = np.arange(1, size + 1, dtype=np.int64)
    loss = np.sort(draw.uniform(0, 1, size))[::-1].copy()
    return Option(form, ranks, loss, dense * ranks / (size + 1) * draw.uniform(0.8, 1.0))


def instance(seed: int) -> list[Entity]:
    """Two candidates, and two sites that can be treated together."""
    draw = np.random.default_rng(seed)
    names = ("a", "b", "c", "d")
    a, b, c, d = (
        Candidate(name, dense, (option(draw, "one", 4, dense), option(draw, "two", 3, dense)))
        for name, dense in zip(names, draw.uniform(5, 20, 4), strict=True)
    )
    whole = (c.dense_cost or 0.0) + (d.dense_cost or 0.0)
    joint = Candidate("cd", None, (option(draw, "joint", 4, whole),))
    return [a, b, Alternatives("cd", (Mode("single", (c, d)), Mode("joint", (joint,), 0.05)))]


def choices(candidate: Candidate) -> list[tuple[float, float]]:
    found = [
        (float(cost), float(loss))
        for one in candidate.options
        for cost, loss in zip(one.cost, one.loss, strict=True)
    ]
    return found if candidate.dense_cost is None else [*found, (candidate.dense_cost, 0.0)]


def every(entities: list[Entity]) -> list[tuple[float, float]]:
    """Cost and loss of all allocations."""
    ways = []
    for entity in entities:
        modes = [Mode("", (entity,))] if isinstance(entity, Candidate) else list(entity.modes)
        ways.append(
            [
                (sum(c for c, _ in one), mode.loss + sum(x for _, x in one))
                for mode in modes
                for one in product(*map(choices, mode.members))
            ]
        )
    return [(sum(c for c, _ in one), sum(x for _, x in one)) for one in product(*ways)]


@pytest.mark.parametrize("seed", range(12))
def test_no_allocation_is_below_a_point(seed: int) -> None:
    entities = instance(seed)
    known = every(entities)
    least, most = min(c for c, _ in known), max(c for c, _ in known)
    budget, step = least + 0.6 * (most - least), 0.01 * most
    found = frontier(entities, budget, step)
    assert list(found.costs) == sorted({*found.costs})
    assert found.costs[0] == pytest.approx(least)
    for cost, loss, taken in zip(found.costs, found.losses, found.taken, strict=True):
        best = min(lost for other, lost in known if other <= cost * (1 + 1e-12))
        assert loss == pytest.approx(best, abs=1e-12)
        assert cost == pytest.approx(math.fsum(one.cost for one in taken))
        assert loss == pytest.approx(math.fsum(one.loss for one in taken), abs=1e-12)
    assert found.losses[-1] == pytest.approx(min(lost for _, lost in known), abs=1e-12)
    assert found.costs[found.now] <= budget
    assert found.losses[found.now] >= allocate(entities, budget).loss - 1e-12
    spent = found.costs[found.now]
    assert found.costs[found.more] > spent + step or found.more == len(found.costs) - 1
    assert found.costs[found.less] <= spent - step or found.less == 0


def test_neighbours_fall_less_and_less() -> None:
    """The points are on a convex curve: none could be skipped."""
    found = frontier(instance(3), 30.0, 0.5)
    slopes = np.diff(found.losses) / np.diff(found.costs)
    assert (np.diff(slopes) >= -1e-12).all()


def test_a_budget_that_does_not_bind_is_the_last_point() -> None:
    entities = instance(1)
    found = frontier(entities, 1e6, 1e-3)
    assert found.now == found.more == len(found.costs) - 1
    assert found.less < found.now


def test_a_budget_of_the_least_cost_has_nothing_to_sell() -> None:
    entities = instance(2)
    least = min(cost for cost, _ in every(entities))
    found = frontier(entities, least * (1 + 1e-12), 1.0)
    assert found.now == found.less == 0
    assert found.more > 0
