"""The uniform allocation against its definition, tried at every fraction that can matter."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fxcompress.budget import Candidate, Choice, Option, allocate_uniform, permitted_ranks
from fxcompress.errors import BudgetError


def site(
    rng: np.random.Generator, name: str, form: str = "low_rank", group: str | None = None
) -> Candidate:
    m, n = (int(size) for size in rng.integers(3, 12, 2))
    ranks = permitted_ranks(min(m, n), multiple_of=int(rng.integers(1, 3)))
    loss = np.sort(rng.exponential(size=ranks.size))[::-1].copy()
    cost = (ranks * (m + n)).astype(np.float64)
    return Candidate(name, float(m * n), (Option(form, ranks, loss, cost),), group)


def choice_at(candidate: Candidate, fraction: float) -> Choice:
    """The definition, word for word, for a candidate without group."""
    choices = [Choice(None, None, 0.0, candidate.dense_cost)]
    for option in candidate.options:
        for rank, loss, cost in zip(option.ranks, option.loss, option.cost, strict=True):
            if cost < candidate.dense_cost:
                choices.append(Choice(option.form, int(rank), float(loss), float(cost)))
    fitting = [choice for choice in choices if choice.cost <= fraction * candidate.dense_cost]
    if not fitting:
        return min(choices, key=lambda choice: choice.cost)
    return min(fitting, key=lambda choice: (choice.loss, choice.cost))


@pytest.mark.parametrize("seed", range(40))
def test_definition(seed: int) -> None:
    rng = np.random.default_rng(seed)
    candidates = [site(rng, f"site{i}") for i in range(4)]
    dense = sum(candidate.dense_cost for candidate in candidates)
    least = sum(choice_at(candidate, 0.0).cost for candidate in candidates)
    budget = float(math.floor(least + rng.random() * (dense - least)))

    # The total cost changes only at these fractions (the margin is for their rounding).
    fractions = [0.0, 1.0] + [
        float(cost) / candidate.dense_cost * (1.0 + 1e-12)
        for candidate in candidates
        for option in candidate.options
        for cost in option.cost[option.cost < candidate.dense_cost]
    ]
    expected: dict[str, Choice] = {}
    for fraction in sorted(fractions):
        tried = {candidate.name: choice_at(candidate, fraction) for candidate in candidates}
        if sum(choice.cost for choice in tried.values()) <= budget:
            expected = tried

    found = allocate_uniform(candidates, budget)
    assert dict(found.choices) == expected
    assert found.cost == sum(choice.cost for choice in expected.values()) <= budget
    assert found.loss == pytest.approx(sum(choice.loss for choice in expected.values()))
    assert math.isnan(found.multiplier)
    assert found.bound == 0.0
    assert found.budget == budget


def test_fractions_a_billionth_apart_are_told_apart() -> None:
    ranks = permitted_ranks(2)
    loss = np.array([2.0, 1.0])
    candidates = [
        Candidate(name, 1e9, (Option("low_rank", ranks, loss, np.array([1e8, cost])),))
        for name, cost in (("a", 3e8), ("b", 3e8 + 1.0))
    ]
    found = allocate_uniform(candidates, 5e8)
    assert [choice.rank for choice in found.choices.values()] == [2, 1]


def test_all_dense_only_with_the_whole_budget() -> None:
    rng = np.random.default_rng(0)
    candidates = [site(rng, f"site{i}") for i in range(3)]
    dense = sum(candidate.dense_cost for candidate in candidates)
    at_full = allocate_uniform(candidates, dense).choices.values()
    assert [choice.form for choice in at_full] == [None] * 3
    just_below = allocate_uniform(candidates, dense - 1.0).choices.values()
    assert [choice.form for choice in just_below] == ["low_rank"] * 3


def test_group_gets_one_rank_and_a_site_without_options_stays_dense() -> None:
    ranks = permitted_ranks(4)
    loss = np.array([4.0, 3.0, 2.0, 1.0])
    narrow = Option("low_rank", ranks, loss, ranks * 8.0)
    wide = Option("low_rank", ranks, loss, ranks * 20.0)
    candidates = [
        Candidate("a", 40.0, (narrow,), "qkv"),
        Candidate("plain", 7.0, ()),
        Candidate("b", 100.0, (wide,), "qkv"),
    ]
    found = allocate_uniform(candidates, 7.0 + 60.0)
    assert list(found.choices) == ["a", "plain", "b"]
    # The group may use 60 of its 140: rank 2, at 2·(8 + 20).
    assert found.choices["a"] == Choice("low_rank", 2, 3.0, 16.0)
    assert found.choices["b"] == Choice("low_rank", 2, 3.0, 40.0)
    assert found.choices["plain"] == Choice(None, None, 0.0, 7.0)
    assert found.cost == 63.0


def test_least_budget_is_met_and_less_is_refused() -> None:
    rng = np.random.default_rng(1)
    candidates = [site(rng, f"site{i}") for i in range(3)]
    least = sum(choice_at(candidate, 0.0).cost for candidate in candidates)
    assert allocate_uniform(candidates, least).cost == least
    with pytest.raises(BudgetError, match=f"these rules allow is {least:.0f}, the budget is"):
        allocate_uniform(candidates, least - 1.0)
