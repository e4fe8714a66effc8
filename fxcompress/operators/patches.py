"""Patches of a convolution's input.

They take k times the memory of the input, so they come in blocks of at most
:data:`fxcompress.operators.rows.BLOCK` entries, never all at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.operators import rows

if TYPE_CHECKING:
    from fxcompress.operators.convolution import ConvShape


def blocks(
    data: Tensor, gradient: Tensor | None, shape: ConvShape
) -> Iterator[tuple[slice, Tensor, Tensor | None]]:
    """Patches and output gradients of a convolution, block by block.

    Args:
        data: its input (items x n x extents), or without items.
        gradient: of its output (items x m x extents), likewise; or None.
        shape: of the operator.

    Yields:
        The samples of the block, patches (s x g x l x n/g·k) and gradients (s x g x l x m/g).  A
        sample that is larger than a block comes in several, one after the other.
    """
    if data.dim() < shape.dims + 2:
        data = data.unsqueeze(0)
        gradient = None if gradient is None else gradient.unsqueeze(0)
    spread, stride = _spread(data, shape)
    reach = [d * (k - 1) for d, k in zip(shape.dilation, shape.kernel_size, strict=True)]
    extents = [
        (size - far - 1) // step + 1
        for size, far, step in zip(spread.shape[2:], reach, stride, strict=True)
    ]
    across = max(1, shape.in_channels * shape.taps * math.prod(extents[1:]))
    lines = max(1, min(extents[0], rows.BLOCK // across))  # of the first dimension
    samples = max(1, rows.BLOCK // (across * extents[0]))
    for first in range(0, len(data), samples):
        those = slice(first, min(first + samples, len(data)))
        for line in range(0, extents[0], lines):
            sizes = [min(lines, extents[0] - line), *extents[1:]]
            starts = [line * stride[0], *(0 for _ in extents[1:])]
            taps = _taps(spread[those], shape, starts, sizes, stride)
            part = None
            if gradient is not None:
                part = gradient[those].narrow(2, line, sizes[0]).flatten(2)
                part = part.reshape(len(part), shape.groups, -1, part.shape[2]).transpose(2, 3)
            yield those, taps, part


def _taps(
    spread: Tensor, shape: ConvShape, starts: list[int], sizes: list[int], stride: tuple[int, ...]
) -> Tensor:
    """Patches (s x g x l x n/g·k) from a padded input."""
    offsets = itertools.product(*(range(size) for size in shape.kernel_size))
    slices = []
    for offset in offsets:
        window: list[slice] = [slice(None), slice(None)]
        for start, at, far, size, step in zip(
            starts, offset, shape.dilation, sizes, stride, strict=True
        ):
            begin = start + at * far
            window.append(slice(begin, begin + step * (size - 1) + 1, step))
        slices.append(spread[tuple(window)].flatten(2))
    taps = torch.stack(slices, 2)  # s x n x k x l
    return taps.reshape(len(taps), shape.groups, -1, taps.shape[3]).transpose(2, 3)


def _spread(data: Tensor, shape: ConvShape) -> tuple[Tensor, tuple[int, ...]]:
    """The padded input whose plain convolution (without padding) it is, and that one's stride."""
    pads: list[int] = []
    if shape.transposed:
        sizes = [(n - 1) * s + 1 for n, s in zip(data.shape[2:], shape.stride, strict=True)]
        spread = data.new_zeros(*data.shape[:2], *sizes)
        every: list[slice] = [slice(None, None, step) for step in (1, 1, *shape.stride)]
        spread[tuple(every)] = data
        for dim in reversed(range(shape.dims)):
            around = shape.dilation[dim] * (shape.kernel_size[dim] - 1) - int(shape.padding[dim])
            pads += [around, around + shape.output_padding[dim]]
        return F.pad(spread, pads), (1,) * shape.dims
    for dim in reversed(range(shape.dims)):
        if isinstance(shape.padding, str):
            total = shape.dilation[dim] * (shape.kernel_size[dim] - 1)
            total = total if shape.padding == "same" else 0
            pads += [total // 2, total - total // 2]
        else:
            pads += [shape.padding[dim]] * 2
    mode = "constant" if shape.padding_mode == "zeros" else shape.padding_mode
    return (F.pad(data, pads, mode=mode) if any(pads) else data), shape.stride


def masked(
    data: Tensor, shape: ConvShape, mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Patches (s x g x l x n/g·k) block by block, and which of them (s·l) count."""
    if mask is None:
        for _, taps, _ in blocks(data, None, shape):
            yield taps, None
        return
    # One channel a group that says whether a position counts goes along as its gradient.
    items = mask if mask.dim() > shape.dims else mask.unsqueeze(0)
    beside = items[:, None].expand(len(items), shape.groups, *items.shape[1:])
    beside = beside if data.dim() >= shape.dims + 2 else beside[0]
    for _, taps, real in blocks(data, beside, shape):
        assert real is not None
        yield taps, real[:, 0, :, 0].reshape(-1)


def weight_gradients(data: Tensor, gradient: Tensor, shape: ConvShape) -> Iterator[Tensor]:
    """As :meth:`fxcompress.operators.shape.Shape.weight_gradients`, of types that are equal."""
    waiting: tuple[slice, Tensor] | None = None
    some = max(1, rows.BLOCK // shape.weights)
    for first in range(0, len(data), some):
        part = slice(first, first + some)
        for those, taps, told in blocks(data[part], gradient[part], shape):
            product = torch.einsum("sglm,sglp->sgmp", told, taps)
            if waiting is not None and waiting[0] == those:
                product = waiting[1] + product  # another part of the same samples
            elif waiting is not None:
                yield waiting[1]
            waiting = (those, product)
        if waiting is not None:
            yield waiting[1]
            waiting = None
