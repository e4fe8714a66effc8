"""``activation``: squared error of the operator's output, ``A = E[a aᵀ]``.

Known as SVD-LLM (arXiv 2403.07378) and as data-aware or whitened SVD.  The errors of two
sites are in the units of their own outputs, so they cannot be compared between layers: with
this metric a global budget does worse than uniform ranks.
"""

from __future__ import annotations

from fxcompress.metric.kronecker import KroneckerMetric
from fxcompress.metric.moments import Moments
from fxcompress.metric.whiten import Factor


def _factors(moments: Moments) -> tuple[Factor, Factor]:
    return moments.input, None


ACTIVATION = KroneckerMetric(
    "activation",
    frozenset({"input"}),
    "half the squared output error",
    _factors,
    damped=(True, False),
)
