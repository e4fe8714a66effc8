"""A form of one's own: Monarch matrices, b x b blocks of rank r (Dao et al., arXiv 2204.00595).

In the place of y = linear(x; W, b)::

    h = right(x)      # b blocks of n/b inputs, each to b·r values
    y = left(h) + b   # the values regrouped: b blocks of b·r, each to m/b outputs

It costs b·r·(m + n) parameters.  Every block of W is truncated by itself, in the Euclidean metric;
what that loses in the metric of the rule file is asked from the target.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress.forms import Form, LinearShape, Target


class Layer(nn.Module):
    def __init__(self, shape: LinearShape, b: int, r: int) -> None:
        super().__init__()
        like = {"dtype": shape.dtype, "device": shape.device}
        self.b, self.r = b, r
        self.right = nn.Parameter(torch.empty(b, b * r, shape.in_features // b, **like))
        self.left = nn.Parameter(torch.empty(b, shape.out_features // b, b * r, **like))
        self.bias = nn.Parameter(torch.empty(shape.out_features, **like)) if shape.bias else None

    def forward(self, x: Tensor) -> Tensor:
        h = torch.einsum("...jc,jkc->...jk", x.unflatten(-1, (self.b, -1)), self.right)
        h = h.unflatten(-1, (self.b, self.r)).transpose(-3, -2).flatten(-2)
        y = torch.einsum("...ik,iak->...ia", h, self.left).flatten(-2)
        return y if self.bias is None else y + self.bias


class Monarch(Form):
    def __init__(self, blocks: int) -> None:
        self.blocks, self.name = blocks, f"monarch{blocks}"

    def misfit(self, shape: LinearShape) -> str | None:
        odd = [d for d in (shape.in_features, shape.out_features) if d % self.blocks]
        return f"{odd[0]} features are not a multiple of {self.blocks} blocks" if odd else None

    def full_rank(self, shape: LinearShape) -> int:
        return shape.full_rank // self.blocks

    def parameters(self, shape: LinearShape, ranks: np.ndarray) -> np.ndarray:
        return self.blocks * ranks * (shape.in_features + shape.out_features)

    def losses(self, target: Target, ranks: np.ndarray) -> np.ndarray:
        products = (torch.matmul(*self.factors(target, int(rank))) for rank in ranks)
        return np.array([target.loss(product) for product in products], dtype=np.float64)

    def factors(self, target: Target, rank: int) -> tuple[Tensor, Tensor]:
        b, (m, n) = self.blocks, target.weight.shape
        grid = target.weight.double().reshape(b, m // b, b, n // b).transpose(1, 2)
        u, s, v = torch.linalg.svd(grid, full_matrices=False)
        left, right = u.new_zeros(b, m // b, b, b, rank), u.new_zeros(b, b, rank, b, n // b)
        each = torch.arange(b)  # block (i, j) is row block i of left and column block j of right
        left[each, :, each] = (u * s[..., None, :])[..., :rank].transpose(1, 2)
        right[:, each, :, each] = v[..., :rank, :].transpose(0, 1)
        return left.reshape(m, -1), right.reshape(-1, n)

    def empty(self, shape: LinearShape, rank: int) -> fx.GraphModule:
        return fx.symbolic_trace(Layer(shape, self.blocks, rank))

    @torch.no_grad()
    def fill(self, body: fx.GraphModule, factors: list[Tensor], bias: Tensor | None) -> None:
        (left, right), b, each = factors, self.blocks, torch.arange(self.blocks)
        r, n = len(right) // b**2, right.shape[1]
        left, right = left.view(b, -1, b, b, r), right.view(b, b, r, b, n // b)
        body.left.copy_(left[each, :, each].flatten(-2))
        body.right.copy_(right[:, each, :, each].flatten(1, 2))
        if bias is not None:
            body.bias.copy_(bias)


fxcompress.register_form(Monarch(4))
