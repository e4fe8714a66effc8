"""A form of one's own for hidden values: channels are kept in aligned blocks.

Where ``narrow`` keeps any channels, this keeps whole blocks of them, as formats need it that store
numbers in blocks (32 with one scale), and kernels that skip blocks of zeros.  Blocks are taken by
what their channels gain in the metric, all together; the layer that reads them is refitted to the
blocks that are kept.
"""

from __future__ import annotations

import numpy as np
import torch

import fxcompress
from fxcompress.forms import LinearShape, Narrow, Target, Truncations


class Blocks(Narrow):
    def __init__(self, size: int) -> None:
        self.size, self.name = size, f"blocks{size}"

    def misfit(self, shapes: list[LinearShape]) -> str | None:
        channels = shapes[-1].in_features
        odd = f"{channels} channels are not a multiple of {self.size}"
        return odd if channels % self.size else super().misfit(shapes)

    def channels(self, target: Target) -> Truncations:
        best = target.channels()
        gains = torch.zeros_like(best.sigma)
        gains[best.order] = best.sigma.square()
        blocks = gains.reshape(-1, self.size).sum(1).argsort(descending=True, stable=True)
        each = torch.arange(self.size, device=blocks.device)
        return target.channels((blocks[:, None] * self.size + each).flatten())

    def losses(self, target: Target, ranks: np.ndarray) -> np.ndarray:
        return np.where(ranks % self.size, np.inf, super().losses(target, ranks))


fxcompress.register_form(Blocks(16))
