"""What a form approximates: a weight, and a metric to approximate it in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol, Self, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Rank = int | tuple[int, int]
"""Of a form with one rank, or with two (Tucker-2: input, then output channels)."""

Ranks = NDArray[np.int64]
"""Ranks (k), or pairs of them (k x 2)."""

Losses = NDArray[np.float64]

View = Literal["matrix", "input", "spatial", "tucker2", "channels"]
"""How a canonical weight (m x n x k_1 x ... x k_d, of one group) is seen as a matrix.

=============  ==========================  ============================
view           rows                        columns
=============  ==========================  ============================
``matrix``     m                           n, k_1, ..., k_d
``input``      m, k_1, ..., k_d            n
``spatial``    m, k_2, ..., k_d            n, k_1
``tucker2``    no matrix: m and n are reduced, with a rank each
``channels``   no matrix: fewer of the n, as they are, and the rest refitted to these
=============  ==========================  ============================
"""


def row_dims(view: View, dims: int) -> tuple[bool, ...]:
    """For each of d kernel dimensions, whether it belongs to the rows of the matrix.

    >>> row_dims("spatial", 2)
    (False, True)
    """
    if view == "matrix":
        return (False,) * dims
    return tuple(dim > 0 or view != "spatial" for dim in range(dims))


def arrange(weight: Tensor, view: View) -> tuple[Tensor, Tensor]:
    """A weight (m x n x kernel) with the dimensions of a view: rows (m, q) and columns c.

    Returns:
        The weight as (m x c x q), and the place in a patch (n, k_1, ..., k_d) of each (c, q).
    """
    above = row_dims(view, weight.dim() - 2)
    first = [1, *(2 + dim for dim, row in enumerate(above) if not row)]
    last = [2 + dim for dim, row in enumerate(above) if row]
    places = torch.arange(weight[0].numel(), device=weight.device).reshape(weight.shape[1:])
    order = places.permute(*(dim - 1 for dim in first + last))
    split = len(first)
    arranged = weight.permute(0, *first, *last).flatten(1, split)
    return arranged.reshape(*arranged.shape[:2], -1), order.flatten()


@dataclass(frozen=True, eq=False)
class Components:
    """What approximations of one weight are sums of, or of some rows of it.

    Attributes:
        left: l_iq (g x m x k x q).
        right: r_iq (g x k x q x n); component i is ``Σ_q l_iq r_iqᵀ``.
    """

    left: Tensor
    right: Tensor

    def rows(self, start: int, count: int) -> Components:
        """The components in some rows of the weight."""
        return Components(self.left[:, start : start + count], self.right)


class Certificate(Protocol):
    """What is known of the components of a weight that were not looked at."""

    def bounds(self, count: int, *, rounded: bool = True) -> Tensor:
        """Upper bounds on the first singular values (count), with or without rounding."""

    def excess(self, rank: int) -> float:
        """Upper bound on what a truncation loses beyond the least at its rank."""


class Truncations(ABC):
    """Approximations of one weight in one view, of every rank.

    Attributes:
        sigma: root of the loss that each component carries, ``½ σ_i²`` (k), float64.
    """

    sigma: Tensor

    @abstractmethod
    def losses(self, ranks: Ranks) -> Losses:
        """Predicted loss at each of these ranks; infinite at one that is not to be chosen."""

    @abstractmethod
    def factors(self, rank: Rank) -> tuple[Tensor, ...]:
        """What the approximation of a rank is made of, left to right.

        Two factors, (m x r) and (r x n) for a matrix, with a leading dimension of groups and
        the kernel dimensions of the rows last in the left one for a convolution:
        (g x m/g x r x q), (g x r x columns).  Tucker-2 has a core between them:
        (g x m/g x r_2), (g x r_2 x r_1 x k), (g x r_1 x n/g).

        Of fewer channels: which are kept (r), int64 and increasing, and the weight that reads these
        only, in canonical layout and float64.
        """

    @property
    def certificate(self) -> Certificate | None:
        """What is known of the components that are left out; None if none are."""
        return None

    def derived(self, view: View) -> Truncations | None:
        """Approximations in another view that these come with; None if they have to be computed."""
        return None

    def components(self) -> Components | None:
        """What the approximations are sums of; None if they are no sums (Tucker-2)."""
        return None

    def remeasured(self, energies: Tensor) -> Self:
        """The components, ranked by losses that were measured.

        Args:
            energies: ``E[⟨∇W, c_i⟩²]`` of each of :meth:`components` (g x k).
        """
        raise TypeError(f"{type(self).__name__} has no components")


class Channels(Truncations):
    """A weight with k of its n input channels, 1 <= k <= n, in one order for every k.

    Attributes:
        order: channels in the order in which they are taken (n), int64.
        sigma: root of twice what each of these gains (n), float64; not sorted.
    """

    order: Tensor


class Quadratic(Protocol):
    """What a form asks of the metric at one site, a quadratic form on changes of its weight.

    All that is asked of it is :class:`fxcompress.metric.quadratic.QuadraticForm`.
    """

    @property
    def null(self) -> bool:
        """Whether no change of the weight makes a difference."""

    def loss(self, change: Tensor) -> float:
        """Predicted loss of a change (canonical layout), in nats for a Fisher metric."""

    def truncations(self, weight: Tensor, view: View) -> Truncations:
        """Approximations of a weight (canonical layout)."""

    def channels(self, weight: Tensor, order: Tensor | None = None) -> Channels:
        """Approximations of a weight (canonical layout) in the view ``channels``."""


@dataclass(frozen=True, eq=False)
class Spectrum(Truncations):
    """The decomposition of one weight W (m x n), with k = min(m, n) components.

    Attributes:
        sigma: singular values of the whitened weight (k), float64, non-increasing.
        left: (m x k); its first r columns times the first r rows of ``right`` are the best
            approximation of rank r in the metric.
        right: (k x n).  ``left @ right`` is W to rounding, whatever the metric.
    """

    sigma: Tensor
    left: Tensor
    right: Tensor

    def loss(self) -> Tensor:
        """Predicted loss at every rank 0..k: ``½ Σ_{i>r} σ_i²`` (k + 1), float64."""
        return tail(0.5 * self.sigma.square())

    def losses(self, ranks: Ranks) -> Losses:
        """That loss at some ranks."""
        return cast("Losses", self.loss().cpu().numpy()[ranks])

    def factors(self, rank: Rank) -> tuple[Tensor, Tensor]:
        """The first r components, (m x r) and (r x n)."""
        assert isinstance(rank, int)
        return self.left[:, :rank], self.right[:rank]

    def components(self) -> Components:
        """One product of a column and a row each."""
        return Components(self.left[None, :, :, None], self.right[None, :, None])

    def remeasured(self, energies: Tensor) -> Self:
        """The components from the largest loss to the least."""
        sigma = energies[0].sqrt()
        order = torch.argsort(sigma, descending=True, stable=True)
        left, right = self.left[:, order], self.right[order]
        return replace(self, sigma=sigma[order], left=left, right=right)


@dataclass(frozen=True, eq=False)
class Halved(Truncations):
    """The decomposition of a weight W (m x n) of which only the smaller factor is kept.

    That one is square and invertible, whatever W is, and their product is W, so that the other one
    follows from both.

    Attributes:
        sigma: as of :class:`Spectrum`.
        square: its ``left`` (m x m) if m <= n, else its ``right`` (n x n).
        weight: returns W, float64.
    """

    sigma: Tensor
    square: Tensor
    weight: Callable[[], Tensor]

    @classmethod
    def of(cls, found: Spectrum, weight: Callable[[], Tensor]) -> Halved:
        """A decomposition with less of it in memory."""
        wide = len(found.left) <= found.right.shape[1]
        return cls(found.sigma, (found.left if wide else found.right).clone(), weight)

    def losses(self, ranks: Ranks) -> Losses:
        """Predicted loss at each rank."""
        return cast("Losses", tail(0.5 * self.sigma.square()).cpu().numpy()[ranks])

    def factors(self, rank: Rank) -> tuple[Tensor, Tensor]:
        """The first r components, (m x r) and (r x n)."""
        assert isinstance(rank, int)
        weight, square = self.weight(), self.square.to(torch.float64)
        if len(weight) <= weight.shape[1]:
            right = torch.linalg.solve(square, weight)[:rank]
            return self.square[:, :rank], right.to(self.square.dtype)
        left = torch.linalg.solve(square, weight, left=False)[:, :rank]
        return left.to(self.square.dtype), self.square[:rank]


@dataclass(frozen=True, eq=False)
class Target:
    """One weight, or several on one input stacked to one, as a form sees it.

    Attributes:
        weight: W in canonical layout (:mod:`fxcompress.operators.shape`), in the model's type.
        quadratic: the metric; None once it was given up, to free its memory.
        views: what was computed of :meth:`truncations`.
        producers: of a hidden value, the weights of what produces it; W is that of its consumer.
        chosen: what forms for hidden values take of it, by their names.
    """

    weight: Tensor
    quadratic: Quadratic | None
    views: dict[View, Truncations] = field(default_factory=dict)
    producers: tuple[Tensor, ...] = ()
    chosen: dict[str, Truncations] = field(default_factory=dict)

    def truncations(self, view: View = "matrix") -> Truncations:
        """Approximations of W in a view, computed when they are first asked for."""
        if view not in self.views:
            given = (each.derived(view) for each in self.views.values())
            found = next((each for each in given if each is not None), None)
            self.views[view] = found or self._computed(view)
        return self.views[view]

    def channels(self, order: Tensor | None = None) -> Channels:
        """W with fewer channels of its input, taken in an order, and refitted in the metric.

        Args:
            order: all channels (n), int64; the one that the metric chooses if it is None.
        """
        if order is not None:
            return self._metric.channels(self.weight, order)
        found = self.truncations("channels")
        assert isinstance(found, Channels)
        return found

    @property
    def spectrum(self) -> Spectrum:
        """The decomposition of a matrix (m x n)."""
        found = self.truncations()
        assert isinstance(found, Spectrum)
        return found

    def loss(self, other: Tensor) -> float:
        """Predicted loss of putting another weight (canonical layout) in W's place.

        In nats per prediction for a Fisher metric: ``½ tr(G Δ A Δᵀ)``, damping included.
        """
        return self._metric.loss(other - self.weight.to(other.dtype))

    def without_metric(self) -> Target:
        """The target with no more than what was computed already, to free the metric."""
        return replace(self, quadratic=None)

    def _computed(self, view: View) -> Truncations:
        metric = self._metric
        if view == "channels":
            return metric.channels(self.weight)
        return metric.truncations(self.weight, view)

    @property
    def _metric(self) -> Quadratic:
        if self.quadratic is None:
            raise RuntimeError("the metric was given up after the losses were known")
        return self.quadratic


def tail(terms: Tensor) -> Tensor:
    """Sums of the last k, k - 1, ..., 0 entries of the last dimension (... x k + 1)."""
    sums = terms.flip(-1).cumsum(-1).flip(-1)
    return torch.cat([sums, sums.new_zeros(*sums.shape[:-1], 1)], -1)


def stack(parts: Sequence[tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Factors of several groups with a leading dimension of groups."""
    return tuple(torch.stack(each) for each in zip(*parts, strict=True))
