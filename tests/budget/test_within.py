"""Several budgets at once, against brute force."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from fxcompress.budget import (
    Alternatives,
    Candidate,
    Entity,
    Mode,
    Option,
    Resource,
    allocate,
    allocate_within,
)
from fxcompress.errors import BudgetError

NAMES = ("parameters", "macs", "seconds")


def instance(seed: int, units: int, *, special: bool = False) -> list[Resource]:
    """A few sites with a few choices; costs of different units are only loosely related."""
    draw = np.random.default_rng(seed)
    count = int(draw.integers(2, 5))
    sites, dense = [], []
    for _ in range(count):
        forms = []
        for form in ("a", "b")[: int(draw.integers(1, 3))]:
            size = int(draw.integers(1, 5))
            ranks = np.sort(draw.choice(np.arange(1, 9), size, replace=False)).astype(np.int64)
            loss = draw.integers(0, 12, size).astype(float) / 4
            if draw.random() < 0.7:
                loss = np.sort(loss)[::-1].copy()
            costs = [draw.integers(0, 12, size).astype(float) for _ in range(units)]
            forms.append((form, ranks, loss, costs))
        sites.append(forms)
        dense.append([float(draw.integers(4, 14)) for _ in range(units)])
    groups = [None] * count
    bundle: list[Any] = []
    if special and count >= 3 and draw.random() < 0.5:
        # Equal forms and ranks, so that a group has something in common.
        sites[1] = [(f, r, draw.permutation(loss), costs) for f, r, loss, costs in sites[0]]
        groups[0] = groups[1] = "g"
        members = ("s2",) if count == 3 else ("s2", "s3")
    else:
        members = ("s0", "s1")
    if special:
        size = int(draw.integers(1, 4))
        bundle = [
            np.arange(1, size + 1),
            np.sort(draw.integers(0, 12, size).astype(float) / 4)[::-1].copy(),
            [draw.integers(0, 20, size).astype(float) for _ in range(units)],
        ]
    resources = []
    for unit in range(units):
        candidates = tuple(
            Candidate(
                f"s{index}",
                dense[index][unit],
                tuple(Option(f, r, loss, costs[unit]) for f, r, loss, costs in forms),
                groups[index],
            )
            for index, forms in enumerate(sites)
        )
        entities: tuple[Entity, ...] = candidates
        if bundle:
            ranks, loss, costs = bundle
            whole = Candidate("b", None, (Option("joint", ranks, loss, costs[unit]),))
            single = tuple(each for each in candidates if each.name in members)
            modes = (Mode("single", single), Mode("joint", (whole,)))
            alone = (each for each in candidates if each.name not in members)
            entities = (*alone, Alternatives("b", modes))
        total = sum(each.dense_cost or 0.0 for each in candidates)
        budget = float(np.round(total * draw.uniform(0.2, 1.0)))
        resources.append(Resource(NAMES[unit], budget, entities))
    return resources


def ways(resources: list[Resource]) -> Iterator[tuple[float, list[float]]]:
    """Loss and costs of every choice there is."""
    every = zip(*(resource.entities for resource in resources), strict=True)
    yield from combined([own_ways(each) for each in every])


Way = tuple[float, list[float], dict[str, Any]]  # with what every group takes in it


def own_ways(each: tuple[Any, ...]) -> list[Way]:
    """Those of one entity, which is given for every resource."""
    first = each[0]
    if isinstance(first, Alternatives):
        found: list[Way] = []
        for modes in zip(*(e.modes for e in each), strict=True):
            members = [own_ways(m) for m in zip(*(mode.members for mode in modes), strict=True)]
            fixed: Way = (modes[0].loss, [mode.cost for mode in modes], {})
            found += [(loss, costs, {}) for loss, costs in combined([[fixed], *members])]
        return found

    def group(key: Any) -> dict[str, Any]:
        return {first.group: key} if first.group else {}

    found = [] if first.dense_cost is None else [(0.0, [c.dense_cost for c in each], group(None))]
    for options in zip(*(c.options for c in each), strict=True):
        for at, rank in enumerate(options[0].ranks):
            costs = [float(o.cost[at]) for o in options]
            taken = group((options[0].form, int(rank)))
            found.append((float(options[0].loss[at]), costs, taken))
    return found


def combined(parts: list[list[Way]]) -> Iterator[tuple[float, list[float]]]:
    """Every combination in which all members of a group take the same."""
    for taken in itertools.product(*parts):
        agreed: dict[str, Any] = {}
        if all(agreed.setdefault(g, key) == key for *_, own in taken for g, key in own.items()):
            yield (
                math.fsum(loss for loss, *_ in taken),
                [math.fsum(costs) for costs in zip(*(each[1] for each in taken), strict=True)],
            )


def best(resources: list[Resource]) -> float | None:
    budgets = [resource.budget for resource in resources]
    possible = [
        loss
        for loss, costs in ways(resources)
        if all(c <= b for c, b in zip(costs, budgets, strict=True))
    ]
    return min(possible, default=None)


@pytest.mark.parametrize("special", [False, True], ids=["sites", "groups and bundles"])
@pytest.mark.parametrize("units", [2, 3])
def test_against_brute_force(units: int, special: bool, capfd: pytest.CaptureFixture[str]) -> None:
    """Never above a budget, never below the bound, and optimal."""
    optimal = possible = 0
    for seed in range(150):
        resources = instance(seed, units, special=special)
        least = best(resources)
        try:
            found = allocate_within(resources)
        except BudgetError:
            assert least is None, f"seed {seed}: there is an answer of loss {least}"
            continue
        assert least is not None
        possible += 1
        for resource in resources:
            assert found.costs[resource.name] <= resource.budget
        assert found.bound <= least + 1e-9
        assert found.allocation.loss >= least - 1e-9
        # What is said of the answer is true of it.
        told = math.fsum(c.loss for c in found.allocation.choices.values())
        assert found.allocation.loss == pytest.approx(told)
        optimal += found.allocation.loss <= least + 1e-9
    assert capfd.readouterr() == ("", "")  # nothing is printed below Python
    assert possible > 70
    assert optimal == possible


@pytest.mark.parametrize("seed", range(40))
def test_one_resource_is_the_ordinary_problem(seed: int) -> None:
    (resource,) = instance(seed, 1, special=bool(seed % 2))
    try:
        alone = allocate(resource.entities, resource.budget)
    except BudgetError:
        with pytest.raises(BudgetError):
            allocate_within([resource])
        return
    found = allocate_within([resource])
    assert found.allocation.choices.keys() == alone.choices.keys()
    assert found.allocation.loss == alone.loss
    assert found.costs["parameters"] <= resource.budget
    assert found.multipliers["parameters"] == pytest.approx(alone.multiplier, rel=1e-9)


@pytest.mark.parametrize("seed", range(40))
def test_a_budget_that_does_not_bind_changes_nothing(seed: int) -> None:
    first, second = instance(seed, 2)
    loose = Resource(second.name, 1e6, second.entities)
    try:
        alone = allocate(first.entities, first.budget)
    except BudgetError:
        return
    found = allocate_within([first, loose])
    assert found.allocation.loss == alone.loss
    assert found.multipliers[second.name] == 0


def test_a_resource_may_be_about_some_sites_only() -> None:
    ranks = np.arange(1, 9)
    loss = (9.0 - ranks) ** 2
    options = (Option("low_rank", ranks, loss, 2.0 * ranks),)
    free = (Option("low_rank", ranks, loss, 0.0 * ranks),)
    every = tuple(Candidate(name, 18.0, options) for name in "abc")
    own = (every[0], *(Candidate(name, 0.0, free) for name in "bc"))
    found = allocate_within([Resource("all", 45.0, every), Resource("a only", 5.0, own)])
    assert found.allocation.choices["a"].rank == 2
    assert found.costs["a only"] == 4
    assert found.costs["all"] <= 45


def test_equal_inputs_give_equal_answers() -> None:
    first, again = (allocate_within(instance(8, 2, special=True)) for _ in range(2))
    assert first == again


def test_errors() -> None:
    first, second = instance(3, 2)
    with pytest.raises(ValueError, match="distinct names"):
        allocate_within([first, first])
    other = Resource("other", 5.0, instance(4, 1)[0].entities[: len(first.entities)])
    with pytest.raises(ValueError, match="in more than its costs"):
        allocate_within([first, other])
    dear = tuple(
        replace(c, options=tuple(replace(o, cost=o.cost + 1) for o in c.options))
        for c in second.entities
    )
    with pytest.raises(BudgetError, match="budget of macs cannot be met"):
        allocate_within([first, Resource("macs", 0.0, dear)])


def test_budgets_that_can_only_be_met_one_by_one() -> None:
    """Cheap in one unit is dear in the other."""
    ranks = np.array([1, 2])
    loss = np.array([1.0, 1.0])
    a = Candidate("s", 10.0, (Option("f", ranks, loss, np.array([1.0, 9.0])),))
    b = Candidate("s", 10.0, (Option("f", ranks, loss, np.array([9.0, 1.0])),))
    with pytest.raises(BudgetError, match="cannot be met together"):
        allocate_within([Resource("one", 2.0, (a,)), Resource("two", 2.0, (b,))])


@pytest.mark.slow
def test_many_sites_take_seconds() -> None:
    draw = np.random.default_rng(0)
    ranks = np.arange(1, 257)
    one, two = [], []
    for index in range(400):
        sigma = np.sort(draw.gamma(0.5, size=256))[::-1]
        loss = 0.5 * (np.sum(sigma**2) - np.cumsum(sigma**2)).clip(0)
        loss[-1] = 0.0
        m, n, rows = draw.integers(100, 1000, 3)
        options = [
            Option("low_rank", ranks, loss, ranks * float(c)) for c in (m + n, rows * (m + n))
        ]
        one.append(Candidate(f"s{index}", float(m * n), (options[0],)))
        two.append(Candidate(f"s{index}", float(m * n * rows), (options[1],)))
    resources = [
        Resource("parameters", 0.42 * sum(c.dense_cost for c in one), tuple(one)),
        Resource("macs", 0.4 * sum(c.dense_cost for c in two), tuple(two)),
    ]
    start = time.process_time()
    found = allocate_within(resources)
    assert time.process_time() - start < 90
    assert all(found.costs[r.name] <= r.budget for r in resources)
    assert all(found.costs[r.name] > 0.98 * r.budget for r in resources)  # both bind
    assert found.allocation.loss - found.bound < 1e-3 * found.allocation.loss
