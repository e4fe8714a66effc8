"""Second moments of the inputs and output gradients of a linear operator.

Layout: an operator maps rows ``a`` (n) to rows ``W a`` (m); a *position* is one such row.
Products are taken in float32 (float64 for a float64 model), sums over batches in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Statistic = Literal["input", "output", "weight"]

LARGEST_OUTPUT = 16384
"""From this width on (a vocabulary, say) only the diagonal of G is kept."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of one site; those that the metric did not ask for are None.

    Attributes:
        input: A = mean over positions of ``a aᵀ`` (n x n), float64.
        output: G = sum over positions of ``g gᵀ`` per *prediction* (m x m), or its diagonal (m)
            if m >= :data:`LARGEST_OUTPUT`; float64.  With the sum over positions divided by the
            number of predictions, ``A ⊗ G`` is the K-FAC Fisher per prediction, also where
            a prediction is made from many positions (an image classifier).
        weight: mean over each row of W of the diagonal of the Fisher per prediction (m), float64.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    weight: Tensor | None = None


class GramSum:
    """Running sum of ``xᵀ x`` over batches of rows, in float64.

    Only the blocks on and above the diagonal are computed: 5/8 of the work of the full product.
    """

    BLOCKS = 4

    def __init__(self, features: int, device: torch.device, *, diagonal: bool = False) -> None:
        self.diagonal = diagonal
        shape = (features,) if diagonal else (features, features)
        self.total = torch.zeros(shape, dtype=torch.float64, device=device)

    def add(self, rows: Tensor) -> None:
        """Add rows (positions x features) of any floating type."""
        rows = rows if rows.dtype == torch.float64 else rows.float()
        if self.diagonal:
            self.total += rows.square().sum(0)
            return
        features = rows.shape[1]
        step = -(-features // self.BLOCKS) if features >= 64 * self.BLOCKS else features
        for start in range(0, features, step):
            stop = min(start + step, features)
            self.total[start:stop, start:] += rows[:, start:stop].T @ rows[:, start:]

    def finish(self, count: int) -> Tensor:
        """The symmetric mean, ``total / count``."""
        mean = self.total / max(count, 1)
        return mean if self.diagonal else mean.triu() + mean.triu(1).T

    def is_finite(self) -> bool:
        diagonal = self.total if self.diagonal else self.total.diagonal()
        return bool(diagonal.sum().isfinite())
