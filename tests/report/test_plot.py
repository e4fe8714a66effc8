"""Axes: ticks are round numbers, and everything has its place between the ends."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.plans.plan import Round
from fxcompress.report.descent import MOST_TICKS, descent
from fxcompress.report.plot import DECADES, Axis, decades, even, round_step
from tests.report.plans import llama

FINITE = st.floats(-1e12, 1e12).filter(lambda value: value == 0 or abs(value) > 1e-9)


def texts(axis: Axis) -> list[str]:
    return [text for _, text in axis.ticks]


@given(st.lists(FINITE, min_size=1, max_size=5))
def test_even_ticks_are_round_and_enclose_the_values(values: list[float]) -> None:
    axis = even(values, 300)
    assert axis.low <= min(values) + 1e-6 * abs(axis.high - axis.low)
    assert axis.high >= max(values) - 1e-6 * abs(axis.high - axis.low)
    places = [place for place, _ in axis.ticks]
    assert (places[0], places[-1]) == (0, 300)
    assert 2 <= len(places) <= 8
    apart = [b - a for a, b in pairwise(places)]
    assert apart == pytest.approx([300 / len(apart)] * len(apart), abs=0.2)
    assert all(0 <= axis.place(value) <= 300 for value in values)


@given(st.lists(st.floats(1e-200, 1e200), min_size=1, max_size=5))
def test_decades_end_at_powers_of_ten(values: list[float]) -> None:
    axis = decades([*values, 0.0], 300)
    low, high = math.log10(axis.low), math.log10(axis.high)
    assert (low, high) == pytest.approx((round(low), round(high)))
    assert 1 <= round(high - low) <= DECADES
    assert axis.high >= max(values) * (1 - 1e-9)
    assert axis.place(0.0) == 0
    assert axis.place(axis.high) == 300


def test_few_decades_have_ticks_between() -> None:
    assert texts(decades([0.02, 0.5], 100)) == [
        *("0.01", "0.02", "0.05", "0.1", "0.2", "0.5", "1"),
    ]
    assert texts(decades([0.002, 5], 100)) == ["0.001", "0.01", "0.1", "1", "10"]


def test_steps() -> None:
    assert round_step([0, 47], 5) == 10
    assert round_step([0.3, 1], 7) == pytest.approx(0.1)
    assert round_step([5, 5], 5) == 1


def attempt(number: int, keep: float, before: float, after: float | None) -> Round:
    return Round(
        round=number,
        keep=keep,
        removed=0.1,
        before=before,
        after=after,
        accepted=after is not None and after < before,
        rate=1e-3,
        kind="factors",
    )


def test_rounds_are_drawn_step_by_step() -> None:
    rounds = (
        attempt(1, 0.9, 0.4, 0.3),
        attempt(1, 0.9, 0.3, None),
        attempt(1, 0.9, 0.3, 0.2),
        attempt(3, 0.8, 0.6, 0.5),
    )
    drawn = descent(llama(layers=1).model_copy(update={"rounds": rounds, "objective": "kl"}))
    assert drawn is not None
    assert drawn.curve == ((0, 0.4), (1, 0.3), (2, 0.3), (3, 0.2), (4, 0.6), (5, 0.5))
    assert drawn.x.ticks == ((0, "1"), (drawn.x.place(4), "3"))
    assert (drawn.y.low, drawn.y.high) == (0, pytest.approx(0.6))
    assert [(line.x, line.y) for line in drawn.lines] == [((4, 4), (0.2, 0.6))]
    assert [mark.y for mark in drawn.marks] == [0.3, 0.2, 0.5]
    assert descent(llama(layers=1)) is None


def test_many_rounds_share_the_room_for_their_numbers() -> None:
    rounds = tuple(attempt(1 + at, 0.9, 2.0, 1.0) for at in range(100))
    drawn = descent(llama(layers=1).model_copy(update={"rounds": rounds, "objective": "kl"}))
    assert drawn is not None
    assert 2 < len(drawn.x.ticks) <= MOST_TICKS
