"""What is asked of a metric at one site: a quadratic form on changes of its weight.

A form is about one matrix (m x n), or about one group of a convolution (m x n x k_1 x ... x k_d),
whose rows of input are patches.  :class:`Grouped` puts forms together for the groups of a
convolution (g x m/g x n/g x kernel), so that nothing else has to know of groups.

A new form says :attr:`QuadraticForm.null`, :meth:`QuadraticForm.loss`,
:meth:`QuadraticForm.truncations` and :meth:`QuadraticForm.solve`.  What it does not say beyond
that it does without: it is decomposed in full every time, offers no joint forms, and where channels
are dropped it refits nothing and offers no forms for what is left.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor

from fxcompress.forms.target import (
    Components,
    Losses,
    Rank,
    Ranks,
    Truncations,
    View,
    stack,
)
from fxcompress.metric.channels import ChannelTruncations, refused, zeroed
from fxcompress.metric.whiten import BlockWhitener, Whitener


class Factors(NamedTuple):
    """The damped factors of a form ``½ tr(G Δ A Δᵀ)``, as whiteners.

    Attributes:
        inputs: of A (n x n), over inputs or patches.
        outputs: of G (m x m).
    """

    inputs: Whitener
    outputs: Whitener | BlockWhitener


class QuadraticForm(ABC):
    """``½ vec(Δ)ᵀ M vec(Δ)`` for changes Δ of one weight: a metric at one site.

    It remembers nothing of the weights that it is asked about.
    """

    @property
    @abstractmethod
    def null(self) -> bool:
        """Whether no change of the weight makes a difference."""

    @abstractmethod
    def loss(self, change: Tensor) -> float:
        """Predicted loss of a change (canonical layout), in nats for a Fisher metric."""

    @abstractmethod
    def truncations(self, weight: Tensor, view: View) -> Truncations:
        """Approximations of a weight (canonical layout) of every rank.

        The view ``channels`` is asked of :meth:`channels`, whatever is said here.

        Raises:
            ValueError: the weight is not finite.
        """

    @abstractmethod
    def solve(self, gradient: Tensor) -> Tensor:
        """The natural gradient ``M⁻¹ ∇``, damping included, float64; 0 if the form is.

        Args:
            gradient: with respect to the weight (canonical layout).
        """

    def channels(self, weight: Tensor, order: Tensor | None = None) -> ChannelTruncations:
        """Approximations of a weight (canonical layout) by fewer channels of its input.

        This one asks for nothing but losses, 2n of them: nothing is refitted.

        Args:
            weight: W.
            order: in which channels are taken (n), int64; the metric chooses if it is None.

        Raises:
            ValueError: the weight is not finite.
        """
        return zeroed(weight, self.loss, order)

    def restricted(
        self, rows: Tensor | None = None, inputs: Tensor | None = None
    ) -> QuadraticForm | None:
        """The form for changes in some rows and input channels only; None if there is none.

        Args:
            rows: outputs of a matrix (int64); None for all.
            inputs: of its inputs (int64); None for all.
        """
        return None

    @property
    def by_group(self) -> tuple[QuadraticForm, ...]:
        """The forms of the groups of a convolution; of a matrix itself."""
        return (self,)

    @property
    def factors(self) -> Factors | None:
        """A and G of a Kronecker product; None of any other form, and of a convolution's groups."""
        return None

    @classmethod
    def stacked(cls, parts: Sequence[Self], rows: Sequence[int]) -> QuadraticForm | None:
        """The form of weights on one input, stacked to one (Σm x n); None if there is none.

        Args:
            parts: the forms of the weights.
            rows: of each weight.
        """
        return None

    def shares(
        self, weight: Tensor, found: Truncations, rows: Sequence[int]
    ) -> Callable[[int], Tensor]:
        """The loss of each of several stacked weights at a rank, up to a common factor.

        Args:
            weight: the stacked weight (Σm x n), in a form made by :meth:`stacked`.
            found: its truncations.
            rows: of each weight.
        """
        wide = weight.to(torch.float64)

        def parts(rank: int) -> Tensor:
            left, right = found.factors(rank)
            change = left.to(torch.float64) @ right.to(torch.float64) - wide
            losses, start = [], 0
            for count in rows:
                alone = torch.zeros_like(change)
                alone[start : start + count] = change[start : start + count]
                losses.append(self.loss(alone))
                start += count
            return torch.tensor(losses, dtype=torch.float64)

        return parts

    def for_matrices(self) -> QuadraticForm:
        """The form without what takes memory and is asked for by kernels only."""
        return self

    def starting_from(self, basis: Tensor, iterations: int) -> QuadraticForm:
        """The form, whose truncations may start from a space instead of from nothing.

        They say then by a :class:`~fxcompress.forms.target.Certificate` what that may have missed.

        Args:
            basis: what :meth:`start` returned for a weight nearby.
            iterations: of a subspace iteration.
        """
        return self

    def start(self, found: Truncations, rank: int) -> Tensor | None:
        """Where to start the next time, if that rank is expected again; None for nowhere.

        Args:
            found: truncations of a weight seen as one matrix.
            rank: the expected one.
        """
        return None


