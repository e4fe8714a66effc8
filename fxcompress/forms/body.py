"""What a form puts in the place of its operators, and the dense weights that it stands for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn


@dataclass(frozen=True, eq=False)
class Body:
    """Fx graphs in the place of one operator, or of several.

    Attributes:
        shared: maps the input (..., n) to a tuple of values, once for all heads; None if there is
            nothing to share.
        heads: one per operator; each maps the input and those values to (..., m_i).
        kept: of a narrowed hidden value, the channels that stay (k, int64): the last head reads
            what the others produce.  None for operators that do not read one another.
    """

    shared: fx.GraphModule | None
    heads: tuple[fx.GraphModule, ...]
    kept: Tensor | None = None

    @property
    def parts(self) -> tuple[fx.GraphModule, ...]:
        """Every graph: what is shared, if anything is, then the heads."""
        return self.heads if self.shared is None else (self.shared, *self.heads)

    def member(self, index: int) -> nn.Module:
        """One operator as a module by itself."""
        head = self.heads[index]
        return head if self.shared is None else Member(self.shared, head)


class Member(nn.Module):
    """One operator of a body with a shared part, as a module: ``head(x, *shared(x))``."""

    def __init__(self, shared: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.shared = shared
        self.head = head

    def forward(self, x: Tensor) -> Tensor:
        """(..., n) to (..., m)."""
        out: Tensor = self.head(x, *self.shared(x))
        return out


def dense_weight_of(body: nn.Module, n: int) -> Tensor:
    """The matrix (m x n) of a module that maps rows affinely, found by running it."""
    some = next(body.parameters())
    rows: Tensor = body(torch.eye(n, dtype=some.dtype, device=some.device))
    return (rows - dense_bias_of(body, n)).T


def dense_bias_of(body: nn.Module, n: int) -> Tensor:
    """What a module that maps rows of n affinely to rows of m adds to them (m)."""
    some = next(body.parameters())
    out: Tensor = body(some.new_zeros(1, n))
    return out[0]
