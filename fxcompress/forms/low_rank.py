"""``low_rank``: n → r → m, two linear layers, r(m + n) parameters.

before::

    y = linear(x; W, b)

after::

    h = down(x)          # r x n, no bias
    y = up(h)            # m x r, bias b
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from fxcompress.forms.form import (
    Counts,
    Form,
    assign,
    balanced,
    bare_linear,
    linear,
)
from fxcompress.forms.target import Ranks
from fxcompress.operators.linear import LinearShape


class _LowRank(Form):
    name = "low_rank"

    def parameters(self, shape: LinearShape, ranks: Ranks) -> Counts:
        return ranks * (shape.out_features + shape.in_features)

    def empty(self, shape: LinearShape, rank: int) -> fx.GraphModule:
        root = nn.Module()
        root.down = bare_linear(shape.in_features, rank, False, shape)
        root.up = bare_linear(rank, shape.out_features, shape.bias, shape)
        graph = fx.Graph()
        x = graph.placeholder("input")
        graph.output(graph.call_module("up", (graph.call_module("down", (x,)),)))
        return fx.GraphModule(root, graph, class_name="LowRank")

    def fill(self, body: fx.GraphModule, factors: Sequence[Tensor], bias: Tensor | None) -> None:
        left, right = balanced(*factors)
        assign(linear(body, "up").weight, left)
        assign(linear(body, "down").weight, right)
        if bias is not None:
            assign(linear(body, "up").bias, bias)

    def weight(self, body: fx.GraphModule, shape: LinearShape) -> Tensor:
        return linear(body, "up").weight @ linear(body, "down").weight

    def bias(self, body: fx.GraphModule, shape: LinearShape) -> Tensor | None:
        return linear(body, "up").bias


LOW_RANK = _LowRank()
