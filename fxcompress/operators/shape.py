"""What an operator looks like to metrics and forms: its sizes, and how its weight is laid out.

Every weight has a *canonical* layout, whichever way its module stores it:

=============  ==================================================================
linear         (m x n)
embedding      (d x V): the linear map of a one-hot vector
convolution    (g x m/g x n/g x k_1 x ... x k_d): g groups, each a map of patches
=============  ==================================================================

What an operator is given and what it is told is brought to ``[sample, group, position, feature]``:
at each position of each sample a group maps a row of its input (for a convolution, a patch) to a
row of outputs.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from fxcompress.operators import rows
from fxcompress.operators.words import AttributeValue, Takes

CPU = torch.device("cpu")

Sizes = tuple[int, ...]


class Shape(ABC):
    """Shape, type and device of one operator; a frozen dataclass of its kind.

    Attributes:
        op: canonical operator.
        takes: what it is given: rows along the last dimension; indices of rows of its weight; or
            values with spatial dimensions, of which every group sees patches.
        in_features, out_features: n and m; channels of all groups of a convolution.
        bias: whether it adds one.
        dtype, device: of the weight.
        kernel_size: one number a spatial dimension; empty for what takes rows or indices.
        matrix: groups, and rows and columns of the matrix that each of them is.
        pooled: whether its Fisher is scaled where many positions make one prediction
            (:mod:`fxcompress.metric.pooled`).
        full_rank: the largest rank of a group.
        weights: entries of the dense weight.
        macs: multiply-accumulates of the dense operator on what they are counted for.
        counted: sizes of the inputs that multiply-accumulates are counted for: (positions,), or
            (items, then extents).
        reading: how it reads its input: equal for operators that see the same rows of one value.
        informative_rows: rows that it takes at least to tell all its inputs apart.
        attributes: what rules know of it, beside the type of its weight.
    """

    if TYPE_CHECKING:  # at run time they would be defaults of fields
        __dataclass_fields__: ClassVar[dict[str, Any]]

        @property
        @abstractmethod
        def op(self) -> str: ...
        @property
        @abstractmethod
        def takes(self) -> Takes: ...
        @property
        @abstractmethod
        def in_features(self) -> int: ...
        @property
        @abstractmethod
        def out_features(self) -> int: ...
        @property
        @abstractmethod
        def bias(self) -> bool: ...
        @property
        @abstractmethod
        def dtype(self) -> torch.dtype: ...
        @property
        @abstractmethod
        def device(self) -> torch.device: ...
        @property
        @abstractmethod
        def kernel_size(self) -> Sizes: ...
        @property
        @abstractmethod
        def matrix(self) -> tuple[int, int, int]: ...
        @property
        @abstractmethod
        def pooled(self) -> bool: ...
        @property
        @abstractmethod
        def full_rank(self) -> int: ...
        @property
        @abstractmethod
        def weights(self) -> int: ...
        @property
        @abstractmethod
        def macs(self) -> int: ...
        @property
        @abstractmethod
        def counted(self) -> Sequence[Sizes]: ...
        @property
        @abstractmethod
        def reading(self) -> tuple[Any, ...]: ...
        @property
        @abstractmethod
        def informative_rows(self) -> int: ...
        @property
        @abstractmethod
        def attributes(self) -> dict[str, AttributeValue]: ...

    @abstractmethod
    def canonical(self, weight: Tensor) -> Tensor:
        """The canonical layout of a stored weight."""

    @abstractmethod
    def stored(self, canonical: Tensor) -> Tensor:
        """The inverse of :meth:`canonical`."""

    def mirrored(self) -> Shape | None:
        """The shape whose weight is stored as the transpose of this one's; None without any."""
        return None

    @property
    def is_mirrored(self) -> bool:
        """Whether the weight is stored as the transpose of what torch's own module stores."""
        return False

    @property
    def in_axis(self) -> int:
        """The dimension of the canonical weight that counts input channels (of a group)."""
        return 2 if self.takes == "patches" else 1

    @property
    def is_channelwise(self) -> bool:
        """Whether every output channel reads the input channel of its number only."""
        return self.matrix[0] == self.in_features == self.out_features > 1

    def by_outputs(self, canonical: Tensor) -> Tensor:
        """A canonical weight with all output channels first (m x ...)."""
        return canonical.flatten(0, 1) if self.takes == "patches" else canonical

    def of_outputs(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`by_outputs`."""
        if self.takes != "patches":
            return rows
        return rows.reshape(self.matrix[0], -1, *rows.shape[1:])

    @abstractmethod
    def resized(self, inputs: int, outputs: int) -> Self:
        """An operator like this one with other numbers of channels; a channelwise one stays so."""

    @property
    @abstractmethod
    def module_sizes(self) -> dict[str, int]:
        """What modules of the kind say of their channels, by the names of their fields."""

    def same_product(self, other: Shape) -> bool:
        """Whether two operators make the same of one input and one weight, of whatever type."""
        return bool(replace(self, dtype=other.dtype, device=other.device) == other)

    @property
    def stored_size(self) -> Sizes:
        """The size of the weight as it is stored."""
        groups, m, n = self.matrix
        kernel = self.kernel_size
        size = (groups, m, n // math.prod(kernel), *kernel) if kernel else (m, n)
        return tuple(self.stored(torch.empty(size, device="meta")).shape)

    def applying(self, weight: nn.Parameter) -> nn.Module:
        """A module of this shape, without bias, that has its weight in common with others."""
        module = replace(self, device=torch.device("meta")).bare()
        module.weight = weight
        return module

    @abstractmethod
    def bare(self) -> nn.Module:
        """An uninitialized module of this shape."""

    @abstractmethod
    def counted_on(self, rows: int, inputs: tuple[Sizes, ...]) -> Self:
        """The shape with what multiply-accumulates are counted for.

        Args:
            rows: positions, of an operator that takes rows or indices.
            inputs: sizes (items, then extents) of the inputs of any other.
        """

    @abstractmethod
    def examples(self, numbers: torch.Generator) -> list[Tensor]:
        """Random inputs of the sizes that multiply-accumulates are counted for."""

    @abstractmethod
    def example(self) -> Tensor:
        """A small random input, always the same."""

    @abstractmethod
    def input_rows(self, data: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        """Rows that the operator is given, without padding, some at a time.

        Args:
            data: its input.
            mask: which rows count: (...) of data (..., n); of indices, of these; of a convolution,
                the positions of its output (items x extents).  None for all.

        Yields:
            (positions x n), or indices (positions), or (g x positions x n/g·k) of patches.
        """

    def output_rows(self, gradient: Tensor, mask: Tensor | None) -> Tensor:
        """Rows that the operator is told: (positions x m), or (g x positions x m/g) for patches.

        Args:
            gradient: of its output.
            mask: which rows count: (...) of (..., m); of a convolution (items x extents).
        """
        return rows.counted(gradient, mask)

    @abstractmethod
    def weight_gradients(self, data: Tensor, gradient: Tensor) -> Iterator[Tensor]:
        """Gradient of the weight for every sample, ``Σ_t g_t a_tᵀ``, some samples at a time.

        A matrix (rows x features) is one position a sample.

        Yields:
            (samples x g x m/g x n/g·k), g = 1 for what has no groups; in order.
        """

    def squared_gradients(self, data: Tensor, gradient: Tensor, *, entries: bool) -> Tensor:
        """Squares of :meth:`weight_gradients`, summed over samples, float64.

        Args:
            data, gradient: as there.
            entries: for every entry (g x m/g x n/g·k); or means over each row (g x m/g).
        """
        return rows.squared(self.weight_gradients(data, gradient), entries=entries)

    @abstractmethod
    def inner_products(self, data: Tensor, gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
        """Inner products of :meth:`weight_gradients` with some weights (samples x g x k).

        Args:
            data, gradient: as there.
            left, right: weight i of group g is ``left[g, :, i] @ right[g, i]``, (g x m/g x k x q)
                and (g x k x q x n/g·k).
        """


def extents_of(shape: Shape) -> int | None:
    """Number of spatial dimensions of what an operator takes; None if it takes rows."""
    return len(shape.kernel_size) or None


def channels_of(shape: Shape) -> int:
    """The dimension of an operator's output that counts its features: the last one for rows."""
    return -1 - len(shape.kernel_size)


def is_grouped(shape: Shape) -> bool:
    """Whether the canonical weight has a dimension of groups, then one of the rows of each."""
    return shape.takes == "patches"


def samples_in(data: Tensor, shape: Shape) -> int:
    """How many samples a value has that an operator is given: spatial ones may be one by itself."""
    single = shape.takes == "patches" and data.dim() < len(shape.kernel_size) + 2
    return 1 if single else len(data)
