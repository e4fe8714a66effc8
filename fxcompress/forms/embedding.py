"""``embedding``: a table of r columns, and a linear map of its rows.

before::

    y = embedding(i; E)     # V rows of d values

after::

    h = table(i)            # V rows of r values
    y = up(h)               # r → d, no bias

It costs ``r(V + d)`` parameters, and multiplies where the table by itself does not: under a budget
of MACs it never pays.  As a linear map of one-hot vectors its input factor is diagonal: the
frequency of every row in the calibration data, which makes rare words cheap to approximate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

from torch import Tensor, fx, nn

from fxcompress.forms.form import Counts, Form, assign, balanced, bare_linear, linear
from fxcompress.forms.target import Ranks
from fxcompress.operators.embedding import EmbeddingShape


class _Embedding(Form):
    name = "embedding"
    operators = frozenset({"embedding"})

    def misfit(self, shape: EmbeddingShape) -> str | None:
        if shape.max_norm is not None:
            return "max_norm rescales its rows whenever they are read"
        return None

    def parameters(self, shape: EmbeddingShape, ranks: Ranks) -> Counts:
        return ranks * (shape.in_features + shape.out_features)

    def macs(self, shape: EmbeddingShape, ranks: Ranks) -> Counts:
        return ranks * shape.out_features * shape.rows

    def empty(self, shape: EmbeddingShape, rank: int) -> fx.GraphModule:
        root, graph = nn.Module(), fx.Graph()
        root.table = shape.table(rank)
        root.up = bare_linear(rank, shape.out_features, False, shape)
        rows = graph.call_module("table", (graph.placeholder("input"),))
        graph.output(graph.call_module("up", (rows,)))
        return fx.GraphModule(root, graph, class_name="Embedding")

    def fill(self, body: fx.GraphModule, factors: Sequence[Tensor], bias: Tensor | None) -> None:
        left, right = balanced(*factors)
        assign(_table(body).weight, right.T)
        assign(linear(body, "up").weight, left)

    def weight(self, body: fx.GraphModule, shape: EmbeddingShape) -> Tensor:
        return linear(body, "up").weight @ _table(body).weight.T


def _table(body: fx.GraphModule) -> nn.Embedding:
    return cast("nn.Embedding", body.get_submodule("table"))


EMBEDDING = _Embedding()
