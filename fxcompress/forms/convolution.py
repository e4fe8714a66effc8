"""What the forms of convolutions have in common: chains of convolutions.

before::

    y = conv(x; W, b)                   # W in canonical layout: g x m/g x n/g x kernel

after::

    h = first(x)                        # every kernel dimension is owned by one layer
    y = last(...(h))                    # bias b

A factor of the weight is the canonical weight of a layer, kernel dimensions flattened.  Padding,
stride and dilation of a dimension go with its kernel.  A padding mode other than zeros pads
every dimension by itself, so that it goes along, too.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from functools import reduce
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from fxcompress.forms.form import Counts, Form, assign
from fxcompress.forms.target import Ranks
from fxcompress.operators.convolution import ConvShape
from fxcompress.operators.modules import canonical_weight, shape_of
from fxcompress.operators.words import operators_of


class ConvForm(Form):
    """A form whose body is a chain of convolutions, of which the last one has the bias."""

    operators = operators_of("convolution")

    @abstractmethod
    def layers(self, shape: ConvShape, rank: Any) -> dict[str, ConvShape]:
        """The chain, first layer first, by the names of its layers."""

    @abstractmethod
    def widths(self, ranks: Ranks) -> tuple[Counts, ...]:
        """By how much every layer is larger at these ranks than at rank 1."""

    def parameters(self, shape: ConvShape, ranks: Ranks) -> Counts:
        return self._counts(shape, ranks, "weights")

    def macs(self, shape: ConvShape, ranks: Ranks) -> Counts:
        return self._counts(shape, ranks, "macs")

    def _counts(self, shape: ConvShape, ranks: Ranks, what: str) -> Counts:
        total = np.zeros(len(ranks), dtype=np.int64)
        for width, layer in zip(self.widths(ranks), self._least(shape), strict=True):
            total += width * getattr(layer, what)
        return total

    def _least(self, shape: ConvShape) -> list[ConvShape]:
        one = (1, 1) if isinstance(self.full_rank(shape), tuple) else 1
        return [*self.layers(shape, one).values()]

    def product(self, shape: ConvShape, factors: Sequence[Tensor]) -> Tensor:
        sizes = [layer.kernel_size for layer in reversed(self._least(shape))]
        return composed([_kernel(f, size) for f, size in zip(factors, sizes, strict=True)])

    def empty(self, shape: ConvShape, rank: Any) -> fx.GraphModule:
        root, graph = nn.Module(), fx.Graph()
        value = graph.placeholder("input")
        for name, layer in self.layers(shape, rank).items():
            root.add_module(name, layer.bare())
            value = graph.call_module(name, (value,))
        graph.output(value)
        return fx.GraphModule(root, graph, class_name=class_name(self.name))

    def fill(self, body: fx.GraphModule, factors: Sequence[Tensor], bias: Tensor | None) -> None:
        layers = _layers(body)
        shapes = [shape_of(layer) for layer in layers]
        kernels = [_kernel(f, shape.kernel_size) for f, shape in zip(factors, shapes, strict=True)]
        for layer, shape, kernel in zip(layers, shapes, balanced_chain(kernels), strict=True):
            assign(layer.weight, shape.stored(kernel))
        if layers[0].bias is not None and bias is not None:
            assign(layers[0].bias, bias)

    def weight(self, body: fx.GraphModule, shape: ConvShape) -> Tensor:
        layers = _layers(body)
        return composed([canonical_weight(layer) for layer in layers])

    def bias(self, body: fx.GraphModule, shape: ConvShape) -> Tensor | None:
        bias: Tensor | None = _layers(body)[0].bias
        return bias


def _layers(body: fx.GraphModule) -> list[Any]:
    """The convolutions of a chain, the last one first."""
    return [*body.children()][::-1]


def convolution(body: fx.GraphModule, name: str) -> Any:
    """A convolution of a body."""
    return body.get_submodule(name)


def composed(kernels: Sequence[Tensor]) -> Tensor:
    """Canonical weight of convolutions one after the other, the last one first.

    In every kernel dimension all but one of them have size 1.
    """
    return reduce(_compose, kernels)


def _compose(second: Tensor, first: Tensor) -> Tensor:
    """(g x m x r x k) after (g x r x n x k'): (g x m x n x k·k')."""
    product = torch.einsum("gmrq,grnp->gmnqp", second.flatten(3), first.flatten(3))
    sizes = (second.shape[3:], first.shape[3:])
    dims = len(sizes[0])
    product = product.reshape(*product.shape[:3], *sizes[0], *sizes[1])
    order = [3 + side * dims + dim for dim in range(dims) for side in (0, 1)]
    product = product.permute(0, 1, 2, *order)
    return product.reshape(*product.shape[:3], *(a * b for a, b in zip(*sizes, strict=True)))


def _kernel(factor: Tensor, size: Sequence[int]) -> Tensor:
    """A factor as the canonical weight of a layer with a kernel of this size."""
    return factor.reshape(*factor.shape[:2], -1, *size)


def balanced_chain(kernels: Sequence[Tensor]) -> list[Tensor]:
    """A chain of kernels (last layer first), with equal norms on both sides of inner values."""
    out = list(kernels)
    for at in range(1, len(out)):
        above = out[at - 1].transpose(1, 2).flatten(2).norm(dim=2)
        below = out[at].flatten(2).norm(dim=2)
        scale = (below / above).sqrt()
        scale = scale.where(scale.isfinite() & (scale > 0), scale.new_ones(()))
        groups, rank = scale.shape
        taps = (1,) * (out[at].dim() - 3)
        out[at - 1] = out[at - 1] * scale.reshape(groups, 1, rank, *taps)
        out[at] = out[at] / scale.reshape(groups, rank, 1, *taps)
    return out


def class_name(form: str) -> str:
    """``ChannelInput`` for ``channel_input``."""
    return "".join(word.capitalize() for word in form.split("_"))
