"""Measured against predicted losses, as a drawing on two logarithmic scales."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fxcompress.plans.plan import Plan
from fxcompress.report.quantities import LOSS_IN_NATS, loss, with_error

SIDE = 380
"""Length of both axes, in pixels."""

DECADES = 6
"""Losses that are smaller than the largest by more decades are drawn at the edge."""


@dataclass(frozen=True)
class Axis:
    """Whole decades, ``10^low`` to ``10^high``."""

    low: int
    high: int

    def place(self, value: float) -> float:
        """Pixels from the low end, which is also where everything below stands."""
        log = math.log10(value) if value > 0 else -math.inf
        return round(SIDE * (max(log, self.low) - self.low) / (self.high - self.low), 1)

    @property
    def ticks(self) -> tuple[tuple[float, int], ...]:
        """Place and exponent of every decade."""
        return tuple((self.place(10.0**at), at) for at in range(self.low, self.high + 1))


@dataclass(frozen=True)
class Mark:
    """One site: places from the lower left, two standard errors either way, and a text."""

    x: float
    y: float
    low: float
    high: float
    text: str


@dataclass(frozen=True)
class Scatter:
    """A drawing; where both axes have one unit they are the same, and equality is a diagonal."""

    x: Axis
    y: Axis
    diagonal: bool
    marks: tuple[Mark, ...]


def fidelity_scatter(plan: Plan) -> Scatter | None:
    """What :func:`fxcompress.measure` found; None without it, or if nothing was lost anywhere."""
    sites = () if plan.fidelity is None else plan.fidelity.sites
    predicted, measured = [one.predicted for one in sites], [one.measured for one in sites]
    diagonal = plan.loss_unit == LOSS_IN_NATS
    x, y = _axis(predicted), _axis(measured)
    if x is None or y is None:
        return None
    if diagonal:
        x = y = Axis(min(x.low, y.low), max(x.high, y.high))
    marks = tuple(
        Mark(
            x.place(one.predicted),
            y.place(one.measured),
            y.place(one.measured - 2 * (one.error or 0.0)),
            y.place(one.measured + 2 * (one.error or 0.0)),
            f"{one.name}: predicted {loss(one.predicted)}, "
            f"measured {with_error(one.measured, one.error)}",
        )
        for one in sites
    )
    return Scatter(x, y, diagonal, marks)


def _axis(values: Sequence[float]) -> Axis | None:
    logs = [math.log10(value) for value in values if value > 0]
    if not logs:
        return None
    high = math.ceil(max(logs))
    low = min(max(math.floor(min(logs)), high - DECADES), high - 1)
    return Axis(low, high)
