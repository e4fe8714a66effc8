"""``euclidean``: the plain singular value decomposition, every weight entry alike."""

from __future__ import annotations

from fxcompress.metric.metric import Factor, Metric
from fxcompress.metric.moments import Moments


def _factors(moments: Moments) -> tuple[Factor, Factor]:
    return None, None


EUCLIDEAN = Metric("euclidean", frozenset(), "half the squared weight error", _factors)
