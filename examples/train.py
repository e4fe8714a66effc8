"""A small classifier trained with :class:`fxcompress.ISVT`: ranks fall while it learns.

$ python examples/train.py
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

import fxcompress


def main() -> None:
    """Train, threshold on the way, and train the factors a little more."""
    torch.manual_seed(0)
    x = torch.randn(1024, 32)
    y = (torch.tanh(x @ torch.randn(32, 64)) @ torch.randn(64, 8)).argmax(1)
    model: nn.Module = nn.Sequential(
        nn.Linear(32, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8)
    )
    isvt = fxcompress.ISVT(model, "every-linear", [x[:256]], steps=200, every=2, keep=0.3)

    def train(network: nn.Module, steps: int, with_isvt: bool) -> None:
        optimizer = torch.optim.AdamW(network.parameters(), lr=3e-3)
        for step in range(steps):
            loss = F.cross_entropy(network(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            record = isvt.step() if with_isvt else None
            if record is not None and step % 40 == 39:
                print(
                    f"step {record.step:3}: loss {float(loss.detach()):.3f}, "
                    f"keep {record.keep:.2f}, "
                    f"ranks {record.rank} in {record.cut} layers, λ {record.multiplier:.1e}"
                )

    train(model, 240, with_isvt=True)
    small = isvt.finalize()
    train(small, 60, with_isvt=False)
    with torch.no_grad():
        right = float((small(x).argmax(1) == y).float().mean())
    print(f"accuracy on the training data {100 * right:.1f} %")
    print(fxcompress.diff(model, small))


if __name__ == "__main__":
    main()
