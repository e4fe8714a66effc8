"""How numbers are written: the same everywhere, and the same from run to run."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import pairwise

BARS = "▁▂▃▄▅▆▇█"
LOSS_IN_NATS = "nats per prediction"
WIDEST = 32
"""Bars in one sparkline at most."""


def count(number: float) -> str:
    """An exact count: ``884,736``."""
    return f"{number:,.0f}"


def short(number: float) -> str:
    """A count to three digits: ``203k``, ``1.07M``.

    >>> short(884_736), short(999_600), short(12)
    ('885k', '1.00M', '12')
    """
    if number < 1000:
        return f"{number:.0f}"
    for unit in "kMGT":
        number /= 1000
        if number < 999.5 or unit == "T":
            break
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits}f}{unit}"


def duration(seconds: float) -> str:
    """Seconds to three digits: ``1.42 s``, ``36.2 ms``, ``812 µs``.

    >>> duration(0.03617), duration(0.9999), duration(61.23)
    ('36.2 ms', '1.00 s', '61.2 s')
    """
    factor, unit = next(
        ((factor, unit) for factor, unit in ((1, "s"), (1e3, "ms")) if factor * seconds >= 0.9995),
        (1e6, "µs"),
    )
    number = factor * seconds
    digits = 2 if number < 9.995 else 1 if number < 99.95 else 0
    return f"{number:.{digits}f} {unit}"


def loss(number: float) -> str:
    """A predicted loss: ``0.0031``, and ``3.1e-05`` where four digits would show nothing."""
    if number == 0:
        return "0"
    if abs(number) < 1e-4:
        return f"{number:.1e}"
    return f"{number:.4f}" if abs(number) < 1000 else f"{number:.4g}"


def percent(part: float, whole: float) -> str:
    """``84.2%``; a dash where there is no whole."""
    return f"{100 * part / whole:.1f}%" if whole else "-"


def with_error(value: float, error: float | None) -> str:
    """A measured loss and its relative standard error, if there is one: ``0.0031 ± 2.1%``."""
    return f"{loss(value)} ± {percent(error, value)}" if error and value else loss(value)


def span(values: Iterable[float], write: Callable[[float], str]) -> str:
    """Least and greatest value, once if they read alike: ``96..208``."""
    values = list(values)
    low, high = write(min(values)), write(max(values))
    return low if low == high else f"{low}..{high}"


def counts(values: Iterable[int]) -> str:
    """One exact count, or a range of short ones: ``884,736`` or ``203k..439k``."""
    values = list(values)
    return count(values[0]) if min(values) == max(values) else span(values, short)


def sparkline(values: Sequence[float], width: int = WIDEST) -> str:
    """One bar per value, from 0 to the largest; neighbours are averaged beyond ``width``.

    >>> sparkline([96, 120, 208, 160])
    '▄▅█▇'
    """
    if len(values) > width:
        edges = [len(values) * i // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    top = max(values, default=0)
    if top <= 0:
        return BARS[0] * len(values)
    last = len(BARS)
    return "".join(BARS[min(max(math.ceil(last * value / top), 1), last) - 1] for value in values)


def loss_label(loss_unit: str) -> str:
    """``KL`` only where the loss is one: in nats per prediction."""
    return "KL" if loss_unit == LOSS_IN_NATS else "loss"
