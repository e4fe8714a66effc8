"""``elementwise``: a Fisher weight for every entry of W, known as TFWSVD (arXiv 2211.09718).

``½ Σ_ij F_ij Δ_ij²`` with F the diagonal of the Fisher is exact where entries are uncorrelated,
and has no closed form for its best rank-r weight.  It is found by iterative singular value
thresholding (arXiv 2507.09428, section 4), as majorize-minimize: with ``F_ij <= p_i q_j``,

    Z = W_k + F/(p qᵀ) ∘ (W - W_k),    W_{k+1} = the best rank-r weight for Z in (p, q)

the loss of W_{k+1} is never above that of W_k (a weighted low-rank approximation, Srebro and
Jaakkola 2003, with the step size that p and q allow row by row and column by column).  The start is
the truncation in (p, q).

Every rank has its own iterations, so :data:`OFFERED` of the permitted ranks are offered, evenly
spaced.  F weighs entries, whichever way they are arranged in a matrix: every view of a convolution
has its exact loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from fxcompress.forms.target import Losses, Rank, Ranks, Truncations, View, arrange
from fxcompress.metric.channels import ChannelTruncations, independent
from fxcompress.metric.metric import Metric, Need
from fxcompress.metric.moments import Moments
from fxcompress.metric.quadratic import QuadraticForm

OFFERED = 12
"""Ranks that are offered of those that the rules permit."""

STEPS = 60
"""Iterations at most."""

SETTLED = 1e-3
"""Iterations end when the loss falls by less than this fraction of itself."""

FLOOR = 1e-6
"""Weights are raised to this fraction of their mean: entries without influence stay bounded."""

NOTHING = 1e-150
"""And to this at least, which stands for no influence at all."""


@dataclass(frozen=True, eq=False)
class Elementwise(QuadraticForm):
    """The form of one matrix, or of one group of a convolution.

    Attributes:
        entries: F (m x n), for a convolution of patches (m x n·k), float64.
        unit: a power of two; F is in units of its square.

    Raises:
        ValueError: F is not finite.
    """

    entries: Tensor
    unit: float = 1.0

    def __post_init__(self) -> None:
        if not bool(self.entries.isfinite().all()):
            raise ValueError("the Fisher weights are not finite")

    @property
    def null(self) -> bool:
        """Whether no change of the weight makes a difference."""
        return not bool(self.entries.any())

    def loss(self, change: Tensor) -> float:
        """``½ Σ F ∘ Δ²``."""
        change = change.flatten(1).to(torch.float64) * self.unit
        return 0.5 * float((self.entries * change.square()).sum())

    def truncations(self, weight: Tensor, view: View) -> Truncations:
        """Approximations of a weight, by iteration."""
        if view == "channels":
            return self.channels(weight)
        if not bool(weight.isfinite().all()):
            raise ValueError("the weight is not finite")
        w = arrange(weight.detach().to(torch.float64), view)[0] * self.unit
        f = arrange(self.entries.reshape(weight.shape), view)[0]
        f = f.clamp_min(max(FLOOR * float(f.mean()), NOTHING))
        dtype = torch.promote_types(weight.dtype, torch.float32)
        return _Iterated(w, f, view == "tucker2", weight.dim() == 2, dtype, self.unit)

    def channels(self, weight: Tensor, order: Tensor | None = None) -> ChannelTruncations:
        """Fewer channels, each of which loses its own entries: nothing makes up for them."""
        whitened = self.entries.sqrt() * weight.detach().to(torch.float64).flatten(1)
        return independent(weight, whitened * self.unit, order)

    def restricted(self, rows: Tensor | None = None, inputs: Tensor | None = None) -> Elementwise:
        """The weights of some entries of a matrix."""
        entries = self.entries if rows is None else self.entries[rows]
        return replace(self, entries=entries if inputs is None else entries[:, inputs])

    def solve(self, gradient: Tensor) -> Tensor:
        """Entry by entry, by weights that are raised to a millionth of their mean."""
        wide = gradient.to(torch.float64)
        if self.null:
            return torch.zeros_like(wide)
        weights = self.entries.clamp_min(FLOOR * float(self.entries.mean())).reshape(wide.shape)
        return wide / self.unit / self.unit / weights

    @classmethod
    def stacked(cls, parts: Sequence[Elementwise], rows: Sequence[int]) -> Elementwise:
        """Weights of all entries, one below the other."""
        unit = max(part.unit for part in parts)
        return cls(torch.cat([part.entries * (part.unit / unit) ** 2 for part in parts]), unit)


class _ElementwiseMetric(Metric):
    name = "elementwise"
    needs: frozenset[Need] = frozenset({"entries"})

    def form(self, moments: Moments, damping: tuple[float, float]) -> Elementwise:
        assert moments.entries is not None
        return Elementwise(moments.entries, moments.units[2])


ELEMENTWISE = _ElementwiseMetric()


@dataclass(frozen=True, eq=False)
class _Iterated(Truncations):
    """Approximations of a matrix or of one group.

    Attributes:
        weight: W times the unit (m x c x q).
        entries: F (m x c x q).
        two: whether both channel modes are reduced, instead of the matrix ((m, q) x c).
        plain: whether it is a matrix, so that factors have no kernel dimension.
        dtype: of the factors that are handed out.
        unit: the root of what F is in units of.
    """

    weight: Tensor
    entries: Tensor
    two: bool
    plain: bool
    dtype: torch.dtype
    unit: float = 1.0

    @cached_property
    def sigma(self) -> Tensor:  # type: ignore[override]
        """Of the start of the iterations, scaled so that ``½ Σ σ_i²`` is the loss at rank 0."""
        w, f = self.weight, self.entries
        left, right = _scales(f, self.two)
        found = torch.linalg.svdvals(_flat(w * left * right)).square()
        whole: Tensor = found * (f * w.square()).sum() / found.sum().clamp_min(1e-300)
        return whole.sqrt()

    def losses(self, ranks: Ranks) -> Losses:
        losses = np.full(len(ranks), np.inf)
        for at in _offered(ranks):
            rank = tuple(ranks[at].tolist()) if self.two else int(ranks[at])
            losses[at] = approximate(self.weight, self.entries, rank)[1]
        return losses

    def factors(self, rank: Rank) -> tuple[Tensor, ...]:
        (*above, below), _ = approximate(self.weight, self.entries, rank)
        if self.plain:
            above = [each.squeeze(2) for each in above]
        return tuple(factor.to(self.dtype) for factor in (*above, below / self.unit))


def approximate(w: Tensor, f: Tensor, rank: Rank) -> tuple[tuple[Tensor, ...], float]:
    """Iterate to a weight of low rank that is close to W (m x c x q) in the weights F.

    Args:
        w: W, float64.
        f: F, positive.
        rank: of the matrix ((m, q) x c), or the two of Tucker-2.

    Returns:
        The factors of :class:`~fxcompress.forms.target.Truncations`, and the loss
        ``½ Σ F ∘ (W - W_r)²``: never above that of the start.
    """
    left, right = _scales(f, isinstance(rank, tuple))
    step = f / (left * right).square()

    def truncate(z: Tensor) -> tuple[tuple[Tensor, ...], Tensor, float]:
        factors = _projected(z * left * right, rank)
        product = _product(factors) / (left * right)
        return factors, product, 0.5 * float((f * (w - product).square()).sum())

    factors, current, loss = truncate(w)
    previous, momentum = current, 1.0
    for _ in range(STEPS):
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead = current + (momentum - 1) / following * (current - previous)
        found = truncate(ahead + step * (w - ahead))
        if found[2] > loss:  # too far ahead: a plain step never is
            following = 1.0
            found = truncate(current + step * (w - current))
        if found[2] > loss:  # by rounding; or by Tucker-2, whose projection is not the nearest
            break
        settled = loss - found[2] <= SETTLED * loss
        previous, momentum = current, following
        factors, current, loss = found
        if settled:
            break
    above, *core, below = factors
    above = above / (left[:, :, 0] if core else left)
    return (above, *core, below / right[0, :, 0]), loss


def _scales(f: Tensor, two: bool) -> tuple[Tensor, Tensor]:
    """√p (m x 1 x q) and √q (1 x c x 1) of a bound ``F <= p q``: means of columns, then maxima.

    With two ranks p is the same for all taps, as the layer above has one.
    """
    columns = f.mean((0, 2), keepdim=True)
    rows = (f / columns).amax((1, 2) if two else 1, keepdim=True)
    return rows.sqrt(), columns.sqrt()


def _flat(x: Tensor) -> Tensor:
    """(m x c x q) as the matrix ((m, q) x c)."""
    return x.transpose(1, 2).flatten(0, 1)


def _projected(x: Tensor, rank: Rank) -> tuple[Tensor, ...]:
    """Factors of the nearest (m x c x q) of a rank; of a near one for two ranks (HOSVD)."""
    m, c, q = x.shape
    if isinstance(rank, int):
        matrix = _flat(x)
        if len(matrix) <= c:
            left = _leading(matrix @ matrix.T, rank)
            right = left.T @ matrix
        else:
            right = _leading(matrix.T @ matrix, rank).T
            left = matrix @ right.T
        return left.reshape(m, q, rank).transpose(1, 2), right
    first, second = rank
    by_input = x.transpose(0, 1).flatten(1)
    inputs = _leading(by_input @ by_input.T, first)
    core = torch.einsum("mcq,cr->mrq", x, inputs)
    outputs = _leading(core.flatten(1) @ core.flatten(1).T, second)
    return outputs, torch.einsum("ms,mrq->srq", outputs, core), inputs.T


def _leading(gram: Tensor, rank: int) -> Tensor:
    """Eigenvectors of the largest eigenvalues, as columns."""
    vectors: Tensor = torch.linalg.eigh(gram).eigenvectors
    return vectors.flip(1)[:, :rank]


def _product(factors: tuple[Tensor, ...]) -> Tensor:
    """The (m x c x q) that factors stand for."""
    if len(factors) == 2:
        return torch.einsum("mrq,rc->mcq", *factors)
    return torch.einsum("ms,srq,rc->mcq", *factors)


def _offered(ranks: Ranks) -> list[int]:
    """Places of the ranks that are offered; of pairs, of those nearest to equal fractions."""
    if ranks.ndim == 2 and len(ranks):
        fractions = ranks / ranks.max(0)
        apart = np.abs(fractions[:, 0] - fractions[:, 1])
        firsts = np.unique(ranks[:, 0])
        places = [np.flatnonzero(ranks[:, 0] == first) for first in firsts]
        nearest = [int(these[np.argmin(apart[these])]) for these in places]
        return [nearest[at] for at in _spaced(len(nearest))]
    return _spaced(len(ranks))


def _spaced(count: int) -> list[int]:
    return sorted({round(at) for at in np.linspace(0, count - 1, min(count, OFFERED))})
