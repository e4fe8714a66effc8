"""Statistics of the inputs and output gradients of an operator.

Layout: an operator maps rows ``a`` (n) to rows ``W a`` (m); a *position* is one such row.  The rows
of a convolution are patches of its input, in each group (n/g·k to m/g), and everything has a
leading dimension of g groups; those of an embedding are one-hot vectors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

from torch import Tensor

Named = Literal["input", "output", "weight", "entries"]
"""Statistics of :class:`Moments`."""


@dataclass(frozen=True, eq=False)
class Moments:
    """Statistics of one site; those that the metric did not ask for are None.

    Attributes:
        input: A = mean over positions of ``a aᵀ`` (n x n), float64; for an embedding its diagonal
            (V), how often each row is looked up.  Of few rows (:class:`RowSum`) a root R (r x n),
            ``A = Rᵀ R``; so is G.
        output: G = sum over positions of ``g gᵀ`` per *prediction* (m x m), or its diagonal (m)
            if m >= :data:`LARGEST_OUTPUT`; float64.  With the sum over positions divided by the
            number of predictions, ``A ⊗ G`` is the K-FAC Fisher per prediction, also where
            a prediction is made from many positions (an image classifier).
        weight: mean over each row of W of the diagonal of the Fisher per prediction (m), float64.
        entries: the diagonal of the Fisher per prediction (m x n), float64.
        units: of ``input``, of ``output`` and of the other two, which are given in units of its
            square.  Powers of two, 1 unless squares would come near the ends of float64.
        own: other statistics by name (:class:`fxcompress.metric.statistic.Statistic`), float64.
    """

    input: Tensor | None = None
    output: Tensor | None = None
    weight: Tensor | None = None
    entries: Tensor | None = None
    units: tuple[float, float, float] = (1.0, 1.0, 1.0)
    own: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """All statistics that there are."""
        named = (self.input, self.output, self.weight, self.entries)
        return (*(each for each in named if each is not None), *self.own.values())

    def changed(self, change: Callable[[Tensor], Tensor]) -> Moments:
        """The moments with every tensor changed."""

        def changed(one: Tensor | None) -> Tensor | None:
            return None if one is None else change(one)

        return replace(
            self,
            input=changed(self.input),
            output=changed(self.output),
            weight=changed(self.weight),
            entries=changed(self.entries),
            own={name: change(each) for name, each in self.own.items()},
        )

    def group(self, index: int) -> Moments:
        """The moments of one group of a convolution."""
        return self.changed(lambda each: each[index])


def is_root(moment: Tensor) -> bool:
    """Whether a tensor is a root of few rows (r x d), r < d, of a second moment."""
    return moment.dim() == 2 and len(moment) < moment.shape[1]
