"""Truncation of a convolution whose patches are split between both sides of the matrix.

With rows (m, q) and columns c of a view (q the kernel positions of the rows), a rank-r weight is
``Σ_i a_i(m, q) b_i(c)``.  In the metric ``G ⊗ A`` the second moments A of whole patches (c, q)
couple both sides, and there is no closed form.  So:

1. *Subspace.*  With ``A ≈ A_C ⊗ A_Q / tr A`` (partial traces) there is one: the right singular
   vectors of ``(L_G ⊗ L_Q)ᵀ W L_C`` give the b_i.
2. *Fit.*  Given b_1, ..., b_r the best a_1, ..., a_r in ``G ⊗ A`` itself are a projection of W
   onto the patches ``b_i ⊗ e_q``: orthogonal in whitened coordinates, whatever G is.  With an
   orthonormal basis Z of these (QR, in the order of i) the projections for all r are nested,
   so that ``½ Σ_{i>r} ‖L_Gᵀ W L_A Z_i‖²`` is the loss at every rank: exact in A, not increasing,
   0 at full rank.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from fxcompress.forms.target import Losses, Rank, Ranks, View, arrange, tail
from fxcompress.metric.whiten import BlockWhitener, Whitener, whitener


@dataclass(frozen=True, eq=False)
class SplitTruncations:
    """Approximations of one group of a convolution, of every rank k >= r >= 0.

    Attributes:
        weight: in the order of the view (m x c x q), float64.
        inputs: whitens A, patches in the order (n, k_1, ..., k_d).
        outputs: whitens G.
        order: the place in a patch of every (c, q), (c·q).
        basis: rows b_i (k x c), float64.
        coordinates: ``L_Gᵀ W L_A Z`` (m x k x q), float64.
        sigma: root of the loss that each b_i carries (k), float64; not sorted.
        dtype: of the factors that are handed out.
    """

    weight: Tensor
    inputs: Whitener
    outputs: Whitener | BlockWhitener
    order: Tensor
    basis: Tensor
    coordinates: Tensor
    sigma: Tensor
    dtype: torch.dtype

    @staticmethod
    def of(
        weight: Tensor, inputs: Whitener, outputs: Whitener | BlockWhitener, view: View
    ) -> SplitTruncations:
        """Decompose the weight (m x n x kernel) of a group.

        Raises:
            ValueError: the weight is not finite.
        """
        if not bool(weight.isfinite().all()):
            raise ValueError("the weight is not finite")
        arranged, order = arrange(weight.detach().to(torch.float64), view)
        m, c, q = arranged.shape
        columns, rows = _partial_factors(inputs, order, (c, q))
        half = outputs.into(arranged.flatten(1)).reshape(m, c, q)
        matrix = rows.into(half.permute(2, 0, 1).flatten(1)).reshape(q * m, c)
        basis = columns.out_of(_row_space(columns.into(matrix.T).T).T).T
        found = SplitTruncations(
            arranged,
            inputs,
            outputs,
            order,
            basis,
            basis.new_zeros(0),
            basis.new_zeros(0),
            torch.promote_types(weight.dtype, torch.float32),
        )
        z, _ = torch.linalg.qr(found.patches(len(basis)))
        whitened = inputs.into(found.natural(half.flatten(1).T)).T
        coordinates = (whitened @ z).reshape(m, len(basis), q)
        if inputs.null or outputs.null:
            coordinates = torch.zeros_like(coordinates)
        sigma = coordinates.square().sum((0, 2)).sqrt()
        return replace(found, coordinates=coordinates, sigma=sigma)

    def losses(self, ranks: Ranks) -> Losses:
        """Predicted loss at each of these ranks."""
        return cast("Losses", tail(0.5 * self.sigma.square()).cpu().numpy()[ranks])

    def factors(self, rank: Rank) -> tuple[Tensor, Tensor]:
        """(m x r x q) and (r x c)."""
        assert isinstance(rank, int)
        m, _, q = self.weight.shape
        z, triangle = torch.linalg.qr(self.patches(rank))
        # W ≈ (W L_A Z) R⁻ᵀ (b ⊗ e), from L_Aᵀ (b ⊗ e)ᵀ = Z R.
        whitened = self.inputs.into(self.natural(self.weight.flatten(1).T)).T
        left = torch.linalg.solve_triangular(triangle, (whitened @ z).T, upper=True).T
        return left.reshape(m, rank, q).to(self.dtype), self.basis[:rank].to(self.dtype)

    def components(self) -> tuple[Tensor, Tensor]:
        """Left (m x k x q) and right (k x q x c·q) whose products are what each b_i adds.

        Patches are in the order in which A has them.
        """
        m, c, q = self.weight.shape
        rank = len(self.basis)
        z, triangle = torch.linalg.qr(self.patches(rank))
        whitened = self.inputs.into(self.natural(self.weight.flatten(1).T)).T
        # Z = L_Aᵀ Eᵀ R⁻¹ for patches E: the rows of R⁻ᵀ E are orthonormal once whitened.
        eye = torch.eye(q, dtype=self.basis.dtype, device=self.basis.device)
        plain = torch.einsum("ic,qp->cqip", self.basis, eye).reshape(c * q, rank * q)
        right = torch.linalg.solve_triangular(triangle.T, self.natural(plain).T, upper=False)
        return (
            (whitened @ z).reshape(m, rank, q).to(self.dtype),
            right.reshape(rank, q, c * q).to(self.dtype),
        )

    def patches(self, rank: int) -> Tensor:
        """Whitened patches ``L_Aᵀ (b_i ⊗ e_q)`` for i < r (c·q x r·q), those of one i together."""
        _, c, q = self.weight.shape
        eye = torch.eye(q, dtype=self.basis.dtype, device=self.basis.device)
        plain = torch.einsum("ic,qp->cqip", self.basis[:rank], eye)
        return self.inputs.into(self.natural(plain.reshape(c * q, rank * q)))

    def natural(self, rows: Tensor) -> Tensor:
        """Rows in the order (c, q), put into the order in which A has patches."""
        out = torch.empty_like(rows)
        out[self.order] = rows
        return out


def _partial_factors(
    inputs: Whitener, order: Tensor, sizes: tuple[int, int]
) -> tuple[Whitener, Whitener]:
    """Whiteners of the partial traces A_C (c x c) and A_Q (q x q) of A.

    Their scale is arbitrary: it does not change a subspace.
    """
    if inputs.plain:
        return Whitener(), Whitener()
    eye = torch.eye(len(order), dtype=torch.float64, device=order.device)
    root = inputs.colour(eye)[order].reshape(*sizes, -1)
    by_position = root.transpose(0, 1)
    columns = root.new_zeros(sizes[0], sizes[0])
    for part in by_position:
        columns.addmm_(part, part.T)
    flat = by_position.flatten(1)
    return whitener(columns, 0.0), whitener(flat @ flat.T, 0.0)


def _row_space(matrix: Tensor) -> Tensor:
    """Right singular vectors of a matrix (r x c) as rows (min(r, c) x c), the largest first.

    Orthonormal also where singular values are 0.
    """
    r, c = matrix.shape
    if c <= r:
        inner: Tensor = torch.linalg.eigh(matrix.T @ matrix).eigenvectors
        return inner.flip(1).T
    vectors: Tensor = torch.linalg.eigh(matrix @ matrix.T).eigenvectors.flip(1)
    basis: Tensor = torch.linalg.qr(matrix.T @ vectors).Q
    return basis.T
