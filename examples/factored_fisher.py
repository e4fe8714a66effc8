"""A metric of one's own: the diagonal of the Fisher by its sums over rows and columns.

``elementwise`` weighs every entry of W by ``F_ij = E[(∂ log p / ∂W_ij)²]``: no closed form, and
as many numbers as the weight has.  Adafactor (Shazeer and Stern 2018, arXiv 1804.04235) keeps of
such second moments the sums over rows r and over columns c,

    F ≈ r cᵀ / Σ r,

the matrix of rank one that is nearest to F in the generalized Kullback-Leibler divergence.  In it
the loss ``½ Σ_ij F_ij Δ_ij²`` is that of two diagonal factors, ``G = diag(r)`` and
``A = diag(c / Σ r)``: nats per prediction, and one decomposition for all ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

import fxcompress
from fxcompress.metric import Factor, KroneckerMetric, Moments, Statistic


class Sums(Statistic):
    """Squares of the gradient of every sample, summed over one side of the weight."""

    reads = "weights"

    def __init__(self, name: str, side: int) -> None:
        self.name, self.side = name, side

    def size(self, m: int, n: int) -> tuple[int]:
        return ((m, n)[self.side],)

    def added(self, found: Tensor) -> Tensor:  # (samples x groups x m x n)
        return found.double().square().sum((0, 3 - self.side))


def factors(moments: Moments) -> tuple[Factor, Factor]:
    rows, columns = moments.own["rows"], moments.own["columns"]
    total = rows.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return columns / total, rows


fxcompress.register_metric(
    KroneckerMetric(
        "factored", frozenset({Sums("rows", 0), Sums("columns", 1)}), "nats per prediction", factors
    )
)
