"""What an operator is given and what it is told, in the format of its linear map.

Everything is brought to ``[sample, group, position, feature]``: at each position of each sample a
group maps a row of its input (for a convolution, a patch) to a row of outputs.  A convolution's
patches take k times the memory of its input, so they come in blocks of at most
:data:`BLOCK` entries, never all at once.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.operators.shape import ConvShape, EmbeddingShape, LinearShape, Shape

BLOCK = 1 << 24
"""Entries of patches at a time (64 MiB in float32)."""


def conv_rows(
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
    lines = max(1, min(extents[0], BLOCK // across))  # of the first dimension
    samples = max(1, BLOCK // (across * extents[0]))
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


def input_rows(data: Tensor, shape: Shape, mask: Tensor | None) -> Iterator[Tensor]:
    """Rows that an operator is given, without padding.

    Args:
        data: its input.
        shape: of the operator.
        mask: which rows count: (...) of data (..., n); of an embedding, of its look-ups; of a
            convolution, the positions of its output (items x extents).  None for all.

    Yields:
        (positions x n), or look-ups (positions), or for a convolution (g x positions x n/g·k).
    """
    if isinstance(shape, ConvShape):
        for taps, real in _conv_patches(data, shape, mask):
            rows = taps.transpose(0, 1).flatten(1, 2)
            yield rows if real is None else rows[:, real]
    elif isinstance(shape, EmbeddingShape):
        yield data.reshape(-1) if mask is None else data[mask]
    else:
        yield _real(data, mask)


def output_rows(gradient: Tensor, shape: Shape, mask: Tensor | None) -> Tensor:
    """Rows that an operator is told: (positions x m), for a convolution (g x positions x m/g).

    Args:
        gradient: of its output.
        shape: of the operator.
        mask: which rows count: (...) of (..., m); of a convolution (items x extents).
    """
    if not isinstance(shape, ConvShape):
        return _real(gradient, mask)
    items = gradient.unsqueeze(0) if gradient.dim() < shape.dims + 2 else gradient
    rows = items.reshape(len(items), shape.groups, shape.group_out, -1)
    rows = rows.permute(1, 0, 3, 2).flatten(1, 2)
    return rows if mask is None else rows[:, mask.reshape(-1)]


def _real(data: Tensor, mask: Tensor | None) -> Tensor:
    return data.reshape(-1, data.shape[-1]) if mask is None else data[mask]


def _conv_patches(
    data: Tensor, shape: ConvShape, mask: Tensor | None
) -> Iterator[tuple[Tensor, Tensor | None]]:
    """Patches (s x g x l x n/g·k) block by block, and which of them (s·l) count."""
    if mask is None:
        for _, taps, _ in conv_rows(data, None, shape):
            yield taps, None
        return
    # One channel a group that says whether a position counts goes along as its gradient.
    items = mask if mask.dim() > shape.dims else mask.unsqueeze(0)
    beside = items[:, None].expand(len(items), shape.groups, *items.shape[1:])
    beside = beside if data.dim() >= shape.dims + 2 else beside[0]
    for _, taps, real in conv_rows(data, beside, shape):
        assert real is not None
        yield taps, real[:, 0, :, 0].reshape(-1)


def weight_gradients(data: Tensor, gradient: Tensor, shape: Shape) -> Iterator[Tensor]:
    """Gradient of the weight for every sample, ``Σ_t g_t a_tᵀ``, some samples at a time.

    A matrix (rows x features) is one position a sample.

    Yields:
        (samples x g x m/g x n/g·k), g = 1 for anything but a convolution; in order.
    """
    wide = torch.promote_types(gradient.dtype, torch.float32)
    if isinstance(shape, ConvShape):
        yield from _conv_gradients(data.to(wide), gradient.to(wide), shape)
        return
    g = gradient.to(wide).reshape(len(gradient), -1, gradient.shape[-1])
    if isinstance(shape, EmbeddingShape):
        for indices, rows in zip(data.reshape(len(data), -1), g, strict=True):
            table = rows.new_zeros(shape.in_features, shape.out_features)
            yield table.index_add_(0, indices, rows).T[None, None]
        return
    a = data.to(wide).reshape(len(data), -1, data.shape[-1])
    some = max(1, BLOCK // shape.weights)
    for rows, inputs in zip(torch.split(g, some), torch.split(a, some), strict=True):
        yield (rows.transpose(1, 2) @ inputs).unsqueeze(1)


def _conv_gradients(data: Tensor, gradient: Tensor, shape: ConvShape) -> Iterator[Tensor]:
    waiting: tuple[slice, Tensor] | None = None
    some = max(1, BLOCK // shape.weights)
    for first in range(0, len(data), some):
        part = slice(first, first + some)
        for those, taps, rows in conv_rows(data[part], gradient[part], shape):
            product = torch.einsum("sglm,sglp->sgmp", rows, taps)
            if waiting is not None and waiting[0] == those:
                product = waiting[1] + product  # another part of the same samples
            elif waiting is not None:
                yield waiting[1]
            waiting = (those, product)
        if waiting is not None:
            yield waiting[1]
            waiting = None


def squared_gradients(data: Tensor, gradient: Tensor, shape: Shape, *, entries: bool) -> Tensor:
    """Squares of :func:`weight_gradients`, summed over samples, float64.

    Args:
        data, gradient, shape: as there.
        entries: for every entry (g x m/g x n/g·k); or means over each row (g x m/g).
    """
    if isinstance(shape, LinearShape) and data.dim() <= 2:
        # One position a sample: (g_i a_j)² = g_i² a_j².
        a, g = (each.to(torch.float64).square() for each in (data, gradient))
        a, g = a.reshape(-1, a.shape[-1]), g.reshape(-1, g.shape[-1])
        return (g.T @ a)[None] if entries else (g.T @ a.mean(1))[None]
    total: Tensor | None = None
    for part in weight_gradients(data, gradient, shape):
        squares = part.to(torch.float64).square()  # of inputs in units of all sizes
        found = squares.sum(0) if entries else squares.mean(3).sum(0)
        total = found if total is None else total + found
    assert total is not None
    return total
