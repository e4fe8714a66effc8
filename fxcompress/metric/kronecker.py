"""Metrics that are a Kronecker product at every site: ``½ tr(G Δ A Δᵀ)``.

A is of the inputs (n x n), G of the output gradients (m x m).  A convolution is a linear map of
patches: the weight (m x n x kernel) of a group is the matrix (m x n·k), A the second moments of
patches, G those of output gradients at a position.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from fxcompress.forms.target import Spectrum, Truncations, View
from fxcompress.metric.channels import ChannelTruncations, chosen
from fxcompress.metric.metric import Metric, Need, by_group
from fxcompress.metric.moments import Moments, is_root
from fxcompress.metric.quadratic import Factors, Grouped, QuadraticForm
from fxcompress.metric.spectrum import decompose_whitened, quadratic_loss
from fxcompress.metric.split import SplitTruncations, TuckerTruncations
from fxcompress.metric.warm import WarmStart, start
from fxcompress.metric.whiten import BlockWhitener, Factor, Whitener, Whiteners
from fxcompress.operators.shape import Shape


@dataclass(frozen=True, eq=False)
class Kronecker(QuadraticForm):
    """The form of a weight that is a matrix (m x n), or one group of a convolution.

    Attributes:
        inputs: whitens A, over inputs or patches.
        outputs: whitens G.
        warm: where truncations of a matrix start from; None for nowhere.
    """

    inputs: Whitener
    outputs: Whitener | BlockWhitener
    warm: WarmStart | None = None

    @property
    def null(self) -> bool:
        """Whether no change of the weight makes a difference."""
        return self.inputs.null or self.outputs.null

    @property
    def factors(self) -> Factors:
        """A and G."""
        return Factors(self.inputs, self.outputs)

    def loss(self, change: Tensor) -> float:
        """Predicted loss of a change (m x n), or (m x n x kernel)."""
        return quadratic_loss(change.flatten(1), self.inputs, self.outputs)

    def truncations(self, weight: Tensor, view: View) -> Truncations:
        """Approximations of a weight (m x n), or (m x n x kernel)."""
        if view == "channels":
            return self.channels(weight)
        if view == "tucker2":
            return TuckerTruncations(self._split(weight, "input"))
        if view != "matrix":
            return self._split(weight, view)
        if self.warm is not None:
            return self.warm.truncations(weight.flatten(1), self.inputs, self.outputs)
        return decompose_whitened(weight.flatten(1), self.inputs, self.outputs)

    def channels(self, weight: Tensor, order: Tensor | None = None) -> ChannelTruncations:
        """Fewer channels of a weight (m x n), or (m x n x kernel), the rest refitted."""
        return chosen(weight, self.inputs, self.outputs, order)

    def restricted(self, rows: Tensor | None = None, inputs: Tensor | None = None) -> Kronecker:
        """With rows and columns of A and G left out, damping included."""
        outputs = self.outputs
        assert isinstance(outputs, Whitener)
        return Kronecker(
            self.inputs if inputs is None else self.inputs.restricted(inputs),
            outputs if rows is None else outputs.restricted(rows),
        )

    def _split(self, weight: Tensor, view: View) -> SplitTruncations:
        return SplitTruncations.of(weight, self.inputs, self.outputs, view)

    def solve(self, gradient: Tensor) -> Tensor:
        """``G⁻¹ ∇ A⁻¹``."""
        wide = gradient.to(torch.float64)
        if self.null:
            return torch.zeros_like(wide)
        return self.inputs.solve(self.outputs.solve(wide.flatten(1)).T).T.reshape(wide.shape)

    @classmethod
    def stacked(cls, parts: Sequence[Kronecker], rows: Sequence[int]) -> Kronecker:
        """The output factor becomes block diagonal; all weights have one input factor."""
        blocks = tuple(part.outputs for part in parts)
        return Kronecker(parts[0].inputs, BlockWhitener(blocks, tuple(rows)))

    def shares(
        self, weight: Tensor, found: Truncations, rows: Sequence[int]
    ) -> Callable[[int], Tensor]:
        """By the share of every weight in each component."""
        assert isinstance(found, Spectrum)
        whitened = torch.split(self.outputs.into(found.left.to(torch.float64)), list(rows))
        energy = torch.stack([part.square().sum(0) for part in whitened])
        sizes = energy / energy.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
        return partial(tails, sizes * found.sigma.square())  # without the factors

    def for_matrices(self) -> Kronecker:
        """The form without A and G, which are as large as their roots."""
        return Kronecker(self.inputs.without_matrix(), self.outputs.without_matrix())

    def starting_from(self, basis: Tensor, iterations: int) -> Kronecker:
        """The form, warm in the matrix view; other views are decomposed in full."""
        return replace(self, warm=WarmStart(basis, iterations, tight=iterations > 1))

    def start(self, found: Truncations, rank: int) -> Tensor | None:
        """The leading components of a weight in the coordinates of its longer side."""
        assert isinstance(found, Spectrum)
        return start(found, rank, self.inputs, self.outputs)


def tails(energies: Tensor, rank: int) -> Tensor:
    """What components (g x k) from a rank on have of the loss of every weight (g)."""
    return energies[:, rank:].sum(1)


class KroneckerMetric(Metric):
    """A metric that is a Kronecker product at every site."""

    def __init__(
        self,
        name: str,
        needs: frozenset[Need],
        unit: str,
        factors: Callable[[Moments], tuple[Factor, Factor]],
        *,
        damped: tuple[bool, bool] = (True, True),
        directions: bool = False,
    ) -> None:
        """Describe the metric.

        Args:
            name, needs, unit, damped, directions: as of :class:`Metric`.
            factors: from a site's moments to its input factor A (n x n) and its output factor
                G (m x m), each in the units of the moments that it was made of; of a convolution
                one for each group, with a leading dimension.
        """
        self.name, self.needs, self.unit = name, needs, unit
        self.factors = factors
        self.damped, self.directions = damped, directions

    def form(self, moments: Moments, damping: tuple[float, float]) -> Kronecker:
        """The factors, damped, as whiteners."""
        (found,) = self._forms(moments, Whiteners(damping), 0)
        return found

    def quadratic(self, shape: Shape, moments: Moments, whiteners: Whiteners) -> QuadraticForm:
        """The factors, damped, as whiteners; sites on one input share one."""
        groups = by_group(shape)
        found = self._forms(moments, whiteners, groups)
        return Grouped(found) if groups else found[0]

    def _forms(self, moments: Moments, whiteners: Whiteners, groups: int) -> tuple[Kronecker, ...]:
        a, g = self.factors(moments)
        first, second = _units(moments)
        inputs = whiteners.inputs(a, groups, first)
        pairs = zip(inputs, whiteners.outputs(g, groups, second), strict=True)
        return tuple(Kronecker(*pair) for pair in pairs)

    def undamped_loss(self, shape: Shape, moments: Moments, change: Tensor) -> float:
        """``½ tr(G Δ A Δᵀ)`` by the moments themselves, whatever their rank."""
        found = self.factors(moments)
        for factor, unit in zip(found, _units(moments), strict=True):
            if factor is not None:
                change = change * unit
        groups = by_group(shape)
        parts = change.flatten(2) if groups else change[None]
        factors = [
            [None] * len(parts) if factor is None else [*factor] if groups else [factor]
            for factor in found
        ]
        return 0.5 * sum(
            float((_times(g, part) * _times(a, part.T).T).sum())
            for a, g, part in zip(*factors, parts, strict=True)
        )


def _units(moments: Moments) -> tuple[float, float]:
    """What the roots of the input and of the output factor are in units of."""
    first, second, third = moments.units
    return first, third if moments.output is None else second


def _times(factor: Factor, x: Tensor) -> Tensor:
    """``M x`` (d x k) for a factor M (d x d), or its diagonal, or a root of it (r x d)."""
    if factor is None:
        return x
    factor = factor.to(x.dtype)
    if is_root(factor):
        return factor.T @ (factor @ x)
    return factor[:, None] * x if factor.dim() == 1 else factor @ x
