"""``pivoted`` for convolutions: r of m output channels computed as they are, the others from them.

before::

    y = conv(x; W, b)                         # n channels to m, kernel of k taps

after::

    h = pivot(x)                              # n → r, the whole kernel: rows of W_r
    rest = combine(h)                         # r → m - r, 1 x 1
    y = cat([h, rest])                        # along the channels; put in order where need be

It is :mod:`fxcompress.forms.pivoted` on the weight as a matrix (m x n·k), with rows for pivots: a
column is one tap of the kernel, and no channel.  It computes exactly what ``channel`` does with
``r·n·k + r(m - r)`` weights, so it saves at every rank below m.  For a 1 x 1 convolution that is
the linear map of every position.  With g groups each has r pivots, and the weights are those of all
of them.  The first r channels are the pivots where they are good enough, which saves a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import MappingProxyType

import torch
from torch import Tensor, fx, nn

from fxcompress.forms.convolution import ConvForm, class_name, convolution
from fxcompress.forms.form import Counts, Form, assign
from fxcompress.forms.ordered import blocks_of, order_output
from fxcompress.forms.pivoted import choose_pivots, complement, good_enough
from fxcompress.forms.separable import CHANNEL
from fxcompress.forms.target import Ranks
from fxcompress.operators.convolution import ConvShape
from fxcompress.operators.modules import canonical_weight, shape_of


class _PivotedConvolution(Form):
    name = "pivoted"
    remarks = MappingProxyType({"cat": "the pivots, then the others"})
    operators = ConvForm.operators

    def full_rank(self, shape: ConvShape) -> int:
        return shape.full_rank

    def misfit(self, shape: ConvShape) -> str | None:
        if shape.group_out == 1:
            return "a group has one output channel, so no other can be combined from it"
        return None

    def parameters(self, shape: ConvShape, ranks: Ranks) -> Counts:
        pivot, _ = self._layers(shape, 1)
        return ranks * pivot.weights + ranks * (shape.group_out - ranks) * shape.groups

    def macs(self, shape: ConvShape, ranks: Ranks) -> Counts:
        pivot, _ = self._layers(shape, 1)
        # One other channel of each group from one pivot; a group of one channel has no others.
        none = (False,) * shape.dims
        each = shape.part(shape.groups, shape.groups, none, shape.bias, pivot.outputs).macs
        return ranks * pivot.macs + ranks * (shape.group_out - ranks) * each

    def places(self, shape: ConvShape) -> int:
        return shape.out_channels

    def put_in_order(self, body: fx.GraphModule, shape: ConvShape, blocks: int) -> None:
        order_output(body, blocks, -shape.dims - 1, shape.device)

    def _layers(self, shape: ConvShape, rank: int) -> tuple[ConvShape, ConvShape]:
        pivots = shape.groups * rank
        every, none = (True,) * shape.dims, (False,) * shape.dims
        pivot = shape.part(shape.in_channels, pivots, every, shape.bias, shape.inputs)
        others = shape.out_channels - pivots
        return pivot, shape.part(pivots, others, none, shape.bias, pivot.outputs)

    def product(self, shape: ConvShape, factors: Sequence[Tensor]) -> Tensor:
        return CHANNEL.product(shape, factors)

    def empty(self, shape: ConvShape, rank: int) -> fx.GraphModule:
        pivot, combine = self._layers(shape, rank)
        channels = -shape.dims - 1
        root, graph = nn.Module(), fx.Graph()
        root.pivot = pivot.bare()
        value = graph.call_module("pivot", (graph.placeholder("input"),))
        if combine.out_channels:  # torch knows no convolution to no channels
            root.combine = combine.bare()
            rest = graph.call_module("combine", (value,))
            value = graph.call_function(torch.cat, ((value, rest), channels))
        graph.output(value)
        return fx.GraphModule(root, graph, class_name=class_name(self.name))

    def fill(self, body: fx.GraphModule, factors: Sequence[Tensor], bias: Tensor | None) -> None:
        left, right = (factor.to(torch.float64).flatten(2) for factor in factors)
        groups, rows, rank = left.shape
        biases = None if bias is None else bias.to(torch.float64).view(groups, rows)
        pivots, kept, mixed, shifts = [], [], [], []
        layer = convolution(body, "pivot")
        for group in range(groups):
            basis, triangle = torch.linalg.qr(left[group])
            weight = left[group] @ right[group]
            chosen, combination = _pivots(weight, basis, groups, layer.weight.dtype)
            others = complement(chosen, rows)
            pivots.append((chosen, others))
            kept.append(basis[chosen] @ (triangle @ right[group]))
            mixed.append(combination)
            if biases is not None:
                own = biases[group]
                # combine() sees pivot channels with their bias: take its image out again.
                shifts.append((own[chosen], own[others] - combination @ own[chosen]))
        pivot = shape_of(layer)
        weight = torch.stack(kept).reshape(groups, rank, -1, *pivot.kernel_size)
        assign(layer.weight, pivot.stored(weight))
        if rank < rows:
            taps = (1,) * len(pivot.kernel_size)
            combined = torch.stack(mixed).reshape(groups * (rows - rank), rank, *taps)
            assign(convolution(body, "combine").weight, combined)
        if layer.bias is not None:
            assign(layer.bias, torch.cat([own for own, _ in shifts]))
            if rank < rows:
                rest = convolution(body, "combine").bias
                assert rest is not None
                assign(rest, torch.cat([shift for _, shift in shifts]))
        order = _order(pivots, rows, rank)
        if not torch.equal(order, torch.arange(len(order), dtype=order.dtype, device=order.device)):
            order_output(body, len(order), -len(pivot.kernel_size) - 1, order.device)
            body.get_buffer("order").copy_(order)

    def weight(self, body: fx.GraphModule, shape: ConvShape) -> Tensor:
        kept = canonical_weight(convolution(body, "pivot"))
        rows = kept.flatten(0, 1)
        if hasattr(body, "combine"):
            weight = convolution(body, "combine").weight
            combination = weight.reshape(shape.groups, -1, kept.shape[1])
            rest = torch.einsum("gor,gr...->go...", combination, kept)
            rows = torch.cat([rows, rest.flatten(0, 1)])
        if blocks_of(body):
            rows = rows.index_select(0, body.get_buffer("order"))
        return rows.reshape(shape.groups, -1, *rows.shape[1:])

    def bias(self, body: fx.GraphModule, shape: ConvShape) -> Tensor | None:
        bias: Tensor | None = convolution(body, "pivot").bias
        if bias is None:
            return None
        if hasattr(body, "combine"):
            combine = convolution(body, "combine")
            assert combine.bias is not None
            combination = combine.weight.reshape(shape.groups, -1, len(bias) // shape.groups)
            image = torch.einsum("gor,gr->go", combination, bias.view(shape.groups, -1))
            bias = torch.cat([bias, combine.bias + image.flatten()])
        return bias.index_select(0, body.get_buffer("order")) if blocks_of(body) else bias


def _pivots(
    weight: Tensor, basis: Tensor, groups: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows of an orthonormal basis (m x r) that span the others: the first ones, or the best.

    Args:
        weight: of the group (m x n·k), float64.
        basis: of its columns.
        groups: of the convolution; where there are several the channels are not in order anyway.
        dtype: of the body.
    """
    combination = good_enough(weight.T, basis, dtype) if groups == 1 else None
    if combination is None:
        return choose_pivots(basis)
    return torch.arange(basis.shape[1], device=basis.device), combination.T


def _order(pivots: Sequence[tuple[Tensor, Tensor]], rows: int, rank: int) -> Tensor:
    """Where each output channel stands among the pivots of all groups and all the others."""
    groups = len(pivots)
    device = pivots[0][0].device
    order = torch.empty(groups, rows, dtype=torch.int32, device=device)
    for group, (chosen, others) in enumerate(pivots):
        places = torch.arange(rank, dtype=torch.int32, device=device)
        order[group, chosen] = group * rank + places
        places = torch.arange(rows - rank, dtype=torch.int32, device=device)
        order[group, others] = groups * rank + group * (rows - rank) + places
    return order.flatten()


PIVOTED_CONVOLUTION = _PivotedConvolution()
