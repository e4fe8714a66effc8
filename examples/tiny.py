"""A model of a few layers and data for it, to try the command line on.

    fxcompress explain every-linear --model examples/tiny.py:model --data examples/tiny.py:data
    fxcompress compile every-linear --model examples/tiny.py:model --data examples/tiny.py:data \\
        --keep 0.6 --out out/tiny
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class Block(nn.Module):
    """A gated feed-forward block with a residual connection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.gate = nn.Linear(width, hidden)
        self.up = nn.Linear(width, hidden)
        self.down = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., width) to (..., width)."""
        h = self.norm(x)
        return x + self.down(nn.functional.silu(self.gate(h)) * self.up(h))


def model() -> nn.Module:
    """Four blocks and a head, random but repeatable."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(32, 64), *(Block(64, 160) for _ in range(4)), nn.Linear(64, 10))


def data() -> list[Tensor]:
    """Eight batches of 32 rows."""
    torch.manual_seed(1)
    return [torch.randn(32, 32) for _ in range(8)]
