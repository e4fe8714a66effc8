"""What an operator looks like to a form: its sizes, and how its weight is laid out.

Every weight has a *canonical* layout, whichever way its module stores it:

=============  ==================================================================
linear         (m x n)
embedding      (d x V): the linear map of a one-hot vector
convolution    (g x m/g x n/g x k_1 x ... x k_d): g groups, each a map of patches
=============  ==================================================================

A transposed convolution is the convolution of its input, spread out with zeros, by the mirrored
kernel; its canonical weight is that of this convolution.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


@dataclass(frozen=True)
class LinearShape:
    """A linear operator: W is (m x n) = (out_features x in_features).

    Attributes:
        transposed: the weight is stored as (n x m), as Hugging Face's ``Conv1D`` has it.
        rows: positions that multiply-accumulates are counted for.
    """

    in_features: int
    out_features: int
    bias: bool
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    transposed: bool = False
    rows: int = 1

    @property
    def op(self) -> str:
        """Its canonical operator."""
        return "linear"

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def weights(self) -> int:
        """Entries of the dense weight."""
        return self.in_features * self.out_features

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense operator."""
        return self.rows * self.weights

    @property
    def reading(self) -> tuple[Any, ...]:
        """How it reads its input: equal for operators that see the same rows of one value."""
        return ()

    def canonical(self, weight: Tensor) -> Tensor:
        """The canonical layout (m x n) of a stored weight."""
        return weight.T if self.transposed else weight

    def stored(self, canonical: Tensor) -> Tensor:
        """The inverse of :meth:`canonical`."""
        return canonical.T if self.transposed else canonical

    def __str__(self) -> str:
        return f"linear {self.in_features}→{self.out_features}"


@dataclass(frozen=True)
class EmbeddingShape:
    """A look-up in a table of ``in_features`` rows (V) and ``out_features`` columns (d).

    Attributes:
        padding_idx: the row that gets no gradient, None if there is none.
        sparse, scale_grad_by_freq: as of ``nn.Embedding``.
        max_norm: rows are renormalized in place when they are read; None if not.
        rows: look-ups that multiply-accumulates are counted for.
    """

    in_features: int
    out_features: int
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    padding_idx: int | None = None
    sparse: bool = False
    scale_grad_by_freq: bool = False
    max_norm: float | None = None
    rows: int = 1

    @property
    def op(self) -> str:
        """Its canonical operator."""
        return "embedding"

    @property
    def bias(self) -> bool:
        """An embedding has none."""
        return False

    @property
    def full_rank(self) -> int:
        return min(self.in_features, self.out_features)

    @property
    def weights(self) -> int:
        """Entries of the table."""
        return self.in_features * self.out_features

    @property
    def macs(self) -> int:
        """A look-up multiplies nothing."""
        return 0

    @property
    def reading(self) -> tuple[Any, ...]:
        """How it reads its input: by index."""
        return (self.op, self.in_features)

    def canonical(self, weight: Tensor) -> Tensor:
        """The canonical layout (d x V) of the table (V x d)."""
        return weight.T

    def stored(self, canonical: Tensor) -> Tensor:
        """The inverse of :meth:`canonical`."""
        return canonical.T

    def __str__(self) -> str:
        return f"embedding {self.in_features}→{self.out_features}"


Sizes = tuple[int, ...]


