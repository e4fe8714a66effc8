"""``ekfac``: the components of ``kfac``, their losses measured anew (arXiv 1806.03884).

K-FAC finds the components ``σ_i l_i r_iᵀ`` of a weight and predicts ``½ σ_i²`` for leaving one out.
That assumes inputs and output gradients to be independent.  A second pass over the data measures
the true second-order loss of leaving out each component by itself,
``½ E[⟨∇W, σ_i l_i r_iᵀ⟩²]``, and the components are ranked by it.  Only what couples components is
still neglected, as it is in K-FAC.  The metric carries no damping where it was measured.
"""

from __future__ import annotations

from fxcompress.metric.kfac import KFAC
from fxcompress.metric.kronecker import KroneckerMetric

EKFAC = KroneckerMetric("ekfac", KFAC.needs, KFAC.unit, KFAC.factors, directions=True)
