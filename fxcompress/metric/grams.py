"""Running sums of ``xᵀ x``.

Products are taken in float32 (float64 for a float64 model), sums over the data in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from fxcompress.collective import Processes
from fxcompress.errors import CalibrationError
from fxcompress.metric.memory import GIB, free_memory
from fxcompress.metric.scaled import (
    PLAIN,
    ScaledSum,
    largest,
    reduce_scaled,
    times_power,
    unit_mean,
)

WIDE = 4096
"""From this width on, moments of few rows are kept as these rows."""

FEW = 4
"""Few are rows of which there are no more than a width divided by this."""


class GramSum:
    """Running sum of ``xᵀ x`` over batches of rows.

    Only the blocks on and above the diagonal are computed and kept: 5/8 of the work and of the
    memory of the full product.  Products are summed in float32 up to :data:`FLUSH` rows, as
    one long product would be, and from there on in float64.  Columns whose squares could leave the
    range of the type are multiplied by powers of two before: the sum is right for every finite x.
    """

    BLOCKS = 4
    FLUSH = 8192

    def __init__(
        self,
        features: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        *,
        diagonal: bool = False,
    ) -> None:
        self.diagonal = diagonal
        self.features = features
        self._rows = 0
        step = -(-features // self.BLOCKS) if features >= 64 * self.BLOCKS else features
        self._starts = [0] if diagonal else list(range(0, features, step))
        shapes = [(features,)] if diagonal else [
            (min(step, features - start), features - start) for start in self._starts
        ]  # fmt: skip
        self._sums = ScaledSum(shapes, device)
        self._recent = [torch.zeros(s, dtype=dtype, device=device) for s in shapes]
        self._powers: Tensor | None = None  # of the columns in what is recent; None for all 0
        self._exponent = 0  # of all of them
        self._safe = SAFE[dtype]

    def add(self, rows: Tensor, exponent: int = 0) -> bool:
        """Add rows (positions x features) times ``2^exponent``; False if they are not finite.

        Args:
            rows: of any floating type.
            exponent: of a power of two that they are to be multiplied by.
        """
        if not len(rows):
            return True
        rows = rows.to(self._recent[0].dtype)
        low, high = torch.aminmax(rows, dim=0)
        peaks = torch.maximum(high, -low)
        if not bool(peaks.isfinite().all()):
            return False
        if not bool(peaks.any()):
            return True
        powers = self._powers_for(peaks)
        if exponent != self._exponent or powers is not None or self._powers is not None:
            self._flush()
            self._powers, self._exponent = powers, exponent
        if powers is not None:
            half = powers // 2  # in two steps, as 2^-powers itself may be out of range
            rows = torch.ldexp(torch.ldexp(rows, -half), half - powers)
        for start, recent in zip(self._starts, self._recent, strict=True):
            if self.diagonal:
                recent += rows.square().sum(0)
            else:
                recent.addmm_(rows[:, start : start + len(recent)].T, rows[:, start:])
        self._rows += len(rows)
        if self._rows >= self.FLUSH:
            self._flush()
        return True

    def _powers_for(self, peaks: Tensor) -> Tensor | None:
        """Powers of two that columns are divided by, so that their squares can be summed."""
        least, most = self._safe
        if bool(((peaks == 0) | ((peaks >= least) & (peaks <= most))).all()):
            return None
        powers = torch.frexp(peaks).exponent
        return powers.where(peaks > 0, powers[peaks > 0].max())

    def _flush(self) -> None:
        if not self._rows:
            return
        if self._powers is None:
            self._sums.add(self._recent, self._exponent)
        else:
            top = int(self._powers.max())
            ones = torch.ones_like(self._powers, dtype=torch.float64)
            columns = torch.ldexp(ones, self._powers - top)
            self._sums.add(self._unscaled(columns), top + self._exponent)
        for recent in self._recent:
            recent.zero_()
        self._rows = 0

    def _unscaled(self, columns: Tensor) -> Iterator[Tensor]:
        """What is recent with its columns multiplied again."""
        for start, recent in zip(self._starts, self._recent, strict=True):
            if self.diagonal:
                yield recent * columns.square()
            else:
                yield recent * columns[start : start + len(recent), None] * columns[start:]

    def finish(self, count: int) -> Tensor:
        """The symmetric mean, the sum divided by ``count``; the sum itself is given up.

        It has to be in the range of float64: :func:`finish_together` is for any.
        """
        (mean,), exponent = finish_together([self], count)
        return times_power(mean, 2 * exponent)

    def _mean(self) -> Tensor:
        """The symmetric matrix, or its diagonal, of what was summed."""
        totals = self._sums.totals
        if self.diagonal:
            return totals.pop()
        shape = (self.features, self.features)
        mean = torch.empty(shape, dtype=torch.float64, device=totals[0].device)
        for start, total in zip(self._starts, totals, strict=True):
            stop = start + len(total)
            mean[start:stop, start:] = total
            mean[start:, start:stop] = total.T
            # The block on the diagonal was written twice; one half of it counts.
            square = total[:, : stop - start]
            mean[start:stop, start:stop] = square.triu() + square.triu(1).T
        totals.clear()
        return mean


SAFE: dict[torch.dtype, tuple[float, float]] = {
    torch.float32: (2.0**-32, 2.0**40),
    torch.float64: (2.0**-300, 2.0**400),
}
"""Largest values of a column between which its squares can be summed as they are: what is next
to them to rounding must not underflow, and 2^40 rows must not overflow."""


def reduce_grams(sums: Sequence[GramSum | RowSum | CountSum], processes: Processes) -> None:
    """Add up sums over all processes, which all have equally many of them.

    Rows that are few in all processes together stay rows.
    """
    rows = [each for each in sums if isinstance(each, RowSum)]
    counts = processes.gathered([each.known for each in rows])
    for each, known in zip(rows, zip(*counts, strict=True), strict=True):
        each.make_room([count for count, _ in known], processes.rank, [top for _, top in known])
    grams = [each.gram if isinstance(each, RowSum) else each for each in sums]
    products = [each for each in grams if isinstance(each, GramSum)]
    for gram in products:
        gram._flush()
    reduce_scaled([gram._sums for gram in products], processes)
    roots = [root for each in rows for root, _ in each._rows]
    processes.sum(*roots, *(each._sum for each in sums if isinstance(each, CountSum)))


def finish_together(sums: Sequence[GramSum], count: int) -> tuple[list[Tensor], int]:
    """The means of several sums, those of the groups of a convolution, say, in one unit.

    Args:
        sums: are given up.
        count: that they are divided by.

    Returns:
        The means, and e: they are in units of ``4^e``.
    """
    for each in sums:
        each._flush()
        each._recent.clear()
    top = max(each._sums.exponent for each in sums)
    means = []
    for each in sums:
        mean = each._mean()
        if each._sums.exponent != top:
            times_power(mean, 2 * (each._sums.exponent - top), out=mean)
        means.append(mean)
    peak = max(float(_diagonal(mean).max()) for mean in means)
    return means, unit_mean(means, top, count, peak)


def _diagonal(mean: Tensor) -> Tensor:
    return mean if mean.dim() == 1 else mean.diagonal()


class RowSum:
    """Running sum of ``xᵀ x`` over batches of rows: the rows themselves while they are few.

    A matrix of r rows has rank r: where r is much less than the number of features, the rows take
    less memory than the product (features x features), and less time to work with.

    Args:
        features, device, dtype: as of :class:`GramSum`, which takes over when rows are many.
        what: is summed up, for messages.
    """

    def __init__(
        self,
        features: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        what: str = "",
    ) -> None:
        self.features, self.device, self.dtype = features, device, dtype
        self.what = what
        self._rows: list[tuple[Tensor, int]] = []
        self._count = 0
        self.gram: GramSum | None = None

    def add(self, rows: Tensor, exponent: int = 0) -> bool:
        """Add rows (positions x features) times ``2^exponent``; False if they are not finite.

        Raises:
            CalibrationError: they are too many to be kept, and the product takes more memory
                than there is.
        """
        self._count += len(rows)
        if self.gram is None and self._count > self.features // FEW:
            self._multiply()
        if self.gram is not None:
            return self.gram.add(rows, exponent)
        self._rows.append((rows.detach().clone(), exponent))
        return bool(rows.isfinite().all())

    def _multiply(self) -> None:
        """Go over to the product."""
        self._require_memory()
        self.gram = GramSum(self.features, self.device, self.dtype)
        for kept, power in self._rows:
            self.gram.add(kept, power)
        self._rows.clear()

    @property
    def known(self) -> tuple[int, int | None]:
        """How many rows there are, and the exponent of the largest entry, if any is kept."""
        return self._count, self._top

    @property
    def _top(self) -> int | None:
        peaks = [math.frexp(peak)[1] + power for x, power in self._rows if (peak := largest(x)) > 0]
        return max(peaks, default=None)

    def make_room(self, counts: Sequence[int], rank: int, tops: Sequence[int | None]) -> None:
        """Make place for the rows of other processes, to which theirs can be added.

        Args:
            counts: of rows in every process.
            rank: of this one.
            tops: exponents of the largest entries of each, as of :attr:`known`.
        """
        total = sum(counts)
        if total > self.features // FEW:
            if self.gram is None:
                self._multiply()
            return
        exponent = max((top for top in tops if top is not None), default=0)
        own, at = self._root(exponent), sum(counts[:rank])
        root = own.new_zeros(total, self.features)
        root[at : at + len(own)] = own
        self._rows, self._count = [(root, exponent)], total

    def finish(self, count: int) -> Tensor:
        """The sum divided by ``count`` (features x features), or a root of it (r x features).

        The sum itself is given up.  It has to be in the range of float64.
        """
        mean, exponent = self.finish_scaled(count)
        few = len(mean) < self.features
        return times_power(mean, exponent if few else 2 * exponent)

    def finish_scaled(self, count: int) -> tuple[Tensor, int]:
        """The mean of rows of any size, and e: it is in units of ``4^e``, a root of ``2^e``."""
        if self.gram is not None:
            (mean,), exponent = finish_together([self.gram], count)
            return mean, exponent
        top = self._top or 0
        exponent = 0 if 2 * abs(top) <= PLAIN else max(min(top, 1023), -1022)
        root = self._root(exponent)
        self._rows.clear()
        root *= max(count, 1) ** -0.5
        return root, exponent

    def _root(self, exponent: int) -> Tensor:
        """All rows (r x features) in units of ``2^exponent``, float64."""
        root = torch.zeros(self._count, self.features, dtype=torch.float64, device=self.device)
        start = 0
        for x, power in self._rows:
            root[start : start + len(x)] = times_power(x.to(torch.float64), power - exponent)
            start += len(x)
        return root

    def _require_memory(self) -> None:
        # The sum and the mean, and later the damped mean and its root.
        needed, free = 4 * 8 * self.features**2, free_memory(self.device)
        if needed < GIB or free is None or needed <= free:
            return
        raise CalibrationError(
            f"the second moments of the {self.what}, {self.features:,} wide, take about "
            f"{needed / GIB:.0f} GiB, and {free / GIB:.1f} GiB are free. Up to "
            f"{self.features // FEW:,} positions they take little: calibrate on less data, or "
            "exclude the layer (unless: [{name: ...}]), or choose metric: {kind: diagonal}"
        )


class CountSum:
    """How often each of ``features`` indices occurs: the Gram of their one-hot vectors."""

    def __init__(self, features: int, device: torch.device) -> None:
        self.features = features
        self._sum = torch.zeros(features, dtype=torch.float64, device=device)

    def add(self, indices: Tensor) -> None:
        """Add indices (positions)."""
        self._sum += torch.bincount(indices, minlength=self.features)

    def finish(self, count: int) -> Tensor:
        """The mean (features): the counts divided by ``count``."""
        return self._sum / max(count, 1)