@dataclass(frozen=True)
class ConvShape:
    """A convolution over d dimensions, or a transposed one.

    Attributes:
        in_channels, out_channels: n and m.
        kernel_size, stride, dilation: one number per dimension.
        padding: likewise, or ``"same"`` or ``"valid"``.
        groups: g; n and m are multiples of it.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        transposed: whether it is a transposed convolution.
        output_padding: of a transposed convolution, zeros for any other.
        inputs: sizes (items, then d extents) of the inputs that multiply-accumulates are
            counted for.
    """

    in_channels: int
    out_channels: int
    kernel_size: Sizes
    stride: Sizes
    padding: Sizes | str
    dilation: Sizes
    groups: int
    bias: bool
    padding_mode: str = "zeros"
    transposed: bool = False
    output_padding: Sizes = ()
    dtype: torch.dtype = torch.float32
    device: torch.device = CPU
    inputs: tuple[Sizes, ...] = ()

    @property
    def op(self) -> str:
        """Its canonical operator."""
        return f"conv_transpose{self.dims}d" if self.transposed else f"conv{self.dims}d"

    @property
    def dims(self) -> int:
        """Number of spatial dimensions d."""
        return len(self.kernel_size)

    @property
    def taps(self) -> int:
        """Positions of the kernel, the product of its sizes."""
        return math.prod(self.kernel_size)

    @property
    def group_in(self) -> int:
        """Input channels of a group, n/g."""
        return self.in_channels // self.groups

    @property
    def group_out(self) -> int:
        """Output channels of a group, m/g."""
        return self.out_channels // self.groups

    @property
    def in_features(self) -> int:
        return self.in_channels

    @property
    def out_features(self) -> int:
        return self.out_channels

    @property
    def full_rank(self) -> int:
        """The largest rank of a group seen as a map of patches: min(m/g, n/g·k)."""
        return min(self.group_out, self.group_in * self.taps)

    @property
    def weights(self) -> int:
        """Entries of the dense weight."""
        return self.out_channels * self.group_in * self.taps

    @property
    def macs(self) -> int:
        """Multiply-accumulates of the dense operator on :attr:`inputs`.

        Every weight once per output position; of a transposed convolution, per input position.
        """
        sizes = self.inputs if self.transposed else self.outputs
        return self.weights * sum(math.prod(size) for size in sizes)

    @property
    def outputs(self) -> tuple[Sizes, ...]:
        """Sizes of the outputs that belong to :attr:`inputs`."""
        return tuple((items, *self._extents(spatial)) for items, *spatial in self.inputs)

    def _extents(self, spatial: Sequence[int]) -> Sizes:
        return tuple(self._extent(size, dim) for dim, size in enumerate(spatial))

    def _extent(self, size: int, dim: int) -> int:
        reach = self.dilation[dim] * (self.kernel_size[dim] - 1)
        if self.padding == "same":
            return size
        padding = 0 if isinstance(self.padding, str) else self.padding[dim]
        if self.transposed:
            grown = (size - 1) * self.stride[dim] - 2 * padding + reach
            return grown + self.output_padding[dim] + 1
        return (size + 2 * padding - reach - 1) // self.stride[dim] + 1

    @property
    def reading(self) -> tuple[Any, ...]:
        """How it reads its input: in which patches."""
        sizes = (self.kernel_size, self.stride, self.padding, self.dilation, self.output_padding)
        return (self.op, self.groups, self.padding_mode, *sizes)

    def part(
        self,
        in_channels: int,
        out_channels: int,
        owned: Sequence[bool],
        bias: bool = False,
        inputs: tuple[Sizes, ...] = (),
    ) -> ConvShape:
        """A convolution that does the work of this one in some of its dimensions only.

        Args:
            in_channels, out_channels: of all groups together.
            owned: for each dimension, whether kernel, stride, padding and dilation are this
                one's; otherwise they are 1, 1, 0 and 1.
            bias: whether it has one.
            inputs: sizes of its inputs.
        """
        any_owned = any(owned)
        padding: Sizes | str = tuple(0 for _ in owned)
        if any_owned:
            padding = (
                self.padding if isinstance(self.padding, str) else _where(owned, self.padding, 0)
            )
        transposed = self.transposed and any_owned
        return replace(
            self,
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=_where(owned, self.kernel_size, 1),
            stride=_where(owned, self.stride, 1),
            padding=padding,
            dilation=_where(owned, self.dilation, 1),
            bias=bias,
            padding_mode=self.padding_mode if any_owned else "zeros",
            transposed=transposed,
            output_padding=_where(owned, self.output_padding, 0) if transposed else (),
            inputs=inputs,
        )

    def canonical(self, weight: Tensor) -> Tensor:
        """The canonical layout (g x m/g x n/g x kernel) of a stored weight."""
        grouped = weight.reshape(self.groups, -1, *weight.shape[1:])
        if not self.transposed:
            return grouped
        return grouped.transpose(1, 2).flip(tuple(range(3, 3 + self.dims)))

    def stored(self, canonical: Tensor) -> Tensor:
        """The inverse of :meth:`canonical`."""
        if not self.transposed:
            return canonical.flatten(0, 1)
        spatial = tuple(range(3, 3 + self.dims))
        return canonical.flip(spatial).transpose(1, 2).flatten(0, 1)

    def __str__(self) -> str:
        """``conv2d 64→128 3×3, stride 2, padding 1``: what is not as in the plainest one."""
        words = [f"{self.op} {self.in_channels}→{self.out_channels} {_by(self.kernel_size)}"]
        for name, plain in (("stride", 1), ("padding", 0), ("dilation", 1), ("output_padding", 0)):
            value = getattr(self, name)
            if isinstance(value, str):
                words.append(f"{name} {value}")
            elif any(each != plain for each in value):
                words.append(f"{name} {_short(value)}")
        if self.groups > 1:
            words.append(f"groups {self.groups}")
        if self.padding_mode != "zeros":
            words.append(self.padding_mode)
        return ", ".join(words)


