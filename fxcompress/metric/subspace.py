"""The leading part of a singular value decomposition, from that of a matrix nearby.

Between two thresholdings a weight moves little, and so do its leading singular subspaces.
:func:`leading` takes those of the last time through one or two steps of block subspace
iteration (Halko, Martinsson and Tropp 2011, section 4.5) and says what may be wrong with the
outcome: a *certificate*, not an estimate.  It holds for any start, a bad one only makes it
useless; then the caller decomposes in full.

With Q (m x p) orthonormal, ``B = Qᵀ S`` and ``R = S - Q B``, ``SᵀS = BᵀB + RᵀR``, and
``Σ_{i>r} σ_i(B)² + ‖R‖²_F`` is exactly what the rank r approximation by the first r components
of B loses.  Two things may be wrong with it.

*A component is missing.*  ``σ_i(B)² <= σ_i(S)² <= σ_i(B)² + ‖R‖₂²`` (Weyl).  ‖R‖₂ is bounded by
Schatten norms, ``‖R‖₂ <= (Σ σ_i(R)^8)^⅛``, which takes a Gram matrix and its square: a few matrix
products, where singular values of R would cost as much as those of S.  The Frobenius norm costs
nothing, and is tried first.

*The components are not those of S*, but turned: found by chance, from rounding say, and not
settled.  Then every singular value can be bounded well, and the approximation still lose more
than the best one of its rank.  How much more, is bounded by the products ``E = R Bᵀ`` (m x p),
which vanish if Q is invariant under ``H = S Sᵀ``.  Let the columns of Q be the Ritz vectors,
``θ_i = σ_i(B)²``, and k <= s <= p.  In the basis of the first s of them and its complement

    H = | Θ_s  E_sᵀ |      with  H' <= τ = θ_{s+1} + ‖R‖₂²       (0 for θ_{p+1}).
        | E_s   H'  |

Let θ_s > τ.  The eigenvalues of H beyond the first s are at most τ (Weyl), and below Θ_s they are
those of ``H' - E_s (Θ_s - λ)⁻¹ E_sᵀ`` (inertia of its Schur complement), so that none is below that
of ``H' - E_s (Θ_s - τ)⁻¹ E_sᵀ`` of the same index.  Those from k + 1 to s are at least θ_{k+1} to
θ_s (Cauchy).  The sum of both is what the best approximation of rank k loses, twice:

    Σ_{i>k} σ_i(S)²  >=  Σ_{k<i<=p} θ_i + ‖R‖²_F  -  Σ_{i<=s} ‖E e_i‖² / (θ_i - τ).

Without a gap, Fan's inequality for ``BᵀB + RᵀR`` leaves ``min(‖R‖²_F, k ‖R‖₂²)`` in its place.

All of it is computed in floating point, with R as it came out: products of S err by a multiple of
``ε ‖S‖_F`` (:data:`ROUNDING`), which is added to the norms wherever they bound something.  Rows of
B that are orthogonal to rounding only, ``B Bᵀ = Θ^½ (I + Z) Θ^½``, change eigenvalues by ``‖Z‖₂``
of their size at most (Ostrowski), which for all beyond k is that part of the loss; rows so small
that rounding is more of them than that are turned by it, with a loss of its square each.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from fxcompress.metric.scaled import normalized

ROUNDING = 12.0
"""Units of rounding, relative to ‖S‖_F, by which norms of products with S may be wrong: 11 is the
most that was seen up to 576 x 1536, with spectra over fifteen orders of magnitude."""


@dataclass(frozen=True, eq=False)
class Leading:
    """Leading components of a matrix S (m x n), and a bound on all others.

    Attributes:
        left: orthonormal columns (m x p).
        sigma: Ritz values (p), non-increasing, float64; none is above the singular value of S
            of the same index.
        right: ``leftᵀ S`` (p x n), whose rows are orthogonal and have the norms ``sigma``.
        rest: squared Frobenius norm of ``R = S - left @ right``.
        residual: upper bound on its spectral norm, but for rounding; 0 if nothing is left.
        leaks: norms of ``R @ right[i]`` (p), float64: 0 where a component is one of S.
        rounding: by which norms may be wrong, one component or all of R.
        mixed: the same of cosines between rows of ``right``, which should be 0.
    """

    left: Tensor
    sigma: Tensor
    right: Tensor
    rest: float
    residual: float
    leaks: Tensor
    rounding: float
    mixed: float

    def bounds(self, count: int, *, rounded: bool = True) -> Tensor:
        """Upper bounds on the first singular values of S (count), float64.

        Args:
            count: how many, from the largest.
            rounded: whether rounding is allowed for.
        """
        more = self.rounding if rounded else 0.0
        own = self.sigma.new_zeros(count)
        known = self.sigma[:count] + more
        own[: len(known)] = known
        return own.square().add((self.residual + more) ** 2).sqrt()

    def excess(self, rank: int) -> float:
        """Upper bound on what ``loss()[rank]`` is above the least loss of a matrix of that rank.

        Args:
            rank: k, from 0 to p.
        """
        if rank == 0:
            return 0.0
        theta, missed = self.sigma.square().cpu(), (self.residual + self.rounding) ** 2
        most = min((math.sqrt(self.rest) + self.rounding) ** 2, rank * missed)
        leaks = (self.leaks + self.rounding * self.sigma).cpu()
        for s in range(rank, len(theta) + 1):
            tau = missed + (float(theta[s]) if s < len(theta) else 0.0)
            if float(theta[s - 1]) > tau:
                most = min(most, float((leaks[:s] / (theta[:s] - tau).sqrt()).square().sum()))
        mixed = self.mixed * float(theta[rank:].sum()) + rank * self.rounding**2
        return 0.5 * (most + mixed)

    def times(self, factor: float) -> Leading:
        """The leading components of a multiple of the matrix; the factor is positive."""
        return Leading(
            self.left, self.sigma * factor, self.right * factor,
            self.rest * factor * factor, self.residual * factor,
            self.leaks * factor * factor, self.rounding * factor, self.mixed,
        )  # fmt: skip

    def loss(self) -> Tensor:
        """``½ ‖S - S_r‖²`` for the first r components, r = 0..p (p + 1), float64."""
        energy = 0.5 * self.sigma.square()
        tails = torch.cat([energy.flip(0).cumsum(0).flip(0), energy.new_zeros(1)])
        return tails + 0.5 * self.rest


def leading(matrix: Tensor, basis: Tensor, iterations: int = 1, *, tight: bool = True) -> Leading:
    """Components of a matrix in a space close to a given one.

    Args:
        matrix: S (m x n), in the type to compute in.
        basis: columns that roughly span the leading right singular vectors (n x p), p ≤ m, n.
        iterations: how often the space is multiplied by ``Sᵀ S`` before it is used.
        tight: whether to bound ‖R‖₂ by more than the Frobenius norm.

    Raises:
        ValueError: the matrix is not finite.
    """
    scaled, exponent = normalized(matrix)
    if exponent:  # or its squares would leave the range of its type
        return leading(scaled, basis, iterations, tight=tight).times(2.0**exponent)
    y = matrix @ basis
    if not bool(y.isfinite().all()):
        raise ValueError("the matrix is not finite")
    for _ in range(iterations - 1):
        y = matrix @ (matrix.T @ _orthonormal(y))
    q = _orthonormal(y)
    b = q.T @ matrix
    # In float64, though float32 takes half the time: rounded to 1e-7 of the largest eigenvalue,
    # components next to the threshold mix across it (benchmark_steps.py: up to 0.9 % more loss;
    # 0.3 % with the last quarter of them turned once more in float64).
    vectors = torch.linalg.eigh((b @ b.T).double()).eigenvectors
    # From the largest; Ritz values from the rows themselves, as squaring blurs the small ones.
    turn = vectors.flip(1).to(matrix.dtype)
    right = turn.T @ b
    sigma, order = torch.sort(right.double().norm(dim=1), descending=True, stable=True)
    left, right = q @ turn[:, order], right[order]
    remainder = torch.addmm(matrix, q, b, alpha=-1)
    rest = float(remainder.norm(dim=1).double().square().sum())
    residual = _spectral_bound(remainder, rest) if tight else math.sqrt(rest)
    # The norm of S: squares of the parts, in float64.
    unit = ROUNDING * torch.finfo(matrix.dtype).eps
    rounding = unit * math.sqrt(float(sigma.square().sum()) + rest)
    leaks = (remainder @ right.T).double().norm(dim=0)
    return Leading(left, sigma, right, rest, residual, leaks, rounding, unit)


def _orthonormal(y: Tensor) -> Tensor:
    """An orthonormal basis (m x p) of a space that contains the columns.

    Cholesky of the Gram matrix (Yamamoto et al. 2015: twice is enough unless columns are nearly
    dependent), and a step of Newton's iteration for the polar factor where that is close
    enough, cost a third of a Householder QR.  Where Cholesky fails, that one is taken.
    """
    q: Tensor = y / y.norm(dim=0).clamp_min(torch.finfo(y.dtype).tiny)
    eye = torch.eye(q.shape[1], dtype=q.dtype, device=q.device)
    close = 10 * torch.finfo(q.dtype).eps ** 0.5  # is squared by Newton's step
    for _ in range(3):
        gram = q.T @ q
        if float((gram - eye).norm()) <= close:
            return torch.addmm(q, q, gram, beta=1.5, alpha=-0.5)
        lower, failed = torch.linalg.cholesky_ex(gram)
        if bool(failed):
            break
        solved: Tensor = torch.linalg.solve_triangular(lower, q.T, upper=False)
        q = solved.T
    return _householder(y)


def _householder(y: Tensor) -> Tensor:
    q: Tensor = torch.linalg.qr(y).Q
    return q


def _spectral_bound(remainder: Tensor, squares: float) -> float:
    """``(Σ σ_i^8)^⅛``, never above the Frobenius norm and never below the spectral norm."""
    if squares == 0.0:
        return 0.0
    scaled = remainder / squares**0.5  # so that eighth powers stay within range
    wide = scaled.shape[0] <= scaled.shape[1]
    gram = scaled @ scaled.T if wide else scaled.T @ scaled
    eighth = float((gram @ gram).square().sum(dtype=torch.float64)) ** 0.125
    return float(min(1.0, eighth) * squares**0.5)