@dataclass(frozen=True, eq=False)
class Grouped(QuadraticForm):
    """The form of a convolution (g x m/g x n/g x kernel): its groups one by one.

    The groups are independent of one another: a block of the Fisher each.
    """

    groups: tuple[QuadraticForm, ...]

    @property
    def by_group(self) -> tuple[QuadraticForm, ...]:
        """The forms of the groups."""
        return self.groups

    @property
    def null(self) -> bool:
        """Whether no change of the weight makes a difference."""
        return all(group.null for group in self.groups)

    def loss(self, change: Tensor) -> float:
        """Sum over the groups."""
        return sum(group.loss(part) for group, part in zip(self.groups, change, strict=True))

    def truncations(self, weight: Tensor, view: View) -> Truncations:
        """Approximations at equal ranks in all groups."""
        if view == "channels":
            return self.channels(weight)
        parts = zip(self.groups, weight, strict=True)
        return GroupedTruncations(tuple(group.truncations(part, view) for group, part in parts))

    def channels(self, weight: Tensor, order: Tensor | None = None) -> ChannelTruncations:
        """Fewer channels of the one group that there is; of several, none are chosen."""
        if len(self.groups) == 1:
            return replace(self.groups[0].channels(weight[0], order), weight=weight, axis=2)
        return refused(weight, "each group of the convolution reads channels of its own")

    def solve(self, gradient: Tensor) -> Tensor:
        """Group by group."""
        parts = zip(self.groups, gradient, strict=True)
        return torch.stack([group.solve(part) for group, part in parts])


@dataclass(frozen=True, eq=False)
class GroupedTruncations(Truncations):
    """Truncations of all groups, each at the same rank."""

    groups: tuple[Truncations, ...]

    @cached_property
    def sigma(self) -> Tensor:  # type: ignore[override]
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

    def components(self) -> Components | None:
        """The components of all groups, side by side."""
        parts = [each for group in self.groups if (each := group.components()) is not None]
        if len(parts) < len(self.groups):
            return None
        lefts, rights = [each.left for each in parts], [each.right for each in parts]
        return Components(torch.cat(lefts), torch.cat(rights))

    def remeasured(self, energies: Tensor) -> GroupedTruncations:
        """Every group by its own losses."""
        pairs = zip(self.groups, energies, strict=True)
        return GroupedTruncations(tuple(group.remeasured(part[None]) for group, part in pairs))

    def derived(self, view: View) -> Truncations | None:
        """Approximations in another view that those of all groups come with."""
        parts = [each for group in self.groups if (each := group.derived(view)) is not None]
        return GroupedTruncations(tuple(parts)) if len(parts) == len(self.groups) else None
