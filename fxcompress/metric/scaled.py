"""Sums and products of numbers of all sizes, by powers of two that are taken out."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from fxcompress.collective import Processes


class ScaledSum:
    """Running sum of float64 tensors times powers of four; finite whatever their size.

    ``Σ x_i 4^(e_i)`` is kept as ``total 4^exponent``, so that squares of 1e300 and of 1e-300 can be
    summed, too.  What is 2^800 times smaller than the rest is rounded away, as it would be anyway.
    """

    SPAN = 400
    """Of exponents that are summed without a change of scale."""

    def __init__(self, shapes: Sequence[Sequence[int]], device: torch.device) -> None:
        self.totals = [torch.zeros(*s, dtype=torch.float64, device=device) for s in shapes]
        self.exponent = 0
        self._empty = True

    def scale_to(self, exponent: int) -> float:
        """By what to multiply something in units of ``4^exponent`` before it is added."""
        near = abs(exponent) <= self.SPAN // 4
        if self._empty:
            self.exponent = 0 if near else exponent
            self._empty = False
        elif exponent > self.exponent + self.SPAN:
            for total in self.totals:
                times_power(total, 2 * (self.exponent - exponent), out=total)
            self.exponent = exponent
        return 2.0 ** max(2 * (exponent - self.exponent), -1074)

    def add(self, parts: Iterable[Tensor], exponent: int = 0) -> None:
        """Add tensors (of ``shapes``) that are not all zero, times ``4^exponent``."""
        factor = self.scale_to(exponent)
        for total, part in zip(self.totals, parts, strict=True):
            total.add_(part, alpha=factor)


def reduce_scaled(sums: Sequence[ScaledSum], processes: Processes) -> None:
    """Add up sums over all processes, which all have equally many of them."""
    exponents = processes.gathered([None if s._empty else s.exponent for s in sums])
    filled: list[Tensor] = []
    for each, known in zip(sums, zip(*exponents, strict=True), strict=True):
        top = max((exponent for exponent in known if exponent is not None), default=None)
        if top is None:
            continue  # zero everywhere
        if not each._empty and each.exponent != top:
            for total in each.totals:
                times_power(total, 2 * (each.exponent - top), out=total)
        each.exponent, each._empty = top, False
        filled += each.totals
    processes.sum(*filled)


def times_power(x: Tensor, exponent: int, out: Tensor | None = None) -> Tensor:
    """``x 2^exponent``, exact unless the result itself leaves the range of its type."""
    if not exponent and out is None:
        return x
    half = exponent // 2
    first = torch.mul(x, 2.0 ** max(half, -1074), out=out)
    return torch.mul(first, 2.0 ** max(exponent - half, -1074), out=out)


def largest(x: Tensor) -> float:
    """The largest absolute value, 0 of an empty tensor."""
    if not x.numel():
        return 0.0
    low, high = torch.aminmax(x)
    return max(float(high), -float(low))


def normalized(x: Tensor) -> tuple[Tensor, int]:
    """A tensor whose largest entry is near 1 and the power of two that it was divided by.

    As it is, with 0, if it is zero, is of integers, or can be squared as it is.
    """
    peak = largest(x) if x.is_floating_point() else 0.0
    if not 0 < peak < math.inf or 2.0**-20 <= peak <= 2.0**20:
        return x, 0
    exponent = math.frexp(peak)[1]
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    return times_power(wide, -exponent), exponent


def unit_mean(parts: Sequence[Tensor], exponent: int, count: int, peak: float) -> int:
    """Divide sums by a count, in place, and bring them into range.

    Args:
        parts: sums, in units of ``4^exponent``.
        exponent: as said.
        count: of what was summed.
        peak: their largest entry.

    Returns:
        The exponent of what the means are in units of (``4^e``): 0 if they can do without.
    """
    mean = peak / max(count, 1)
    for part in parts:
        part /= max(count, 1)
    if not mean:
        return 0
    own = math.frexp(mean)[1]
    whole = own + 2 * exponent
    wanted = 0 if abs(whole) <= PLAIN else max(min(own // 2 + exponent, 1023), -1022)
    if wanted != exponent:
        for part in parts:
            times_power(part, 2 * (exponent - wanted), out=part)
    return wanted


PLAIN = 64
"""Means between 2^-64 and 2^64 are kept as they are, others in units of a power of four."""
