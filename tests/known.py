"""Padding that is known beforehand, for what is asked about rows of values."""

from __future__ import annotations

from torch import Tensor

from fxcompress.graph.marks import sample_marks
from fxcompress.graph.padding import Padding


class Known(Padding):
    """Rows (batch, positions, ...) are padding where a mask (batch, positions) is false."""

    def __init__(self, mask: Tensor) -> None:
        super().__init__()
        self.mask = mask

    def row_marks(self, rows: Tensor, where: str, dims: int = 1) -> Tensor | None:
        shape = rows.shape[: rows.dim() - dims]
        if shape[:2] != self.mask.shape:
            return None
        marks = sample_marks(self.mask)
        return marks.reshape(*marks.shape, *(1,) * (len(shape) - 2)).expand(shape)
