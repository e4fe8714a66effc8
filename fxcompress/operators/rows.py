"""Rows of inputs and gradients, and what is summed up of them, for operators of any kind."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

BLOCK = 1 << 24
"""Entries that are made of inputs at a time (64 MiB in float32)."""


def counted(data: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of a value (..., n) that count (positions x n); all of them without a mask."""
    return data.reshape(-1, data.shape[-1]) if mask is None else data[mask]


def wide(gradient: Tensor) -> torch.dtype:
    """The type that products with a gradient are taken in: float32 at least."""
    return torch.promote_types(gradient.dtype, torch.float32)


def squared(parts: Iterable[Tensor], *, entries: bool) -> Tensor:
    """Squares of gradients (samples x g x m x n), summed over samples, float64.

    Args:
        parts: some samples at a time; one part at least.
        entries: for every entry (g x m x n); or means over each row (g x m).
    """
    total: Tensor | None = None
    for part in parts:
        squares = part.to(torch.float64).square()  # of inputs in units of all sizes
        found = squares.sum(0) if entries else squares.mean(3).sum(0)
        total = found if total is None else total + found
    assert total is not None
    return total


def products(rows: Tensor, inputs: Tensor, left: Tensor, right: Tensor | None) -> Tensor:
    """``⟨Σ_l g_l a_lᵀ, left_i right_i⟩`` (s x g x k).

    Args:
        rows: gradients (s x g x l x m).
        inputs: (s x g x l x n); without ``right``, in its coordinates already (s x g x l x k x q).
        left, right: (g x m x k x q) and (g x k x q x n).
    """
    above = torch.einsum("sglm,gmkq->sglkq", rows, left)
    below = inputs if right is None else torch.einsum("sgln,gkqn->sglkq", inputs, right)
    return (above * below).sum((2, 4))
