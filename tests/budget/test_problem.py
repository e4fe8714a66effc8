"""The problem's values: which ranks are permitted, and what is rejected, naming the culprit."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.budget import Allocation, Candidate, Option, allocate, permitted_ranks
from fxcompress.errors import BudgetError


@pytest.mark.parametrize(
    ("full_rank", "limits", "expected"),
    [
        (4, {}, [1, 2, 3, 4]),
        (4, {"minimum": 3}, [3, 4]),
        (4, {"maximum": 2}, [1, 2]),
        (4, {"maximum": 9}, [1, 2, 3, 4]),
        (20, {"multiple_of": 8}, [8, 16]),
        (20, {"multiple_of": 8, "minimum": 9}, [16]),
        (20, {"multiple_of": 8, "maximum": 15}, [8]),
        (16, {"multiple_of": 8, "minimum": 16, "maximum": 16}, [16]),
        (7, {"multiple_of": 8}, []),
        (20, {"multiple_of": 8, "minimum": 9, "maximum": 15}, []),
        (4, {"minimum": 5}, []),
    ],
)
def test_permitted_ranks(full_rank: int, limits: dict[str, int], expected: list[int]) -> None:
    ranks = permitted_ranks(full_rank, **limits)
    assert ranks.dtype == np.int64
    assert ranks.tolist() == expected


@given(st.integers(1, 60), st.integers(1, 60), st.none() | st.integers(1, 60), st.integers(1, 20))
def test_permitted_ranks_are_all_multiples_within_the_limits(
    full_rank: int, minimum: int, maximum: int | None, multiple_of: int
) -> None:
    ranks = permitted_ranks(full_rank, minimum=minimum, maximum=maximum, multiple_of=multiple_of)
    last = full_rank if maximum is None else min(full_rank, maximum)
    assert ranks.tolist() == [r for r in range(minimum, last + 1) if r % multiple_of == 0]


@pytest.mark.parametrize("name", ["full_rank", "minimum", "maximum", "multiple_of"])
def test_permitted_ranks_rejects_what_is_below_one(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be at least 1, not 0"):
        permitted_ranks(**{"full_rank": 4, name: 0})


GOOD = {"ranks": [1, 2, 3], "loss": [3.0, 1.0, 1.0], "cost": [5.0, 7.0, 6.0]}


def option(form: str = "low_rank", **changed: object) -> Option:
    given = {**GOOD, **changed}
    arrays = {
        "ranks": np.asarray(given["ranks"], dtype=np.int64),
        "loss": np.asarray(given["loss"], dtype=np.float64),
        "cost": np.asarray(given["cost"], dtype=np.float64),
    }
    return Option(form, **arrays)


def test_a_plateau_and_a_falling_cost_are_accepted() -> None:
    assert Candidate("site", 9.0, (option(),)).options[0].cost.tolist() == [5.0, 7.0, 6.0]


@pytest.mark.parametrize(
    ("changed", "complaint"),
    [
        ({"loss": [3.0, math.nan, 1.0]}, "loss must be finite"),
        ({"loss": [math.inf, 1.0, 1.0]}, "loss must be finite"),
        ({"loss": [3.0, 1.0, -1.0]}, "loss must be finite and not negative"),
        ({"cost": [5.0, math.nan, 6.0]}, "cost must be finite"),
        ({"cost": [5.0, 7.0, math.inf]}, "cost must be finite"),
        ({"cost": [-5.0, 7.0, 6.0]}, "cost must be finite and not negative"),
        ({"ranks": [1, 3, 3]}, "ranks must be strictly increasing"),
        ({"ranks": [3, 2, 1]}, "ranks must be strictly increasing"),
        ({"ranks": [0, 2, 3]}, "ranks must be at least 1, not 0"),
        ({"ranks": [1, 2]}, "lengths differ: ranks 2, loss 3, cost 3"),
        ({"cost": [5.0]}, "lengths differ"),
        ({"loss": [[3.0, 1.0, 1.0]]}, "loss must have one dimension"),
    ],
)
def test_a_malformed_option_is_named(changed: dict[str, object], complaint: str) -> None:
    with pytest.raises(ValueError, match=r"candidate 'mlp\.up', option 'pivoted'") as caught:
        Candidate("mlp.up", 9.0, (option(), option("pivoted", **changed)))
    assert complaint in str(caught.value)


def test_other_number_types_are_rejected() -> None:
    good = option()
    with pytest.raises(ValueError, match=r"'site'.*loss must be float64, not float32"):
        Candidate("site", 9.0, (Option("f", good.ranks, good.loss.astype("f4"), good.cost),))
    with pytest.raises(ValueError, match=r"'site'.*ranks must be int64, not int32"):
        Candidate("site", 9.0, (Option("f", good.ranks.astype("i4"), good.loss, good.cost),))


def test_one_form_twice_is_rejected() -> None:
    with pytest.raises(ValueError, match=r"candidate 'site', option 'low_rank': .* twice"):
        Candidate("site", 9.0, (option(), option()))


@pytest.mark.parametrize("dense_cost", [math.nan, math.inf, -1.0])
def test_a_malformed_dense_cost_is_rejected(dense_cost: float) -> None:
    with pytest.raises(ValueError, match="candidate 'site': dense_cost must be finite"):
        Candidate("site", dense_cost, ())


def test_two_candidates_of_one_name_are_rejected() -> None:
    with pytest.raises(ValueError, match="two candidates have the name 'site'"):
        allocate([Candidate("site", 9.0, ()), Candidate("site", 9.0, (), "group")], 100.0)


@pytest.mark.parametrize("budget", [math.nan, math.inf, -1.0])
def test_a_malformed_budget_is_rejected(budget: float) -> None:
    with pytest.raises(BudgetError, match="the budget must be finite and not negative"):
        allocate([Candidate("site", 0.0, ())], budget)


def test_gap() -> None:
    assert Allocation({}, 0.0, loss=3.0, cost=0.0, budget=1.0, bound=2.5).gap == 0.5
