"""``joint``: linear operators on one input share the half that reads it.

before::

    q = linear(x; W_q, b_q);  k = linear(x; W_k, b_k);  v = linear(x; W_v, b_v)

after::

    h = down(x)                                       # r x n, no bias, computed once
    q = up_q(h);  k = up_k(h);  v = up_v(h)           # m_i x r, biases b_i

It is the truncation of the stacked weight (Σm x n): r·(n + Σm) parameters.  The output factor
of the stack is taken as block diagonal, one block per operator, as it is for operators by
themselves: so the losses of both alternatives can be compared, and with equal right factors
they are equal.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, fx, nn

from fxcompress.forms.body import Body
from fxcompress.forms.form import (
    Counts,
    JointForm,
    Shapes,
    assign,
    balanced_parts,
    bare_linear,
    linear,
)
from fxcompress.forms.target import Ranks


class _Joint(JointForm):
    name = "joint"

    def parameters(self, shapes: Shapes, ranks: Ranks) -> Counts:
        return ranks * (shapes[0].in_features + sum(shape.out_features for shape in shapes))

    def empty(self, shapes: Shapes, rank: int) -> Body:
        root = nn.Module()
        root.down = bare_linear(shapes[0].in_features, rank, False, shapes[0])
        graph = fx.Graph()
        x = graph.placeholder("input")
        graph.output((graph.call_module("down", (x,)),))
        shared = fx.GraphModule(root, graph, class_name="Shared")
        heads = []
        for shape in shapes:
            root, graph = nn.Module(), fx.Graph()
            root.up = bare_linear(rank, shape.out_features, shape.bias, shape)
            graph.placeholder("input")
            graph.output(graph.call_module("up", (graph.placeholder("shared"),)))
            heads.append(fx.GraphModule(root, graph, class_name="Head"))
        return Body(shared, tuple(heads))

    def fill(
        self,
        body: Body,
        lefts: Sequence[Tensor],
        right: Tensor,
        biases: Sequence[Tensor | None],
    ) -> None:
        parts, right = balanced_parts(lefts, right)
        assert body.shared is not None
        assign(linear(body.shared, "down").weight, right)
        for head, part, bias in zip(body.heads, parts, biases, strict=True):
            assign(linear(head, "up").weight, part)
            if bias is not None:
                assign(linear(head, "up").bias, bias)

    def bias(self, head: fx.GraphModule) -> Tensor | None:
        return linear(head, "up").bias


JOINT = _Joint()
