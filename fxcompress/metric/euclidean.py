"""``euclidean``: the plain singular value decomposition, every weight entry alike."""

from __future__ import annotations

from fxcompress.metric.kronecker import KroneckerMetric
from fxcompress.metric.moments import Moments
from fxcompress.metric.whiten import Factor


def _factors(moments: Moments) -> tuple[Factor, Factor]:
    return None, None


EUCLIDEAN = KroneckerMetric(
    "euclidean",
    frozenset(),
    "half the squared weight error",
    _factors,
    damped=(False, False),
)
