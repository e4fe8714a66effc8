"""``diagonal``: one Fisher weight per row of W, known as FWSVD (arXiv 2207.00112).

``S = diag(√w) W`` with ``w_i`` the mean over row i of the diagonal of the true Fisher.  FWSVD
takes the *sum*; the decomposition of a site is the same for both, but only with the mean is
``½ Σ w_i Σ_j Δ_ij²`` the predicted KL (exact where the Fisher is constant along rows), so that
sites of different widths can share one budget.
"""

from __future__ import annotations

from fxcompress.metric.kronecker import KroneckerMetric
from fxcompress.metric.moments import Moments
from fxcompress.metric.whiten import Factor


def _factors(moments: Moments) -> tuple[Factor, Factor]:
    return None, moments.weight


DIAGONAL = KroneckerMetric(
    "diagonal", frozenset({"weight"}), "nats per prediction", _factors, damped=(False, True)
)
