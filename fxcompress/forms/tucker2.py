"""``tucker2``: input and output channels reduced, with a rank each (Kim et al., arXiv 1511.06530).

before::

    y = conv(x; W, b)       # n channels to m, kernel of k taps

after::

    h = down(x)             # n → r_1, 1 x 1
    c = core(h)             # r_1 → r_2, the whole kernel, stride and padding
    y = up(c)               # r_2 → m, 1 x 1, bias b

Weights: ``r_1·n + r_1·r_2·k + r_2·m`` (for g groups, of r_1 and r_2 channels each,
``r_1·n + g·r_1·r_2·k + r_2·m``).

In a Kronecker metric the input subspace is that of ``channel_input``; given it, the output
subspace and the core are the best in the metric (a sequentially truncated HOSVD, Vannieuwenhoven
et al. 2012), and so is the predicted loss.
"""

from __future__ import annotations

from fxcompress.forms.convolution import ConvForm
from fxcompress.forms.form import Counts
from fxcompress.forms.target import Ranks
from fxcompress.operators.convolution import ConvShape


class _Tucker2(ConvForm):
    name = "tucker2"
    view = "tucker2"

    def full_rank(self, shape: ConvShape) -> tuple[int, int]:
        inputs = min(shape.group_in, shape.group_out * shape.taps)
        return inputs, min(shape.group_out, inputs * shape.taps)

    def misfit(self, shape: ConvShape) -> str | None:
        if shape.taps == 1:
            return "tucker2 needs a kernel of more than one tap; take pivoted or channel"
        if shape.group_in == 1 or shape.group_out == 1:
            return "tucker2 needs more than one input and output channel in a group"
        return None

    def layers(self, shape: ConvShape, rank: tuple[int, int]) -> dict[str, ConvShape]:
        inputs, outputs = (shape.groups * each for each in rank)
        none, every = (False,) * shape.dims, (True,) * shape.dims
        down = shape.part(shape.in_channels, inputs, none, inputs=shape.inputs)
        core = shape.part(inputs, outputs, every, inputs=down.outputs)
        up = shape.part(outputs, shape.out_channels, none, shape.bias, core.outputs)
        return {"down": down, "core": core, "up": up}

    def widths(self, ranks: Ranks) -> tuple[Counts, ...]:
        inputs, outputs = ranks[:, 0], ranks[:, 1]
        return inputs, inputs * outputs, outputs


TUCKER2 = _Tucker2()
