"""The Kronecker metric at one site: ``½ tr(G Δ A Δᵀ)``, for a matrix and for a convolution.

A convolution is a linear map of patches: its canonical weight (m x n x kernel) of a group is the
matrix (m x n·k), A the second moments of patches, G those of output gradients at a position.
The groups are independent of one another: a Fisher block each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fxcompress.forms.target import (
    Losses,
    Quadratic,
    Rank,
    Ranks,
    Spectrum,
    Target,
    Truncations,
    View,
    stack,
)
from fxcompress.metric.elementwise import Elementwise
from fxcompress.metric.metric import Factor, Metric
from fxcompress.metric.moments import Moments, is_root
from fxcompress.metric.spectrum import decompose_whitened, quadratic_loss
from fxcompress.metric.split import SplitTruncations
from fxcompress.metric.tucker import TuckerTruncations
from fxcompress.metric.whiten import BlockWhitener, Whitener, whitener
from fxcompress.operators.shape import Shape, is_grouped


class Whiteners:
    """Whiteners of factors; the last input factor is remembered, as sites on one input share it.

    Args:
        damping: of the input and of the output factor.
    """

    def __init__(self, damping: tuple[float, float]) -> None:
        self.damping = damping
        self._last: tuple[Factor, list[Whitener]] | None = None

    def inputs(self, factor: Factor, groups: int, unit: float = 1.0) -> list[Whitener]:
        """Of an input factor in units of ``unit²``, one per group."""
        if self._last is None or factor is None or self._last[0] is not factor:
            self._last = (factor, _each(factor, groups, self.damping[0], unit))
        return self._last[1]

    def outputs(self, factor: Factor, groups: int, unit: float = 1.0) -> list[Whitener]:
        """Of an output factor in units of ``unit²``, one per group."""
        return _each(factor, groups, self.damping[1], unit)


def _each(factor: Factor, groups: int, damping: float, unit: float) -> list[Whitener]:
    if factor is None:
        return [Whitener()] * (groups or 1)
    return [whitener(part, damping, unit) for part in (factor if groups else [factor])]


def quadratic(metric: Metric, shape: Shape, moments: Moments, whiteners: Whiteners) -> Quadratic:
    """The metric at one site.

    Args:
        metric: makes factors of moments.
        shape: of the operator.
        moments: of the site.
        whiteners: of the factors, damped.

    Raises:
        ValueError: a factor is not finite.
    """
    if metric.factors is None:
        assert moments.entries is not None
        return Elementwise.of(moments.entries, shape, moments.units[2])
    a, g = metric.factors(moments)
    groups = shape.matrix[0] if is_grouped(shape) else 0
    first, second = _units(moments)
    outputs = whiteners.outputs(g, groups, second)
    pairs = zip(whiteners.inputs(a, groups, first), outputs, strict=True)
    parts = tuple(Kronecker(inputs, outputs) for inputs, outputs in pairs)
    return Grouped(parts) if groups else parts[0]


def _units(moments: Moments) -> tuple[float, float]:
    """What the roots of the input and of the output factor are in units of."""
    first, second, third = moments.units
    return first, third if moments.output is None else second


def undamped_loss(metric: Metric, shape: Shape, moments: Moments, change: Tensor) -> float:
    """Loss of a change of a weight by the moments themselves: ``½ tr(G Δ A Δᵀ)``, undamped.

    For moments that the change was not chosen by: there is nothing to be careful about.

    Args:
        metric: makes factors of moments.
        shape: of the operator.
        moments: of the site.
        change: Δ (canonical layout), float64.
    """
    if metric.factors is None:
        assert moments.entries is not None
        return Elementwise.of(moments.entries, shape, moments.units[2]).loss(change)
    found = metric.factors(moments)
    for factor, unit in zip(found, _units(moments), strict=True):
        if factor is not None:
            change = change * unit
    grouped = is_grouped(shape)
    parts = change.flatten(2) if grouped else change[None]
    factors = [
        [None] * len(parts) if factor is None else [*factor] if grouped else [factor]
        for factor in found
    ]
    return 0.5 * sum(
        float((_times(g, part) * _times(a, part.T).T).sum())
        for a, g, part in zip(*factors, parts, strict=True)
    )


def _times(factor: Factor, x: Tensor) -> Tensor:
    """``M x`` (d x k) for a factor M (d x d), or its diagonal, or a root of it (r x d)."""
    if factor is None:
        return x
    factor = factor.to(x.dtype)
    if is_root(factor):
        return factor.T @ (factor @ x)
    return factor[:, None] * x if factor.dim() == 1 else factor @ x


def stacked(parts: Sequence[Quadratic], rows: Sequence[int]) -> Quadratic:
    """The metric of weights on one input, stacked to one (Σm x n).

    The output factor of a Kronecker metric becomes block diagonal.

    Args:
        parts: the metrics of the weights, with one input factor.
        rows: of each weight.
    """
    if isinstance(parts[0], Elementwise):
        each = [part for part in parts if isinstance(part, Elementwise)]
        unit = max(part.unit for part in each)
        entries = [part.entries * (part.unit / unit) ** 2 for part in each]
        return Elementwise(torch.cat(entries), False, unit)
    blocks = [p.outputs for p in parts if isinstance(p, Kronecker)]
    inputs = parts[0].inputs  # type: ignore[attr-defined]
    return Kronecker(inputs, BlockWhitener(tuple(blocks), tuple(rows)))  # type: ignore[arg-type]


def shares(together: Quadratic, target: Target, rows: Sequence[int]) -> Callable[[int], Tensor]:
    """The loss of each of several stacked weights at a rank, up to a common factor.

    Args:
        together: what :func:`stacked` returned.
        target: the stacked weight in it.
        rows: of each weight.
    """
    found = target.truncations()
    if isinstance(together, Kronecker):
        assert isinstance(together.outputs, BlockWhitener)
        assert isinstance(found, Spectrum)
        whitened = together.outputs.split(together.outputs.into(found.left.to(torch.float64)))
        energy = torch.stack([part.square().sum(0) for part in whitened])
        sizes = energy / energy.sum(0).clamp_min(torch.finfo(torch.float64).tiny)
        return lambda rank: (sizes[:, rank:] * found.sigma[rank:].square()).sum(1)
    assert isinstance(together, Elementwise)
    entries, weight = together.entries, target.weight.to(torch.float64)

    def parts(rank: int) -> Tensor:
        left, right = found.factors(rank)
        losses = entries * (left.to(torch.float64) @ right.to(torch.float64) - weight).square()
        return torch.stack([part.sum() for part in torch.split(losses, list(rows))])

    return parts


@dataclass(frozen=True, eq=False)
class Kronecker:
    """The metric of a weight that is a matrix (m x n), or one group of a convolution.

    Attributes:
        inputs: whitens A, over inputs or patches.
        outputs: whitens G.
        splits: those of the one weight that it is asked about; Tucker-2 shares one.
    """

    inputs: Whitener
    outputs: Whitener | BlockWhitener
    splits: dict[View, SplitTruncations] = field(default_factory=dict)

    @property
    def null(self) -> bool:
        """Whether no change of the weight makes a difference."""
        return self.inputs.null or self.outputs.null

    def loss(self, change: Tensor) -> float:
        """Predicted loss of a change (m x n), or (m x n x kernel)."""
        return quadratic_loss(change.flatten(1), self.inputs, self.outputs)

    def truncations(self, weight: Tensor, view: View) -> Truncations:
        """Approximations of a weight (m x n), or (m x n x kernel)."""
        if view == "matrix":
            return decompose_whitened(weight.flatten(1), self.inputs, self.outputs)
        key: View = "input" if view == "tucker2" else view
        if key not in self.splits:
            self.splits[key] = SplitTruncations.of(weight, self.inputs, self.outputs, key)
        found = self.splits[key]
        return TuckerTruncations(found) if view == "tucker2" else found


@dataclass(frozen=True, eq=False)
class Grouped:
    """The metric of a convolution: its groups one by one."""

    groups: tuple[Kronecker, ...]

    @property
    def null(self) -> bool:
        """Whether no change of the weight makes a difference."""
        return all(group.null for group in self.groups)

    def loss(self, change: Tensor) -> float:
        """Predicted loss of a change (g x m/g x n/g x kernel)."""
        return sum(group.loss(part) for group, part in zip(self.groups, change, strict=True))

    def truncations(self, weight: Tensor, view: View) -> Truncations:
        """Approximations of a weight (g x m/g x n/g x kernel), equal ranks in all groups."""
        parts = zip(self.groups, weight, strict=True)
        return Stacked(tuple(group.truncations(part, view) for group, part in parts))


@dataclass(frozen=True, eq=False)
class Stacked:
    """Truncations of all groups, each at the same rank."""

    groups: tuple[Truncations, ...]

    @property
    def sigma(self) -> Tensor:
        """Root of the loss that the components carry, all groups together (k)."""
        return torch.stack([group.sigma for group in self.groups]).square().sum(0).sqrt()

    def losses(self, ranks: Ranks) -> Losses:
        """Predicted loss at each of these ranks."""
        losses = self.groups[0].losses(ranks)
        for group in self.groups[1:]:
            losses = losses + group.losses(ranks)
        return losses

    def factors(self, rank: Rank) -> tuple[Tensor, ...]:
        """With a leading dimension of groups."""
        return stack([group.factors(rank) for group in self.groups])
