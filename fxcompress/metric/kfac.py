"""``kfac``: the Fisher as a Kronecker product, ``F ≈ A ⊗ G`` (arXiv 1503.05671).

``A = E[a aᵀ]``, ``G = E[g gᵀ]`` with g the gradient at the operator's output of the negative
log-likelihood of labels *sampled from the model*.  The approximation is that inputs and
output gradients are independent, and different positions uncorrelated ("expand", arXiv
2311.00636); where many positions make one prediction the product is scaled to the true trace
(:mod:`fxcompress.metric.pooled`).
"""

from __future__ import annotations

from fxcompress.metric.kronecker import KroneckerMetric
from fxcompress.metric.moments import Moments
from fxcompress.metric.whiten import Factor


def _factors(moments: Moments) -> tuple[Factor, Factor]:
    return moments.input, moments.output


KFAC = KroneckerMetric("kfac", frozenset({"input", "output"}), "nats per prediction", _factors)
