"""Coordinates in which a metric is the identity.

A factor ``M = L Lᵀ`` is used through products only: ``Lᵀ X`` or ``L X`` (into whitened
coordinates) and ``L⁻ᵀ X`` (out of them).  Which root L is taken does not matter: two roots
differ by an orthogonal matrix, which changes neither the singular values of ``L_Gᵀ W L_A``
nor the truncated weight.

The root is a Cholesky factor in float64, not the symmetric root by ``eigh`` that the design
sketched: after damping (a shift by a fraction of the mean eigenvalue) it always exists, and
it costs a twenty-fifth.  Without damping a rank-deficient factor has none; then ``eigh`` with
eigenvalues raised to a relative floor takes over.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxcompress.metric.moments import is_root

Factor = Tensor | None
"""A positive semi-definite matrix (d x d), a diagonal one (d), or None for the identity.

A matrix of low rank may be given by a root (r x d), r < d: it is ``Rᵀ R``.
"""

FLOOR = 1e-9
"""Eigenvalues are raised to this fraction of the mean eigenvalue, so that inverses exist."""


@dataclass(frozen=True, eq=False)
class Whitener:
    """Products with a root L of a damped factor ``M + δ·mean(λ)·I = L Lᵀ`` (d x d).

    They are computed in the type of what is multiplied.

    Attributes:
        lower: L as a triangular matrix (Cholesky), or None.
        root: L as ``V √λ`` with its inverse transpose ``V /√λ``, or None.
        scale: √ of a diagonal factor (d), or None.
        few: a factor with r eigenvalues of its own and one that all others share: orthonormal
            columns V (d x r), and of all eigenvalues λ (r) and λ_0 the roots, so that
            ``L = V (√λ - √λ_0) Vᵀ + √λ_0 I``; or None.  All four None: the identity.
        matrix: the damped factor itself, if it was one; None for one of another kind.
        unit: what L is a multiple of, a power of two: products have it as a factor, ``lower``,
            ``root``, ``scale``, ``few`` and ``matrix`` (its square) do not.
        null: the factor is zero; products are those of the identity, and every singular
            value in these coordinates counts as zero.
    """

    lower: Tensor | None = None
    root: tuple[Tensor, Tensor] | None = None
    scale: Tensor | None = None
    few: tuple[Tensor, Tensor, float] | None = None
    matrix: Tensor | None = None
    null: bool = False
    unit: float = 1.0

    @property
    def plain(self) -> bool:
        """Whether the factor is the identity."""
        kinds = (self.lower, self.root, self.scale, self.few)
        return all(kind is None for kind in kinds)

    @property
    def diagonal(self) -> bool:
        """Whether the factor is diagonal."""
        return self.lower is None and self.root is None and self.few is None

    def dense(self, d: int) -> Tensor:
        """The factor itself, ``L Lᵀ`` in units of ``unit²`` (d x d), float64.

        Of a null factor the identity, as in products.
        """
        if self.matrix is not None:
            return self.matrix
        if self.lower is not None:
            return self.lower @ self.lower.T
        if self.root is not None:
            return self.root[0] @ self.root[0].T
        if self.few is not None:
            vectors, roots, other = self.few
            found = (vectors * (roots.square() - other**2)) @ vectors.T
            found.diagonal().add_(other**2)
            return found
        if self.scale is not None:
            return torch.diag(self.scale.square())
        return torch.eye(d, dtype=torch.float64)

    def into(self, x: Tensor) -> Tensor:
        """``Lᵀ x`` for x (d x k)."""
        x = x if self.unit == 1 else x * self.unit
        if self.lower is not None:
            return _transposed_product(self.lower, x)
        if self.root is not None:
            return self.root[0].T.to(x.dtype) @ x
        if self.few is not None:
            return self._powers(x, 1)
        return x if self.scale is None else self.scale[:, None].to(x.dtype) * x

    def out_of(self, x: Tensor) -> Tensor:
        """``L⁻ᵀ x`` for x (d x k)."""
        x = x if self.unit == 1 else x / self.unit
        if self.lower is not None:
            lower = self.lower.to(x.dtype)
            solved: Tensor = torch.linalg.solve_triangular(lower.T, x, upper=True)
            return solved
        if self.root is not None:
            return self.root[1].to(x.dtype) @ x
        if self.few is not None:
            return self._powers(x, -1)
        return x if self.scale is None else x / self.scale[:, None].to(x.dtype)

    def solve(self, x: Tensor) -> Tensor:
        """``(L Lᵀ)⁻¹ x`` for x (d x k)."""
        x = x if self.unit == 1 else x / self.unit / self.unit
        if self.lower is not None:
            solved: Tensor = torch.cholesky_solve(x, self.lower.to(x.dtype))
            return solved
        if self.root is not None:
            inverse = self.root[1].to(x.dtype)
            return inverse @ (inverse.T @ x)
        if self.few is not None:
            return self._powers(x, -2)
        return x if self.scale is None else x / self.scale.square()[:, None].to(x.dtype)

    def without_matrix(self) -> Whitener:
        """The whitener without the factor itself, which products do not need."""
        return replace(self, matrix=None)

    def restricted(self, places: Tensor) -> Whitener:
        """The whitener of some rows and columns of the factor (k x k), its damping included.

        Args:
            places: which (k), int64.
        """
        if self.null or self.plain:
            return self
        if self.scale is not None:
            return replace(self, scale=self.scale[places])
        matrix = self.dense(0)[places][:, places]
        if self.lower is not None:  # damped: a part of it is no nearer to singular (Cauchy)
            return Whitener(lower=cholesky(matrix), matrix=matrix, unit=self.unit)
        return whitener(matrix, 0.0, self.unit)

    def _powers(self, x: Tensor, power: int) -> Tensor:
        """A power of the symmetric root, times x."""
        assert self.few is not None
        vectors, roots, other = self.few
        v, own = vectors.to(x.dtype), (roots**power - other**power).to(x.dtype)
        return v @ (own[:, None] * (v.T @ x)) + other**power * x


PANEL = 192
"""Columns of a triangular matrix that are multiplied at once."""


def _transposed_product(lower: Tensor, x: Tensor) -> Tensor:
    """``Lᵀ x`` for a triangular L (d x d), with little more than half of its entries."""
    starts = range(0, len(lower), PANEL)
    panels = ((s, lower[s:, s : s + PANEL].to(x.dtype)) for s in starts)
    return torch.cat([panel.T @ x[s:] for s, panel in panels])


@dataclass(frozen=True, eq=False)
class BlockWhitener:
    """The whitener of a block-diagonal factor, for rows stacked from several operators.

    Attributes:
        blocks: one per operator.
        sizes: rows of each.
    """

    blocks: tuple[Whitener | BlockWhitener, ...]
    sizes: tuple[int, ...]

    @property
    def unit(self) -> float:
        """The largest of those of the blocks."""
        return max(block.unit for block in self.blocks)

    @property
    def null(self) -> bool:
        """Whether every block is zero."""
        return all(block.null for block in self.blocks)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rows of each block."""
        parts: tuple[Tensor, ...] = torch.split(x, list(self.sizes))
        return parts

    def into(self, x: Tensor) -> Tensor:
        """``Lᵀ x`` for x (Σd x k)."""
        return torch.cat([b.into(part) for b, part in zip(self.blocks, self.split(x), strict=True)])

    def out_of(self, x: Tensor) -> Tensor:
        """``L⁻ᵀ x`` for x (Σd x k)."""
        parts = zip(self.blocks, self.split(x), strict=True)
        return torch.cat([block.out_of(part) for block, part in parts])

    def solve(self, x: Tensor) -> Tensor:
        """``(L Lᵀ)⁻¹ x`` for x (Σd x k)."""
        parts = zip(self.blocks, self.split(x), strict=True)
        return torch.cat([block.solve(part) for block, part in parts])

    def without_matrix(self) -> BlockWhitener:
        """The whitener without the factors themselves, which products do not need."""
        return replace(self, blocks=tuple(block.without_matrix() for block in self.blocks))


