"""``narrow``: a hidden value keeps k of its n channels, and its consumer is refitted to them.

before::

    h = mul(silu(gate(x)), up(x))        # n channels, every one for itself
    y = down(h)                          # m x n

    h = relu(norm(conv(x)))              # the same of convolutions: norm has n entries,
    y = down(depthwise(h))               # depthwise n kernels

after::

    h = mul(silu(gate'(x)), up'(x))      # the k rows of gate and up that are kept
    y = down'(h)                         # m x k, refitted to make up for the others

    h = relu(norm'(conv'(x)))            # k entries
    y = down'(depthwise'(h))             # k kernels

Nothing but smaller layers of the same kind remains: no further products, no gather, and the
operators between stay.  It is an interpolative decomposition of the consumer's weight,
``W ≈ W' E_S``, whose selection of channels ``E_S`` commutes with what treats every channel for
itself and ends up in the producers.  Which channels are kept, and W', come from the metric at the
consumer (:mod:`fxcompress.metric.channels`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.forms.body import Body
from fxcompress.forms.form import Counts, JointForm, assign
from fxcompress.forms.target import Ranks, Target, Truncations
from fxcompress.operators.modules import shape_of
from fxcompress.operators.words import operators_of


class Narrow(JointForm):
    """The form of what makes the channels of a hidden value, and its consumer, which stands last.

    What makes channels are producers, and operators with a kernel for each channel on the way.
    """

    name = "narrow"
    operators = operators_of("convolution") | {"linear"}
    view = "channels"
    hidden = True

    def full_rank(self, shapes: Any) -> int:
        n: int = shapes[-1].in_features
        return n

    def misfit(self, shapes: Any) -> str | None:
        if shapes[-1].in_features == 1:
            return "the hidden value has one channel"
        return None

    def parameters(self, shapes: Any, ranks: Ranks) -> Counts:
        """Weight entries at each width; biases of channels that go are taken off."""
        n = self.full_rank(shapes)
        gone = sum(shape.bias for shape in shapes[:-1]) * (n - ranks)
        found: Counts = ranks * (sum(shape.weights for shape in shapes) // n) - gone
        return found

    def macs(self, shapes: Any, ranks: Ranks) -> Counts:
        found: Counts = ranks * (sum(shape.macs for shape in shapes) // self.full_rank(shapes))
        return found

    def truncations(self, target: Target) -> Truncations:
        """What :meth:`channels` says, asked once."""
        if self.name not in target.chosen:
            target.chosen[self.name] = self.channels(target)
        return target.chosen[self.name]

    def channels(self, target: Target) -> Truncations:
        """The channels that are kept at each width, and the weight that then reads them.

        A form of one's own says here what else it keeps: ``target.channels(order)`` takes channels
        in another order and refits W to them.  It is asked once for every hidden value.

        Args:
            target: the consumer's weight with its metric, and the weights of the producers.
        """
        return target.channels()

    def factors(self, target: Target, rank: int) -> tuple[Tensor, ...]:  # type: ignore[override]
        """The channels that are kept (k), W', and of what makes channels these (k x ...)."""
        kept, refitted = self.truncations(target).factors(rank)
        return kept, refitted, *(weight[kept] for weight in target.producers)

    def products(self, shapes: Any, factors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The consumer with zeros for channels that go; all others could stay as they are."""
        kept, refitted = factors[:2]
        axis, n = shapes[-1].in_axis, shapes[-1].in_features
        dense = refitted.new_zeros(*refitted.shape[:axis], n, *refitted.shape[axis + 1 :])
        dense.index_copy_(axis, kept.to(torch.int64), refitted)
        return (*(None for _ in shapes[:-1]), dense)

    def empty(self, shapes: Any, rank: int) -> Body:
        heads = []
        for small in self.left(shapes, rank):
            root, graph = nn.Module(), fx.Graph()
            root.layer = small.bare()
            graph.output(graph.call_module("layer", (graph.placeholder("input"),)))
            heads.append(fx.GraphModule(root, graph, class_name="Narrowed"))
        return Body(None, tuple(heads), torch.arange(rank, device=shapes[-1].device))

    def fill(self, *arguments: object) -> None:
        raise AssertionError("a hidden value is filled from its factors")

    def fill_from(
        self,
        shapes: Any,
        body: Body,
        factors: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> None:
        kept, refitted, *rows = factors
        kept = kept.to(torch.int64)
        assert body.kept is not None
        body.kept.copy_(kept)
        for head, factor, bias in zip(body.heads, (*rows, refitted), biases, strict=True):
            layer, last = head.get_submodule("layer"), head is body.heads[-1]
            shape = shape_of(layer)
            weight = factor if last else shape.of_outputs(factor)
            assign(layer.get_parameter("weight"), shape.stored(weight))
            if bias is not None:
                assign(layer.get_parameter("bias"), bias if last else bias[kept])

    def bias(self, head: fx.GraphModule) -> Tensor | None:
        found: Tensor | None = head.get_submodule("layer")._parameters["bias"]
        return found


NARROW = Narrow()
