"""What a metric is: the statistics it needs, and the two factors it makes of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from fxcompress.metric.moments import Moments, Statistic

Factor = Tensor | None
"""A positive semi-definite matrix (d x d), a diagonal one (d), or None for the identity."""


@dataclass(frozen=True)
class Metric:
    """A quadratic form on the change of a weight, ``½ tr(G Δ A Δᵀ)``.

    Attributes:
        name: as written in a rule file.
        needs: the statistics to gather; empty if no calibration is needed.
        unit: what the predicted loss of a site is measured in.
        factors: from a site's moments to its input factor A (n x n) and output factor G (m x m).
    """

    name: str
    needs: frozenset[Statistic]
    unit: str
    factors: Callable[[Moments], tuple[Factor, Factor]]