def whitener(factor: Factor, damping: float, unit: float = 1.0) -> Whitener:
    """The whitener of a factor, damped relative to its mean eigenvalue.

    Args:
        factor: (d x d), its diagonal (d), or a root of it (r x d) with r < d, in units of
            ``unit²`` (the root of ``unit``); None for the identity.
        damping: added to its eigenvalues, as a fraction of their mean.
        unit: a power of two.

    Raises:
        ValueError: the factor is not finite, or is clearly not positive semi-definite.
    """
    if factor is None:
        return Whitener()
    factor = factor.to(torch.float64)
    if is_root(factor):
        return _whitener_of_few(factor, damping, unit)
    diagonal = factor if factor.dim() == 1 else factor.diagonal()
    if not bool(factor.isfinite().all()):
        raise ValueError("a metric factor is not finite")
    mean = float(diagonal.mean())
    if mean < 0:
        raise ValueError("a metric factor has a negative trace")
    if mean == 0:
        return Whitener(null=True)
    if factor.dim() == 1:
        damped = factor.clamp_min(0) + damping * mean
        return Whitener(scale=damped.clamp_min(FLOOR * mean).sqrt(), unit=unit)
    damped = (factor + factor.T) / 2
    damped.diagonal().add_(damping * mean)
    if damping >= FLOOR:
        lower, failed = torch.linalg.cholesky_ex(damped)
        if not bool(failed):
            return Whitener(lower=lower, matrix=damped, unit=unit)
    values, vectors = torch.linalg.eigh(damped)
    values = values.clamp_min(FLOOR * mean)
    floored = (vectors * values) @ vectors.T
    roots = (vectors * values.sqrt(), vectors * values.rsqrt())
    return Whitener(root=roots, matrix=floored, unit=unit)


