"""``narrow``: a hidden value keeps k of its n channels, and its consumer is refitted to them.

before::

    h = mul(silu(gate(x)), up(x))        # n channels, every one for itself
    y = down(h)                          # m x n

after::

    h = mul(silu(gate'(x)), up'(x))      # the k rows of gate and up that are kept
    y = down'(h)                         # m x k, refitted to make up for the others

Nothing but smaller layers of the same kind remains: no further products, no gather, and the
operators between are not touched.  It is an interpolative decomposition of the consumer's weight,
``W ≈ W' E_S``, whose selection of channels ``E_S`` commutes with entrywise operators and ends up in
the producers.  Which channels are kept, and W', come from the metric at the consumer
(:mod:`fxcompress.metric.channels`).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx, nn

from fxcompress.forms.body import Body
from fxcompress.forms.form import Counts, JointForm, Shapes, assign, bare_linear, linear
from fxcompress.forms.target import Ranks, Target, Truncations


class Narrow(JointForm):
    """The form of the producers of a hidden value and its consumer, which stands last."""

    name = "narrow"
    view = "channels"
    hidden = True

    def full_rank(self, shapes: Shapes) -> int:
        return shapes[-1].in_features

    def misfit(self, shapes: Shapes) -> str | None:
        if shapes[-1].in_features == 1:
            return "the hidden value has one channel"
        return None

    def parameters(self, shapes: Shapes, ranks: Ranks) -> Counts:
        """Weight entries at each width; biases of channels that go are taken off."""
        gone = sum(shape.bias for shape in shapes[:-1]) * (shapes[-1].in_features - ranks)
        return ranks * _entries(shapes) - gone

    def macs(self, shapes: Shapes, ranks: Ranks) -> Counts:
        return ranks * _entries(shapes) * shapes[-1].rows

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
        """The channels that are kept (k), W' (m x k), and these rows of every producer (k x n)."""
        kept, refitted = self.truncations(target).factors(rank)
        return kept, refitted, *(weight[kept] for weight in target.producers)

    def products(self, shapes: Shapes, factors: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The consumer with zeros for channels that go; producers could stay as they are."""
        kept, refitted = factors[:2]
        dense = refitted.new_zeros(len(refitted), shapes[-1].in_features)
        dense[:, kept.to(torch.int64)] = refitted
        return (*(None for _ in shapes[:-1]), dense)

    def empty(self, shapes: Shapes, rank: int) -> Body:
        widths = [(shape.in_features, rank) for shape in shapes[:-1]]
        widths.append((rank, shapes[-1].out_features))
        heads = []
        for (n, m), shape in zip(widths, shapes, strict=True):
            root, graph = nn.Module(), fx.Graph()
            root.linear = bare_linear(n, m, shape.bias, shape)
            graph.output(graph.call_module("linear", (graph.placeholder("input"),)))
            heads.append(fx.GraphModule(root, graph, class_name="Narrowed"))
        return Body(None, tuple(heads), torch.arange(rank, device=shapes[-1].device))

    def fill(self, *arguments: object) -> None:
        raise AssertionError("a hidden value is filled from its factors")

    def fill_from(
        self,
        shapes: Shapes,
        body: Body,
        factors: Sequence[Tensor],
        biases: Sequence[Tensor | None],
    ) -> None:
        kept, refitted, *rows = factors
        kept = kept.to(torch.int64)
        assert body.kept is not None
        body.kept.copy_(kept)
        parts = zip(body.heads, (*rows, refitted), biases, strict=True)
        for head, weight, bias in parts:
            layer = linear(head, "linear")
            assign(layer.weight, weight)
            if bias is not None:
                assign(layer.bias, bias if head is body.heads[-1] else bias[kept])

    def bias(self, head: fx.GraphModule) -> Tensor | None:
        return linear(head, "linear").bias


def _entries(shapes: Shapes) -> int:
    """Weight entries that go with one channel."""
    return sum(shape.in_features for shape in shapes[:-1]) + shapes[-1].out_features


NARROW = Narrow()
