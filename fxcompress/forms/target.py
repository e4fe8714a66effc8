"""What a form approximates: a weight, decomposed in its metric."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Spectrum:
    """The decomposition of one weight W (m x n), with k = min(m, n) components.

    Attributes:
        sigma: singular values of the whitened weight (k), float64, non-increasing.
        left: (m x k); its first r columns times the first r rows of ``right`` are the best
            approximation of rank r in the metric.
        right: (k x n).  ``left @ right`` is W to rounding, whatever the metric.
    """

    sigma: Tensor
    left: Tensor
    right: Tensor

    def loss(self) -> Tensor:
        """Predicted loss at every rank 0..k: ``½ Σ_{i>r} σ_i²`` (k + 1), float64."""
        return tail(0.5 * self.sigma.square())


@dataclass(frozen=True, eq=False)
class Target:
    """One weight, or several on one input stacked to one, as a form sees it.

    Attributes:
        weight: W (m x n), in the model's type.
        spectrum: its decomposition in the metric.
        loss: predicted loss of replacing W by another matrix (m x n), in nats per prediction
            for a Fisher metric: ``½ tr(G Δ A Δᵀ)``, damping included.
    """

    weight: Tensor
    spectrum: Spectrum
    loss: Callable[[Tensor], float]


def tail(terms: Tensor) -> Tensor:
    """Sums of the last k, k - 1, ..., 0 entries of the last dimension (... x k + 1)."""
    sums = terms.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums, sums.new_zeros(*sums.shape[:-1], 1)], -1)