def _whitener_of_few(rows: Tensor, damping: float, unit: float) -> Whitener:
    """The whitener of ``Rᵀ R`` for few rows R (r x d); nothing of size (d x d) is formed.

    It is that of :func:`whitener` for the product: with ``Rᵀ = Q T`` (Q orthonormal) the damped
    factor is ``Q T Tᵀ Qᵀ + δ I``, whose eigenvectors are Q times those of ``T Tᵀ``, and all that is
    orthogonal to Q.
    """
    if not bool(rows.isfinite().all()):
        raise ValueError("a metric factor is not finite")
    mean = float(rows.square().sum()) / rows.shape[1]
    if mean == 0:
        return Whitener(null=True)
    basis, triangle = torch.linalg.qr(rows.T)
    values, vectors = torch.linalg.eigh(triangle @ triangle.T)
    damped = (values + damping * mean).clamp_min(FLOOR * mean)
    other = max(damping, FLOOR) * mean
    return Whitener(few=(basis @ vectors, damped.sqrt(), other**0.5), unit=unit)


def cholesky(matrix: Tensor) -> Tensor:
    """A Cholesky factor; of a matrix that is singular by rounding, of one slightly above it.

    Raises:
        ValueError: it is not positive semi-definite.
    """
    mean = float(matrix.diagonal().mean())
    for shift in (0.0, 1e-14, 1e-12, 1e-10):
        shifted = matrix
        if shift:
            shifted = matrix.clone()
            shifted.diagonal().add_(shift * mean)
        found = torch.linalg.cholesky_ex(shifted)
        if not bool(found.info):
            lower: Tensor = found.L
            return lower
    raise ValueError("second moments are not positive semi-definite")


class Whiteners:
    """Whiteners of factors; the last input factor is remembered, as sites on one input share it.

    Args:
        damping: of the input and of the output factor.
        known: whiteners that are remembered by (factor, damping) for others, too; the factors have
            to live as long.  None to remember none.
    """

    def __init__(
        self,
        damping: tuple[float, float],
        known: dict[tuple[int, float], list[Whitener]] | None = None,
    ) -> None:
        self.damping = damping
        self._known = known
        self._last: tuple[Factor, list[Whitener]] | None = None

    def inputs(self, factor: Factor, groups: int = 0, unit: float = 1.0) -> list[Whitener]:
        """Of an input factor in units of ``unit²``; of groups with a dimension of their own."""
        if self._last is None or factor is None or self._last[0] is not factor:
            self._last = (factor, self._each(factor, groups, self.damping[0], unit))
        return self._last[1]

    def outputs(self, factor: Factor, groups: int = 0, unit: float = 1.0) -> list[Whitener]:
        """Of an output factor in units of ``unit²``; of groups with a dimension of their own."""
        return self._each(factor, groups, self.damping[1], unit)

    def _each(self, factor: Factor, groups: int, damping: float, unit: float) -> list[Whitener]:
        if factor is None:
            return [Whitener()] * (groups or 1)
        key = id(factor), damping
        if self._known is not None and key in self._known:
            return self._known[key]
        found = [whitener(part, damping, unit) for part in (factor if groups else [factor])]
        if self._known is not None:
            self._known[key] = found
        return found
