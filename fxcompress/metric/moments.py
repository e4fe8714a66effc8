"""Second moments of the inputs and output gradients of an operator.

Layout: an operator maps rows ``a`` (n) to rows ``W a`` (m); a *position* is one such row.  The rows
of a convolution are patches of its input, in each group (n/g·k to m/g), and everything has a
leading dimension of g groups; those of an embedding are one-hot vectors.
Products are taken in float32 (float64 for a float64 model), sums over the data in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError
from fxcompress.metric.memory import GIB, free_memory

Statistic = Literal["input", "output", "weight", "entries"]

LARGEST_OUTPUT = 16384
"""From this width on (a vocabulary, say) only the diagonal of G is kept."""

WIDE = 4096
"""From this width on, moments of few rows are kept as these rows."""

FEW = 4
"""Few are rows of which there are no more than a width divided by this."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of one site; those that the metric did not ask for are None.

    Attributes:
        input: A = mean over positions of ``a aᵀ`` (n x n), float64; for an embedding its diagonal
            (V), how often each row is looked up.  Of few rows (:class:`RowSum`) a root R (r x n),
            ``A = Rᵀ R``; so is G.
        output: G = sum over positions of ``g gᵀ`` per *prediction* (m x m), or its diagonal (m)
            if m >= :data:`LARGEST_OUTPUT`; float64.  With the sum over positions divided by the
            number of predictions, ``A ⊗ G`` is the K-FAC Fisher per prediction, also where
            a prediction is made from many positions (an image classifier).
        weight: mean over each row of W of the diagonal of the Fisher per prediction (m), float64.
        entries: the diagonal of the Fisher per prediction (m x n), float64.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    weight: Tensor | None = None
    entries: Tensor | None = None


class GramSum:
    """Running sum of ``xᵀ x`` over batches of rows.

    Only the blocks on and above the diagonal are computed and kept: 5/8 of the work and of the
    memory of the full product.  Products are summed in float32 up to :data:`FLUSH` rows, as
    one long product would be, and from there on in float64.
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
        self._sums = [torch.zeros(s, dtype=torch.float64, device=device) for s in shapes]
        self._recent = [torch.zeros(s, dtype=dtype, device=device) for s in shapes]

    def add(self, rows: Tensor) -> bool:
        """Add rows (positions x features) of any floating type; False if they are not finite."""
        rows = rows.to(self._recent[0].dtype)
        finite = True
        for start, recent in zip(self._starts, self._recent, strict=True):
            if self.diagonal:
                recent += rows.square().sum(0)
                squares = recent
            else:
                recent.addmm_(rows[:, start : start + len(recent)].T, rows[:, start:])
                squares = recent.diagonal()
            finite = finite and bool(squares.sum().isfinite())
        self._rows += len(rows)
        if self._rows >= self.FLUSH:
            self._flush()
        return finite

    def _flush(self) -> None:
        for total, recent in zip(self._sums, self._recent, strict=True):
            total += recent
            recent.zero_()
        self._rows = 0

    def finish(self, count: int) -> Tensor:
        """The symmetric mean, the sum divided by ``count``; the sum itself is given up."""
        self._flush()
        self._recent.clear()
        if self.diagonal:
            return self._sums.pop() / max(count, 1)
        shape = (self.features, self.features)
        mean = torch.empty(shape, dtype=torch.float64, device=self._sums[0].device)
        for start, total in zip(self._starts, self._sums, strict=True):
            stop = start + len(total)
            total /= max(count, 1)
            mean[start:stop, start:] = total
            mean[start:, start:stop] = total.T
            # The block on the diagonal was written twice; one half of it counts.
            square = total[:, : stop - start]
            mean[start:stop, start:stop] = square.triu() + square.triu(1).T
        self._sums.clear()
        return mean


class RowSum:
    """Running sum of ``xᵀ x`` over batches of rows: the rows themselves while they are few.

    A matrix of r rows has rank r: where r is much less than the number of features, the rows take
    less memory than the product (features x features), and less time to work with.

    Args:
        features, device, dtype: as of :class:`GramSum`, which takes over when rows are many.
        what: is summed up, for messages.
        root: whether the mean of few rows is given as a root.
    """

    def __init__(
        self,
        features: int,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        what: str = "",
        *,
        root: bool = True,
    ) -> None:
        self.features, self.device, self.dtype = features, device, dtype
        self.what, self.root = what, root
        self._rows: list[Tensor] = []
        self._count = 0
        self._gram: GramSum | None = None

    def add(self, rows: Tensor) -> bool:
        """Add rows (positions x features) of any floating type; False if they are not finite.

        Raises:
            CalibrationError: they are too many to be kept, and the product takes more memory
                than there is.
        """
        if self._gram is not None:
            return self._gram.add(rows)
        self._count += len(rows)
        if self._count <= self.features // FEW:
            self._rows.append(rows.detach().clone())
            return bool(rows.isfinite().all())
        self._require_memory()
        self._gram = GramSum(self.features, self.device, self.dtype)
        for kept in self._rows:
            self._gram.add(kept)
        self._rows.clear()
        return self._gram.add(rows)

    def finish(self, count: int) -> Tensor:
        """The sum divided by ``count`` (features x features), or a root of it (r x features).

        The sum itself is given up.
        """
        if self._gram is not None:
            return self._gram.finish(count)
        root = torch.zeros(self._count, self.features, dtype=torch.float64, device=self.device)
        start = 0
        for rows in self._rows:
            root[start : start + len(rows)] = rows
            start += len(rows)
        self._rows.clear()
        root *= max(count, 1) ** -0.5
        return root if self.root else root.T @ root

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
