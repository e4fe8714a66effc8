import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxcompress.report.quantities import (
    BARS,
    counts,
    duration,
    loss,
    loss_label,
    percent,
    short,
    span,
    sparkline,
)


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"),
        (999, "999"),
        (1000, "1.00k"),
        (9_994, "9.99k"),
        (9_996, "10.0k"),
        (203_111, "203k"),
        (999_499, "999k"),
        (999_600, "1.00M"),
        (134_515_008, "135M"),
        (5_300_000_000_000_000, "5300T"),
    ],
)
def test_short(number: int, text: str) -> None:
    assert short(number) == text


@pytest.mark.parametrize(
    ("number", "text"),
    [(0.0, "0"), (0.00312, "0.0031"), (3.14e-5, "3.1e-05"), (2.5, "2.5000"), (-2e-6, "-2.0e-06")],
)
def test_loss(number: float, text: str) -> None:
    assert loss(number) == text


def test_ranges_collapse_when_both_ends_read_alike() -> None:
    assert counts([884_736, 884_736]) == "884,736"
    assert counts([203_111, 439_222]) == "203k..439k"
    assert span([0.00121, 0.00119], loss) == "0.0012"


def test_percent_of_nothing_is_a_dash() -> None:
    assert percent(1, 0) == "-"
    assert percent(842, 1000) == "84.2%"


def test_only_nats_are_called_kl() -> None:
    assert loss_label("nats per prediction") == "KL"
    assert loss_label("user loss per batch") == "loss"


@given(st.lists(st.integers(1, 5000), min_size=2, max_size=32))
def test_sparkline_is_monotone_in_the_values(values: list[int]) -> None:
    heights = [BARS.index(bar) for bar in sparkline(values)]
    assert len(heights) == len(values)
    ordered = sorted(zip(values, heights, strict=True))
    assert [height for _, height in ordered] == sorted(heights)
    assert max(heights) == len(BARS) - 1


@given(st.lists(st.integers(1, 5000), min_size=33, max_size=300))
def test_sparkline_of_many_sorted_values_is_sorted(values: list[int]) -> None:
    bars = sparkline(sorted(values))
    assert len(bars) == 32
    assert list(bars) == sorted(bars)


def test_sparkline_starts_at_zero() -> None:
    assert sparkline([100, 50, 25]) == "█▄▂"
    assert sparkline([]) == ""
    assert sparkline([0, 0]) == "▁▁"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (83.4, "83.4 s"),
        (1.0, "1.00 s"),
        (0.9996, "1.00 s"),
        (0.9994, "999 ms"),
        (0.03617, "36.2 ms"),
        (812e-6, "812 µs"),
        (4.2e-9, "0.00 µs"),
        (123456.0, "123456 s"),
    ],
)
def test_durations_have_three_digits(seconds: float, text: str) -> None:
    assert duration(seconds) == text
