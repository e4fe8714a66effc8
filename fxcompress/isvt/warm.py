"""A Kronecker metric that decomposes a weight starting from where it was the last time.

:class:`Warm` stands in for :class:`fxcompress.metric.quadratic.Kronecker` wherever forms ask for
a weight seen as one matrix; all other views are decomposed in full.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from torch import Tensor

from fxcompress.forms.target import Losses, Ranks, Spectrum, Truncations, View
from fxcompress.isvt.subspace import Leading, leading
from fxcompress.metric.quadratic import Kronecker
from fxcompress.metric.whiten import BlockWhitener, Whitener

OVERSAMPLING = 8
"""Components beside the rank that is expected: the space settles the faster, the more there are."""


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
        inputs, outputs = narrowed(self.inputs, w.dtype), narrowed(self.outputs, w.dtype)
        half = outputs.into(w)
        s = inputs.into(half.T).T
        basis = self.basis.to(w.dtype)
        if len(w) <= w.shape[1]:
            found = leading(s, basis, self.iterations, tight=self.tight)
            left, right = outputs.out_of(found.left), found.left.T @ half
        else:
            found = leading(s.T, basis, self.iterations, tight=self.tight)
            assert isinstance(inputs, Whitener)
            left, right = w @ inputs.colour(found.left), inputs.out_of(found.left).T
        return Partial(found.sigma, left, right, found)


def start(spectrum: Spectrum, metric: Kronecker, rank: int) -> Tensor:
    """What :class:`Warm` starts from the next time, if that rank is expected again.

    Args:
        spectrum: of the weight (m x n) in the metric, at least that many components.
        metric: it was decomposed in.
        rank: the expected one.
    """
    kept = rank + max(OVERSAMPLING, rank // OVERSAMPLING)
    m, n = len(spectrum.left), spectrum.right.shape[1]
    if isinstance(spectrum, Partial):
        return spectrum.found.right[:kept].T.contiguous()
    dtype = spectrum.left.dtype
    outer: Whitener | BlockWhitener = metric.inputs if m <= n else metric.outputs
    columns = spectrum.right[:kept].T if m <= n else spectrum.left[:, :kept]
    return narrowed(outer, dtype).into(columns).contiguous()


def narrowed(whitener: Whitener | BlockWhitener, dtype: torch.dtype) -> Whitener | BlockWhitener:
    """The same products in another type.

    Copies that are kept from step to step would take half as much memory again as the metric, and
    made no difference to the time of a step (``benchmark_steps.py``).
    """
    if isinstance(whitener, BlockWhitener):
        blocks = tuple(cast("Whitener", narrowed(block, dtype)) for block in whitener.blocks)
        return replace(whitener, blocks=blocks)
    root = whitener.root
    return Whitener(
        lower=None if whitener.lower is None else whitener.lower.to(dtype),
        root=None if root is None else (root[0].to(dtype), root[1].to(dtype)),
        scale=None if whitener.scale is None else whitener.scale.to(dtype),
        null=whitener.null,
    )
