"""Convolutions and transposed convolutions in one to three dimensions."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.operators import patches, rows
from fxcompress.operators.calls import Application, Call, same
from fxcompress.operators.kind import Kind
from fxcompress.operators.shape import CPU, Shape, Sizes
from fxcompress.operators.words import OPERATORS, AttributeValue, Takes, operators_of

CLASSES: Mapping[str, type[nn.Module]] = {
    op: getattr(nn, f"Conv{'Transpose' if 'transpose' in op else ''}{OPERATORS[op].ops[op]}d")
    for op in sorted(operators_of("convolution"))
}
"""The module of each operator."""


@dataclass(frozen=True)
class ConvShape(Shape):
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
        """The canonical operator of the shape."""
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
    def takes(self) -> Takes:
        return "patches"

    @property
    def matrix(self) -> tuple[int, int, int]:
        return self.groups, self.group_out, self.group_in * self.taps

    @property
    def counted(self) -> Sequence[Sizes]:
        return self.inputs

    @property
    def pooled(self) -> bool:
        return False

    @property
    def informative_rows(self) -> int:
        return self.group_in * self.taps

    @property
    def attributes(self) -> dict[str, AttributeValue]:
        """What rules know of it."""
        names = (
            *("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation"),
            *("groups", "bias", "padding_mode"),
        )
        return {name: getattr(self, name) for name in names}

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
        """How the operator reads its input: in which patches."""
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

    def resized(self, inputs: int, outputs: int) -> ConvShape:
        groups = inputs if self.is_channelwise else self.groups
        return replace(self, in_channels=inputs, out_channels=outputs, groups=groups)

    @property
    def module_sizes(self) -> dict[str, int]:
        n, m = self.in_channels, self.out_channels
        return {"in_channels": n, "out_channels": m, "groups": self.groups}

    def bare(self) -> nn.Module:
        """An uninitialized convolution."""
        more = {"output_padding": self.output_padding} if self.transposed else {}
        layer: nn.Module = nn.utils.skip_init(  # type: ignore[no-untyped-call]
            CLASSES[self.op],
            self.in_channels,
            self.out_channels,
            self.kernel_size,
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            groups=self.groups,
            bias=self.bias,
            padding_mode=self.padding_mode,
            dtype=self.dtype,
            device=self.device,
            **more,
        )
        return layer

    def counted_on(self, rows: int, inputs: tuple[Sizes, ...]) -> ConvShape:
        return replace(self, inputs=inputs)

    def examples(self, numbers: torch.Generator) -> list[Tensor]:
        device = numbers.device
        sizes = [(items, self.in_channels, *spatial) for items, *spatial in self.inputs]
        return [torch.randn(s, device=device, generator=numbers).to(self.dtype) for s in sizes]

    def example(self) -> Tensor:
        numbers = torch.Generator().manual_seed(0)
        size = (2, self.in_channels, *self.inputs[0][1:])
        return torch.randn(size, generator=numbers).to(self.device, self.dtype)

    def input_rows(self, data: Tensor, mask: Tensor | None) -> Iterator[Tensor]:
        for taps, real in patches.masked(data, self, mask):
            each = taps.transpose(0, 1).flatten(1, 2)
            yield each if real is None else each[:, real]

    def output_rows(self, gradient: Tensor, mask: Tensor | None) -> Tensor:
        items = gradient.unsqueeze(0) if gradient.dim() < self.dims + 2 else gradient
        each = items.reshape(len(items), self.groups, self.group_out, -1)
        each = each.permute(1, 0, 3, 2).flatten(1, 2)
        return each if mask is None else each[:, mask.reshape(-1)]

    def weight_gradients(self, data: Tensor, gradient: Tensor) -> Iterator[Tensor]:
        wide = rows.wide(gradient)
        return patches.weight_gradients(data.to(wide), gradient.to(wide), self)

    def inner_products(self, data: Tensor, gradient: Tensor, left: Tensor, right: Tensor) -> Tensor:
        batched = data.dim() > self.dims + 1
        out = gradient.new_zeros(len(data) if batched else 1, self.groups, left.shape[2])
        for those, taps, part in patches.blocks(data.to(gradient.dtype), gradient, self):
            assert part is not None
            out[those] += rows.products(part, taps, left, right)
        return out

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


class _Convolution(Kind):
    name = "convolution"
    classes = tuple(CLASSES.values())
    methods = ("forward", "_conv_forward", "_output_padding")

    def op(self, module: nn.Module) -> str:
        return next(op for op, cls in CLASSES.items() if isinstance(module, cls))

    def shape(self, module: Any) -> ConvShape:
        weight = module.weight
        made = self._shape(module, weight.dtype)
        return replace(made, device=weight.device)

    def attributes(self, module: Any, args: Any, kwargs: Any) -> dict[str, AttributeValue]:
        found = self._shape(module).attributes
        if module.transposed and (len(args) > 1 or kwargs.get("output_size") is not None):
            found["output_size"] = True
        return found

    @staticmethod
    def _shape(module: Any, dtype: torch.dtype = torch.float32) -> ConvShape:
        return ConvShape(
            in_channels=module.in_channels,
            out_channels=module.out_channels,
            kernel_size=tuple(module.kernel_size),
            stride=tuple(module.stride),
            padding=module.padding if isinstance(module.padding, str) else tuple(module.padding),
            dilation=tuple(module.dilation),
            groups=module.groups,
            bias=module.bias is not None,
            padding_mode=module.padding_mode,
            transposed=module.transposed,
            output_padding=tuple(module.output_padding) if module.transposed else (),
            dtype=dtype,
        )

    def obstacle(self, attributes: Mapping[str, AttributeValue]) -> str | None:
        if attributes.get("output_size"):
            return "it is called with output_size, which decides its output padding anew every time"
        return None

    def parse(
        self, text: str, bias: bool, dtype: torch.dtype, device: torch.device = CPU
    ) -> ConvShape | None:
        head, *words = text.split(", ")
        found = _TEXT.fullmatch(head)
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
        output_padding = given.get("output_padding", "0")
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
            output_padding=_numbers(output_padding, dims) if transposed else (),
            dtype=dtype,
            device=device,
        )
        sound = mode in _PADDING_MODES and min(made.stride) > 0 and min(made.dilation) > 0
        g, n, m = made.groups, made.in_channels, made.out_channels
        return made if sound and g > 0 and not n % g | m % g else None

    def application(self, call: Call, is_weight: Callable[[Any], bool]) -> Application | None:
        if call.name not in CLASSES:
            return None
        dims, transposed = OPERATORS[call.name].ops[call.name], "transpose" in call.name
        names = _TRANSPOSED_ARGUMENTS if transposed else _ARGUMENTS
        given = {**dict(zip(names, call.args, strict=False)), **call.kwargs}
        weight, bias, groups = given["weight"], given.get("bias"), given.get("groups", 1)
        first, second, *kernel = weight.shape

        def each(name: str, default: int) -> Any:
            value = given.get(name, default)
            if isinstance(value, str):
                return value
            sizes = (value,) if isinstance(value, int) else tuple(value)
            return sizes * dims if len(sizes) == 1 else sizes

        shape = ConvShape(
            in_channels=first if transposed else second * groups,
            out_channels=second * groups if transposed else first,
            kernel_size=tuple(kernel),
            stride=each("stride", 1),
            padding=each("padding", 0),
            dilation=each("dilation", 1),
            groups=groups,
            bias=False,
            transposed=transposed,
            output_padding=each("output_padding", 0) if transposed else (),
            dtype=weight.dtype,
            device=weight.device,
        )
        after = partial(_biased, bias, dims) if bias is not None else same
        return Application(shape, weight, given["input"], after=after, bias=bias)


_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED_ARGUMENTS = (*_ARGUMENTS[:5], "output_padding", "groups", "dilation")
_TEXT = re.compile(r"(conv|conv_transpose)([123])d ([0-9]{1,9})→([0-9]{1,9}) ([0-9×]{1,32})")
_PADDING_MODES = ("zeros", "reflect", "replicate", "circular")


def _biased(bias: Tensor, dims: int, value: Tensor) -> Tensor:
    return value + bias.reshape(-1, *(1 for _ in range(dims)))


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


KIND = _Convolution()
