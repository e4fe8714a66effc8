"""A Kronecker metric that decomposes a weight starting from where it was the last time.

:class:`Warm` stands in for :class:`fxcompress.metric.quadratic.Kronecker` wherever forms ask for
a weight seen as one matrix; all other views are decomposed in full.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fxcompress.forms.target import Losses, Ranks, Spectrum, Truncations, View
from fxcompress.isvt.subspace import Leading, leading
from fxcompress.metric.quadratic import Kronecker
from fxcompress.metric.spectrum import Whitened

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
class Warm(Kronecker):
    """The same metric with a start.

    Attributes:
        basis: columns in the longer dimension of the weight: (n x p) if m <= n, else (m x p).
        iterations, tight: as of :func:`fxcompress.isvt.subspace.leading`.
    """

    basis: Tensor | None = None
    iterations: int = 1
    tight: bool = False

    def truncations(self, weight: Tensor, view: View) -> Truncations:
        """Leading components in the matrix view, everything in all others."""
        if view != "matrix" or self.basis is None:
            return super().truncations(weight, view)
        w = weight.detach().flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
        whitened = Whitened.of(w, self.inputs, self.outputs)
        basis = self.basis.to(w.dtype)
        found = leading(whitened.matrix, basis, self.iterations, tight=self.tight)
        return Partial(found.sigma, *whitened.factors(found.left), found)


def start(spectrum: Spectrum, metric: Kronecker, rank: int) -> Tensor:
    """What :class:`Warm` starts from the next time, if that rank is expected again.

    Args:
        spectrum: of the weight (m x n) in the metric, at least that many components.
        metric: it was decomposed in.
        rank: the expected one.
    """
    kept = rank + max(OVERSAMPLING, rank // GROWTH)
    m, n = len(spectrum.left), spectrum.right.shape[1]
    if isinstance(spectrum, Partial):
        return spectrum.found.right[:kept].T.contiguous()
    if m <= n:
        return metric.inputs.into(spectrum.right[:kept].T).contiguous()
    return metric.outputs.into(spectrum.left[:, :kept]).contiguous()
