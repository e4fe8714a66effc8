"""Truncation of a convolution in two modes: its input channels, then its output channels.

The subspace of r_1 input channels and the coordinates T (m x r_1·k) of the weight in it are those
of the view ``input`` (:mod:`fxcompress.metric.split`).  Given them, the best r_2 output channels
are the leading left singular vectors of T in whitened coordinates: a sequentially truncated
HOSVD (Vannieuwenhoven, Vandebril, Meerbergen 2012).  The loss of both steps adds up, exactly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fxcompress.forms.target import Losses, Rank, Ranks, tail
from fxcompress.metric.split import SplitTruncations


@dataclass(frozen=True, eq=False)
class TuckerTruncations:
    """Approximations of one group of a convolution, of every pair of ranks (r_1, r_2).

    Attributes:
        inputs: the split in the view ``input``.
    """

    inputs: SplitTruncations
    _tails: dict[int, Tensor] = field(default_factory=dict)

    @property
    def sigma(self) -> Tensor:
        """Root of the loss that each input channel carries (k)."""
        return self.inputs.sigma

    def losses(self, ranks: Ranks) -> Losses:
        """At pairs (k x 2) of input and output ranks."""
        firsts = self.inputs.losses(ranks[:, 0])
        seconds = [self._tail(int(first))[int(second)] for first, second in ranks]
        return cast("Losses", firsts + np.array([float(each) for each in seconds]))

    def factors(self, rank: Rank) -> tuple[Tensor, Tensor, Tensor]:
        """(m x r_2), (r_2 x r_1 x k), (r_1 x n)."""
        assert isinstance(rank, tuple)
        first, second = rank
        split = self.inputs
        t = split.coordinates[:, :first].flatten(1)
        vectors = torch.linalg.eigh(t @ t.T).eigenvectors.flip(1)[:, :second]
        left, right = split.factors(first)
        # L_Gᵀ W ≈ Y Yᵀ L_Gᵀ W: the core is what is left of the layer above the inputs.
        above = split.outputs.into(left.to(torch.float64).flatten(1))
        core = (vectors.T @ above).reshape(second, first, -1)
        unit = split.outputs.unit  # which would leave the range of a narrow type
        below, core = split.outputs.out_of(vectors) * unit, core / unit
        return below.to(left.dtype), core.to(left.dtype), right

    def _tail(self, first: int) -> Tensor:
        """Loss of the output step at every r_2 from 0 to m, after r_1 input channels."""
        if first not in self._tails:
            t = self.inputs.coordinates[:, :first].flatten(1)
            values = torch.linalg.eigvalsh(t @ t.T).clamp_min(0).flip(0)
            self._tails[first] = tail(0.5 * values).cpu()
        return self._tails[first]