Shape = LinearShape | ConvShape | EmbeddingShape


MOST_CHANNELS = 2**28
"""Features, channels, rows or taps of an operator that is read from a text."""

MOST_WEIGHTS = 2**42
"""Entries of its weight."""

_MATRIX = re.compile(r"(linear|embedding) ([0-9]{1,9})→([0-9]{1,9})")
_CONVOLUTION = re.compile(r"(conv|conv_transpose)([123])d ([0-9]{1,9})→([0-9]{1,9}) ([0-9×]{1,32})")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def parse_shape(text: str, bias: bool, dtype: torch.dtype, device: torch.device = CPU) -> Shape:
    """The operator that ``str()`` describes.

    >>> parse_shape("conv1d 6→4 3, padding same, groups 2", True, torch.float32).group_out
    2

    Args:
        text: as of ``str()``.
        bias: whether it has one.
        dtype: of the weight.
        device: of the weight.

    Raises:
        ValueError: there is no such operator, or it is larger than any that fits into memory.
    """
    made = _parsed(text, bias, dtype, device)
    if made is None or str(made) != text or (bias and not made.bias):
        raise ValueError(f"'{text}' describes no operator")
    sizes = (made.in_features, made.out_features)
    taps = made.taps if isinstance(made, ConvShape) else 1
    if min(*sizes, taps) < 1 or max(*sizes, taps) > MOST_CHANNELS or made.weights > MOST_WEIGHTS:
        raise ValueError(f"'{text}' is out of all bounds")
    return made


def _parsed(text: str, bias: bool, dtype: torch.dtype, device: torch.device) -> Shape | None:
    if plain := _MATRIX.fullmatch(text):
        n, m = int(plain[2]), int(plain[3])
        if plain[1] == "linear":
            return LinearShape(n, m, bias, dtype, device)
        return EmbeddingShape(n, m, dtype, device)
    head, *words = text.split(", ")
    found = _CONVOLUTION.fullmatch(head)
    if not found:
        return None
    dims = int(found[2])
    given: dict[str, str] = {}
    for word in words:
        name, _, value = word.partition(" ")
        given[name if value else "padding_mode"] = value or name
    padding = given.get("padding", "0")
    groups, mode = given.get("groups", "1"), given.get("padding_mode", "zeros")
    transposed = found[1] == "conv_transpose"
    made = ConvShape(
        in_channels=int(found[3]),
        out_channels=int(found[4]),
        kernel_size=_numbers(found[5], dims),
        stride=_numbers(given.get("stride", "1"), dims),
        padding=padding if padding in ("same", "valid") else _numbers(padding, dims),
        dilation=_numbers(given.get("dilation", "1"), dims),
        groups=_numbers(groups, 1)[0],
        bias=bias,
        padding_mode=mode,
        transposed=transposed,
        output_padding=_numbers(given.get("output_padding", "0"), dims) if transposed else (),
        dtype=dtype,
        device=device,
    )
    sound = mode in _PADDING_MODES and min(made.stride) > 0 and min(made.dilation) > 0
    whole = made.groups > 0 and not made.in_channels % made.groups | made.out_channels % made.groups
    return made if sound and whole else None


def _numbers(text: str, dims: int) -> Sizes:
    """``3×5``; one number stands for all dimensions."""
    numbers = tuple(int(part) for part in text.split("×") if re.fullmatch("[0-9]{1,9}", part))
    numbers = numbers * dims if len(numbers) == 1 else numbers
    if len(numbers) != dims:
        raise ValueError(f"'{text}' are not {dims} numbers")
    return numbers


def _where(owned: Sequence[bool], values: Sequence[int], other: int) -> Sizes:
    return tuple(value if own else other for own, value in zip(owned, values, strict=True))


def _by(values: Sequence[int]) -> str:
    return "×".join(map(str, values))


def _short(values: Sequence[int]) -> str:
    return str(values[0]) if len(set(values)) == 1 else _by(values)
