"""Which rows of what a site is given and returns count, and which are padding."""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.graph.marks import PAD
from fxcompress.graph.padding import Padding
from fxcompress.graph.physical import physical
from fxcompress.metric.visitor import SiteFacts
from fxcompress.operators.shape import channels_of, extents_of


def input_mask(padding: Padding, site: SiteFacts, data: Tensor, out: Tensor) -> Tensor | None:
    """Which rows of a site's input count: of a convolution, those whose outputs do.

    Args:
        padding: of the pass.
        site: that was called.
        data: its input.
        out: what it returned.

    Raises:
        CalibrationError: which rows are padding could not be followed.
    """
    if site.shape.takes == "patches":
        marks = output_marks(padding, site, out)
        return None if marks is None else marks != PAD
    dims = 0 if site.shape.takes == "indices" else 1
    return padding.real(physical(data), f"the input of {site.name}", dims)


def output_marks(padding: Padding, site: SiteFacts, out: Tensor) -> Tensor | None:
    """Marks of a site's output rows (...); of a convolution (items x extents).

    Args:
        padding: of the pass.
        site: that was called.
        out: what it returned.

    Raises:
        CalibrationError: as :func:`input_mask`.
    """
    rows = physical(out, extents_of(site.shape)).movedim(channels_of(site.shape), -1)
    return padding.row_marks(rows, f"the output of {site.name}")


def is_swapped(marks: Tensor, out: Tensor) -> bool:
    """Whether the rows of a sample are a column: (positions, batch, features).

    >>> is_swapped(torch.tensor([[2, 3], [2, 1], [2, 1]]), torch.zeros(3, 2, 8))
    True
    """
    if marks.dim() != 2 or out.dim() != 3:
        return False
    numbers = marks.int()
    real = numbers > PAD
    highest = torch.where(real, numbers, 0)
    lowest = torch.where(real, numbers, int(numbers.max()) + 1)

    def alike(dim: int) -> bool:
        top = highest.amax(dim)
        return bool(((top == lowest.amin(dim)) | (top == 0)).all())

    return not alike(1) and alike(0)
