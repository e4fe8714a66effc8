"""Two convolutions in the place of one: ``channel``, ``channel_input`` and ``spatial``.

before::

    y = conv(x; W, b)       # n channels to m, kernel k_1 x ... x k_d

after::

    h = down(x)             # n → r, some of the kernel's dimensions, no bias
    y = up(h)               # r → m, the others, bias b

=================  =======================  =====================  =========================
form               down                     up                     weights
=================  =======================  =====================  =========================
``channel``        n → r, the whole kernel  r → m, 1 x 1           r(n·k + m)
``channel_input``  n → r, 1 x 1             r → m, whole kernel    r(n + m·k)
``spatial``        n → r, k_1 x 1           r → m, 1 x k_2         r(n·k_1 + m·k_2)
=================  =======================  =====================  =========================

with k the product of the kernel's sizes and k_2 that of all but the first.  Groups stay groups,
each of rank r: the weights are those of all groups together.

In a Kronecker metric ``channel`` is the exact truncation of ``W`` (m x n·k).  The other two
split the patches between both sides, and the second moments A of patches do not factorize:
which subspace of the inputs is kept is found with ``A ≈ A_columns ⊗ A_rows`` (partial traces);
the layer above is then the best one for that subspace in A itself, and the predicted loss is that
of the pair in A, no approximation (:mod:`fxcompress.metric.split`).
"""

from __future__ import annotations

from fxcompress.forms.convolution import ConvForm
from fxcompress.forms.form import Counts
from fxcompress.forms.target import Ranks, View, row_dims
from fxcompress.operators.convolution import ConvShape
from fxcompress.operators.words import TRANSPOSED, operators_of


class _Separable(ConvForm):
    def __init__(self, name: str, view: View) -> None:
        self.name = name
        self.view = view

    def full_rank(self, shape: ConvShape) -> int:
        rows, columns = shape.group_out, shape.group_in
        for size, above in zip(shape.kernel_size, row_dims(self.view, shape.dims), strict=True):
            rows, columns = (rows * size, columns) if above else (rows, columns * size)
        return min(rows, columns)

    def misfit(self, shape: ConvShape) -> str | None:
        if self.name == "spatial" and shape.dims == 1:
            return "spatial needs two kernel dimensions, and this kernel has one"
        if self.name == "spatial" and min(shape.kernel_size[0], _rest(shape)) == 1:
            return "spatial needs a kernel of more than one row and column"
        if self.name != "spatial" and shape.groups > 1 and shape.group_in == 1:
            return f"it is depthwise: one input channel a group, where {self.name} saves nothing"
        return None

    def layers(self, shape: ConvShape, rank: int) -> dict[str, ConvShape]:
        above = row_dims(self.view, shape.dims)
        below = tuple(not owned for owned in above)
        between = shape.groups * rank
        down = shape.part(shape.in_channels, between, below, inputs=shape.inputs)
        up = shape.part(between, shape.out_channels, above, shape.bias, down.outputs)
        return {"down": down, "up": up}

    def widths(self, ranks: Ranks) -> tuple[Counts, ...]:
        return ranks, ranks


class _Pointwise(_Separable):
    """``low_rank`` for a convolution that is a linear map of every position."""

    operators = operators_of("convolution") - TRANSPOSED

    def misfit(self, shape: ConvShape) -> str | None:
        if shape.taps > 1:
            return "low_rank is for linear maps and 1×1 convolutions; take channel"
        return super().misfit(shape)


def _rest(shape: ConvShape) -> int:
    return shape.taps // shape.kernel_size[0]


CHANNEL = _Separable("channel", "matrix")
CHANNEL_INPUT = _Separable("channel_input", "input")
SPATIAL = _Separable("spatial", "spatial")
POINTWISE = _Pointwise("low_rank", "matrix")
