"""Truncation of a convolution whose patches are split between both sides of the matrix.

With rows (m, q) and columns c of a view (q the kernel positions of the rows), a rank-r weight is
``Σ_i a_i(m, q) b_i(c)``.  In the metric ``G ⊗ A`` the second moments A of whole patches (c, q)
couple both sides, and there is no closed form.  So:

1. *Subspace.*  With ``A ≈ A_C ⊗ A_Q / tr A`` (partial traces) there is one: the right singular
   vectors of ``(L_G ⊗ L_Q)ᵀ W L_C`` give the b_i.
2. *Fit.*  Given b_1, ..., b_r the best a_1, ..., a_r in ``G ⊗ A`` itself are a projection of W
   onto the patches ``b_i ⊗ e_q``: orthogonal in whitened coordinates, whatever G is.  With
   ``E A Eᵀ = Λ Λᵀ`` for these patches E (Cholesky, in the order of i) the projections for all r
   are nested: with ``T = W A Eᵀ Λ⁻ᵀ`` the loss at every rank is ``½ Σ_{i>r} ‖L_Gᵀ T_i‖²``: exact in
   A, not increasing, 0 at full rank.

E is ``B ⊗ I``, so that nothing larger than A is ever formed, and the products with A cost less than
its factorization.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Self, cast

import numpy as np
import torch
from torch import Tensor

from fxcompress.forms.target import (
    Components,
    Losses,
    Rank,
    Ranks,
    Truncations,
    View,
    arrange,
    tail,
)
from fxcompress.metric.whiten import BlockWhitener, Whitener, cholesky, whitener


@dataclass(frozen=True, eq=False)
class SplitTruncations(Truncations):
    """Approximations of one group of a convolution, of every rank k >= r >= 0.

    Attributes:
        weight: in the order of the view (m x c x q), float64.
        inputs: whitens A, patches in the order (n, k_1, ..., k_d).  A fit does not depend on its
            unit, so T is without it, and ``coordinates`` with it.
        order: the place in a patch of every (c, q), (c·q).
        outputs: whitens G.
        basis: rows b_i (k x c), float64.
        coordinates: ``L_Gᵀ T`` (m x k x q), float64.
        sigma: root of the loss that each b_i carries (k), float64; not sorted.
        dtype: of the factors that are handed out.
        view: that they are of.
    """

    weight: Tensor
    inputs: Whitener
    order: Tensor
    outputs: Whitener | BlockWhitener
    basis: Tensor
    coordinates: Tensor
    sigma: Tensor
    dtype: torch.dtype
    view: View

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
        moments = _moments(inputs, order, arranged.shape[1:])
        columns, rows = _partial_factors(moments)
        half = outputs.into(arranged.flatten(1)).reshape(m, c, q)
        matrix = rows.into(half.permute(2, 0, 1).flatten(1)).reshape(q * m, c)
        basis = columns.out_of(_row_space(columns.into(matrix.T).T).T).T
        plain = SplitTruncations(
            arranged,
            inputs,
            order,
            outputs,
            basis,
            basis.new_zeros(0),
            basis.new_zeros(0),
            torch.promote_types(weight.dtype, torch.float32),
            view,
        )
        fitted, _ = plain.fit(len(basis))
        coordinates = outputs.into(fitted).reshape(m, len(basis), q) * inputs.unit
        if inputs.null or outputs.null:
            coordinates = torch.zeros_like(coordinates)
        sigma = coordinates.square().sum((0, 2)).sqrt()
        return replace(plain, coordinates=coordinates, sigma=sigma)

    def losses(self, ranks: Ranks) -> Losses:
        """Predicted loss at each of these ranks."""
        return cast("Losses", tail(0.5 * self.sigma.square()).cpu().numpy()[ranks])

    def factors(self, rank: Rank) -> tuple[Tensor, Tensor]:
        """(m x r x q) and (r x c)."""
        assert isinstance(rank, int)
        m, _, q = self.weight.shape
        fitted, lower = self.fit(rank)
        # W ≈ T Λ⁻¹ E.
        left = torch.linalg.solve_triangular(lower.T, fitted.T, upper=True).T
        return left.reshape(m, rank, q).to(self.dtype), self.basis[:rank].to(self.dtype)

    def fit(self, rank: int) -> tuple[Tensor, Tensor]:
        """T (m x r·q), those of one i together, and Λ (r·q x r·q)."""
        q = self.weight.shape[2]
        basis = self.basis[:rank]
        moments = _moments(self.inputs, self.order, self.weight.shape[1:])
        if moments is None:
            # The patches are orthonormal in q, so only the b_i have to be made so.
            triangle = cholesky(basis @ basis.T).contiguous()
            lower = torch.kron(triangle, torch.eye(q).to(triangle))
            product = torch.einsum("mcq,ic->miq", self.weight, basis).reshape(-1, rank * q)
        else:
            # E A, (r·q x c·q), in the two orders of patches.
            above = torch.einsum("ic,cqdp->iqdp", basis, moments)
            gram = torch.einsum("iqdp,jd->iqjp", above, basis)
            lower = cholesky(gram.reshape(rank * q, rank * q))
            product = self.weight.flatten(1) @ above.reshape(rank * q, -1).T
        return torch.linalg.solve_triangular(lower, product.T, upper=False).T, lower

    def components(self) -> Components:
        """What each b_i adds: left (1 x m x k x q) and right (1 x k x q x c·q).

        Patches are in the order in which A has them.
        """
        m, c, q = self.weight.shape
        rank = len(self.basis)
        fitted, lower = self.fit(rank)
        eye = torch.eye(q, dtype=self.basis.dtype, device=self.basis.device)
        patches = torch.einsum("ic,qp->iqcp", self.basis, eye).reshape(rank * q, c * q)
        right = torch.empty_like(patches)
        right[:, self.order] = torch.linalg.solve_triangular(lower, patches, upper=False)
        return Components(
            fitted.reshape(1, m, rank, q).to(self.dtype),
            right.reshape(1, rank, q, c * q).to(self.dtype),
        )

    def remeasured(self, energies: Tensor) -> Self:
        """The components with measured losses, in their order: they are nested in it."""
        return replace(self, sigma=energies[0].sqrt())

    def derived(self, view: View) -> Truncations | None:
        """Tucker-2 starts from the input channels of the view ``input``."""
        return TuckerTruncations(self) if (self.view, view) == ("input", "tucker2") else None


@dataclass(frozen=True, eq=False)
class TuckerTruncations(Truncations):
    """Approximations of one group of a convolution, of every pair of ranks (r_1, r_2).

    The subspace of r_1 input channels and the coordinates T (m x r_1·k) of the weight in it are
    those of the view ``input``.  Given them, the best r_2 output channels are the leading left
    singular vectors of T in whitened coordinates: a sequentially truncated HOSVD (Vannieuwenhoven,
    Vandebril, Meerbergen 2012).  The loss of both steps adds up, exactly.

    Attributes:
        inputs: the split in the view ``input``.
    """

    inputs: SplitTruncations
    _tails: dict[int, Tensor] = field(default_factory=dict)

    @property
    def sigma(self) -> Tensor:  # type: ignore[override]
        """Root of the loss that each input channel carries (k)."""
        return self.inputs.sigma

    def derived(self, view: View) -> Truncations | None:
        """The split of the input channels that they start from."""
        return self.inputs if view == "input" else None

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


def _moments(inputs: Whitener, order: Tensor, sizes: Sequence[int]) -> Tensor | None:
    """A in the order of a view (c x q x c x q); None for the identity."""
    if inputs.matrix is None:
        if inputs.plain:
            return None
        assert inputs.scale is not None
        whole = torch.diag(inputs.scale.square())
    else:
        whole = inputs.matrix
    return whole[order][:, order].reshape(*sizes, *sizes)


def _partial_factors(moments: Tensor | None) -> tuple[Whitener, Whitener]:
    """Whiteners of the partial traces A_C (c x c) and A_Q (q x q) of A.

    Their scale is arbitrary: it does not change a subspace.
    """
    if moments is None:
        return Whitener(), Whitener()
    columns = torch.einsum("cqdq->cd", moments)
    rows = torch.einsum("cqcp->qp", moments)
    return whitener(columns, 0.0), whitener(rows, 0.0)


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
