"""Axes and drawings: what every plot on a page is made of."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

DECADES = 8
"""Values that are smaller than the largest by more decades stand at the low end of an axis."""


Text = Callable[[float], str]

NUMBER: Text = "{:.10g}".format
"""How ticks are written: ``0.001``, ``250``, ``1e-05``."""


@dataclass(frozen=True)
class Axis:
    """A scale of ``length`` pixels, linear or logarithmic.

    Attributes:
        low, high: values at its ends.
        values: of the ticks.
        title: what it shows, with the unit.
        text: how a tick is written.
    """

    low: float
    high: float
    length: int
    values: tuple[float, ...]
    logarithmic: bool = False
    title: str = ""
    text: Text = NUMBER

    def place(self, value: float) -> float:
        """Pixels from the low end, where everything below stands, too."""
        scale, low, pixels = self._scale
        return round((scale(min(max(value, self.low), self.high)) - low) * pixels, 1)

    @cached_property
    def _scale(self) -> tuple[Callable[[float], float], float, float]:
        """What is even on the axis, at its low end, and pixels for one of it."""
        scale: Callable[[float], float] = math.log10 if self.logarithmic else float
        low, high = scale(self.low), scale(self.high)
        return scale, low, self.length / (high - low)

    @property
    def ticks(self) -> tuple[tuple[float, str], ...]:
        """Pixels from the low end, and text."""
        return tuple((self.place(value), self.text(value)) for value in self.values)


def decades(values: Iterable[float], length: int, title: str = "") -> Axis:
    """A logarithmic axis between powers of ten; one of the values is positive at least."""
    logs = [math.log10(value) for value in values if value > 0]
    high = math.ceil(max(logs))
    low = min(max(math.floor(min(logs)), high - DECADES), high - 1)
    powers = [10.0**at for at in range(low, high + 1)]
    steps = (1, 2, 5) if high - low <= 2 else (1,)
    ticks = [factor * power for power in powers[:-1] for factor in steps]
    return Axis(powers[0], powers[-1], length, (*ticks, powers[-1]), True, title)


def even(
    values: Sequence[float], length: int, title: str = "", parts: int = 5, text: Text = NUMBER
) -> Axis:
    """A linear axis between round numbers, with about ``parts`` steps between ticks."""
    step = round_step(values, parts)
    low, high = math.floor(min(values) / step + 1e-6), math.ceil(max(values) / step - 1e-6)
    ticks = tuple(at * step for at in range(low, max(high, low + 1) + 1))
    return Axis(ticks[0], ticks[-1], length, ticks, title=title, text=text)


def round_step(values: Sequence[float], parts: int) -> float:
    """A round distance between ticks: 1, 2 or 5 times a power of ten, ``parts`` at most.

    >>> round_step([0, 47], 5), round_step([0.3, 1], 7)
    (10.0, 0.1)
    """
    size = max(map(abs, values)) or 1.0
    span = max(values) - min(values)
    raw = (span if span > 1e-9 * size else size) / parts  # alike: as if from zero
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)


@dataclass(frozen=True)
class Mark:
    """A point with a text, and a line from ``y - spread`` to ``y + spread`` through it."""

    x: float
    y: float
    text: str
    spread: float = 0.0


@dataclass(frozen=True)
class Line:
    """A straight line with a text at its first end; ``kind`` is a class of the style sheet."""

    kind: str
    x: tuple[float, float]
    y: tuple[float, float]
    text: str = ""


@dataclass(frozen=True)
class Plot:
    """One drawing: everything is given by its values, and placed by the axes.

    Attributes:
        title: what it shows.
        curve: points of a line through it.
        marks, lines: on top.
        note: what is not drawn.
    """

    title: str
    x: Axis
    y: Axis
    curve: tuple[tuple[float, float], ...] = ()
    marks: tuple[Mark, ...] = ()
    lines: tuple[Line, ...] = ()
    note: str = ""

    def down(self, value: float) -> float:
        """Pixels of a y from the top."""
        return round(self.y.length - self.y.place(value), 1)
