"""Marks: for every entry of a value, whether it belongs to padding, and to which sample.

========  ==================================================================
0         neutral: comes from no token (weights, position tables, constants)
1         padding: comes from masked positions only
b + 2     real: comes from a real position of sample b
========  ==================================================================

What several entries make together is padding only if all of them are (``amax`` says so); an entry
made of a real one *times* a padded one is padding: a score of a padded query, say.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

PAD = 1
"""The mark of padding; smaller is neutral, larger is real."""


class Unfollowed(Exception):
    """Which rows are padding cannot be said from here on; the text says why."""


def sample_marks(real: Tensor) -> Tensor:
    """Marks of the positions of samples (batch x positions), from a mask that is true where real.

    >>> sample_marks(torch.tensor([[True, False], [True, True]]))
    tensor([[2, 1],
            [3, 3]], dtype=torch.uint8)
    """
    batch = len(real)
    dtype = next(d for d in (torch.uint8, torch.int16, torch.int64) if batch + 2 < _most(d))
    ids = torch.arange(2, batch + 2, device=real.device).to(dtype)[:, None]
    return torch.where(real, ids, torch.full_like(ids, PAD))


def _most(dtype: torch.dtype) -> int:
    return torch.iinfo(dtype).max


def either(a: Tensor, b: Tensor) -> Tensor:
    """Marks of products: padding where one of the factors is."""
    padded = (a == PAD) | (b == PAD)
    return torch.where(padded, torch.full_like(padded, PAD, dtype=a.dtype), torch.maximum(a, b))


def together(a: Tensor, b: Tensor) -> Tensor:
    """Marks of what is computed entry by entry from two values; they broadcast.

    They mostly agree.  Where a padded entry meets a real one, it matters along which dimensions the
    marks change: those of a value that tells more positions apart win (a token and what its
    sample has in common); if each tells others apart (queries and keys), it is a product.

    Raises:
        Unfollowed: both tell the same positions apart, and disagree: neighbours were mixed.
    """
    if a.shape == b.shape and torch.equal(a, b):
        return a
    a, b = torch.broadcast_tensors(a, b)  # type: ignore[no-untyped-call]
    disagree = ((a == PAD) & (b > PAD)) | ((a > PAD) & (b == PAD))
    if not bool(disagree.any()):
        return either(a, b)
    first, second = _varying(a == PAD), _varying(b == PAD)
    if first == second:
        raise Unfollowed("padded positions are mixed with real ones, entry by entry")
    if first > second:
        return torch.where(a == 0, b, a)
    if first < second:
        return torch.where(b == 0, a, b)
    return either(a, b)


def _varying(padded: Tensor) -> frozenset[int]:
    """The dimensions along which something changes."""
    return frozenset(
        dim
        for dim, size in enumerate(padded.shape)
        if size > 1 and bool((padded != padded.narrow(dim, 0, 1)).any())
    )


def product(a: Tensor | None, b: Tensor | None, shape: Sequence[int]) -> Tensor | None:
    """Marks of a matrix product (..., m, k) by (..., k, n): sums of products.

    Args:
        a, b: marks of the factors; None if all of them are neutral.
        shape: of the product.
    """
    if a is None and b is None:
        return None
    if a is None:
        assert b is not None
        return b.amax(-2, keepdim=True).expand(shape)
    if b is None:
        return a.amax(-1, keepdim=True).expand(shape)
    highest = torch.maximum(a.amax(-1, keepdim=True), b.amax(-2, keepdim=True))
    left, right = a != PAD, b != PAD
    if _uniform(left, -1):
        some = left[..., :1] & right.any(-2, keepdim=True)
    elif _uniform(right, -2):
        some = left.any(-1, keepdim=True) & right[..., :1, :]
    else:
        few = right[..., :1] if _uniform(right, -1) else right
        some = left.float() @ few.float() > 0
    found = torch.where(some, highest, torch.full_like(highest, PAD))
    # A sum of neutral entries and padding is neutral where something is neutral.
    return torch.where(some & (found == PAD), torch.zeros_like(found), found).expand(shape)


def _uniform(mask: Tensor, dim: int) -> bool:
    return torch.equal(mask.any(dim), mask.all(dim))


def windows(
    marks: Tensor, sizes: Sequence[int], kernel: Sequence[int], stride: Sequence[int],
    padding: Sequence[int], dilation: Sequence[int],
) -> Tensor:  # fmt: skip
    """Marks of what a convolution returns (items, 1, *sizes), from those of its input.

    A position is real if the sample by itself, without its padding, would have it: with p zeros
    at either end, that is where the window less p entries at either end is real.

    Args:
        marks: of the input (items, 1, *extents).
        sizes: of the output.
        kernel, stride, padding, dilation: one number a dimension.

    Raises:
        Unfollowed: padding is not at the ends, or the convolution adds more than it takes away.
    """
    for dim, size in enumerate(sizes, 2):
        padded = marks == PAD
        if not bool((padded != padded.narrow(dim, 0, 1)).any()):
            marks = marks.narrow(dim, 0, 1).repeat_interleave(size, dim)
            continue
        reach = dilation[dim - 2] * (kernel[dim - 2] - 1)
        trimmed = reach - 2 * padding[dim - 2]
        if trimmed < 0:
            raise Unfollowed("a convolution adds positions to padded sequences")
        _require_ends(marks.movedim(dim, -1))
        # Dilated windows are looked at whole: padding is at the ends.
        each = marks.unfold(dim, trimmed + 1, stride[dim - 2])
        hit = (each == PAD).any(-1)
        each = each.amax(-1)
        marks = torch.where(hit, torch.full_like(each, PAD), each).narrow(dim, 0, size)
    return marks


def _require_ends(marks: Tensor) -> None:
    """Lines (..., positions): padding, then what is real, then padding, and nothing beyond."""
    state = marks.clamp(max=2)
    before, after = state[..., :-1], state[..., 1:]
    beyond = ((before == 0) & (after == PAD)) | ((before == PAD) & (after == 0))
    starts = (state[..., 0] != PAD).int() + ((before == PAD) & (after != PAD)).int().sum(-1)
    if bool(beyond.any()) or bool((starts > 1).any()):
        raise Unfollowed("a convolution runs over padding that is not at the ends of a sequence")
