"""What a metric is: the statistics it needs, and what it makes of them at one site."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fxcompress.metric.moments import Moments, Statistic

Factor = Tensor | None
"""A positive semi-definite matrix (d x d), a diagonal one (d), or None for the identity.

A matrix of low rank may be given by a root (r x d), r < d: it is ``Rᵀ R``.
Of a convolution, one for each group: (g x d x d) or (g x d).
"""


@dataclass(frozen=True)
class Metric:
    """A quadratic form on the change of a weight.

    Attributes:
        name: as written in a rule file.
        needs: the statistics to gather; empty if no calibration is needed.
        unit: what the predicted loss of a site is measured in.
        factors: from a site's moments to its input factor A (n x n) and output factor G (m x m) of
            ``½ tr(G Δ A Δᵀ)``; None if the form weighs every entry by itself
            (``Moments.entries``).
        directions: whether losses are measured anew along the components that were found, in a
            second pass over the data.
    """

    name: str
    needs: frozenset[Statistic]
    unit: str
    factors: Callable[[Moments], tuple[Factor, Factor]] | None
    directions: bool = False

    @property
    def backward(self) -> bool:
        """Whether it needs gradients of the output."""
        return bool(self.needs & {"output", "weight", "entries"})
