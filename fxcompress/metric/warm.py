"""A weight that is decomposed starting from where it was the last time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fxcompress.forms.target import Certificate, Losses, Ranks, Spectrum
from fxcompress.metric.spectrum import Whitened
from fxcompress.metric.subspace import Leading, leading
from fxcompress.metric.whiten import BlockWhitener, Whitener

OVERSAMPLING = 8
"""Components beside the rank that is expected, at least: the space settles the faster, the more
there are, ..."""

GROWTH = 16
"""... and one in so many of the rank, which may grow by these without a full decomposition."""


@dataclass(frozen=True, eq=False)
class Partial(Spectrum):
    """Leading components of a whitened weight; ``left @ right`` is not all of it.

    Attributes:
        found: the components, and the bound on all others.
    """

    found: Leading

    @property
    def certificate(self) -> Certificate:
        """The bound on all that was not looked at."""
        return self.found

    def loss(self) -> Tensor:
        """Loss at every rank 0..p of what the first components approximate."""
        return self.found.loss()

    def losses(self, ranks: Ranks) -> Losses:
        """That loss; infinite at ranks above p, which are not offered."""
        known = ranks <= len(self.sigma)
        out = np.full(len(ranks), np.inf)
        out[known] = self.found.loss().cpu().numpy()[ranks[known]]
        return cast("Losses", out)


@dataclass(frozen=True, eq=False)
class WarmStart:
    """A space that the leading components of a weight (m x n) are close to.

    Attributes:
        basis: columns in the longer dimension of the weight: (n x p) if m <= n, else (m x p).
        iterations, tight: as of :func:`fxcompress.metric.subspace.leading`.
    """

    basis: Tensor
    iterations: int = 1
    tight: bool = False

    def truncations(
        self, weight: Tensor, inputs: Whitener, outputs: Whitener | BlockWhitener
    ) -> Partial:
        """Leading components of a weight (m x n) in the metric of two factors.

        Raises:
            ValueError: the weight is not finite.
        """
        w = weight.detach().to(torch.promote_types(weight.dtype, torch.float32))
        whitened = Whitened.of(w, inputs, outputs)
        found = leading(whitened.matrix, self.basis.to(w.dtype), self.iterations, tight=self.tight)
        return Partial(found.sigma, *whitened.factors(found.left), found)


def start(
    spectrum: Spectrum, rank: int, inputs: Whitener, outputs: Whitener | BlockWhitener
) -> Tensor | None:
    """The basis of a :class:`WarmStart` the next time, if a rank is expected again.

    Args:
        spectrum: of the weight (m x n).
        rank: the expected one; None is returned for one that the spectrum does not have.
        inputs, outputs: whiteners that it was decomposed in.
    """
    if rank > len(spectrum.sigma):
        return None
    kept = rank + max(OVERSAMPLING, rank // GROWTH)
    m, n = len(spectrum.left), spectrum.right.shape[1]
    if isinstance(spectrum, Partial):
        return spectrum.found.right[:kept].T.contiguous()
    if m <= n:
        return inputs.into(spectrum.right[:kept].T).contiguous()
    return outputs.into(spectrum.left[:, :kept]).contiguous()
