"""The gradient in the coordinates of the metric: what the proximal step of ISVT starts from.

    V' = prox( W - α M⁻¹ ∇L(W) ),       M⁻¹ ∇ = G⁻¹ ∇ A⁻¹

is ``S' = S - α L_G⁻¹ ∇ L_A⁻ᵀ`` in whitened coordinates, thresholded there
(:mod:`fxcompress.isvt.threshold`).  With α below 1/L, L the Lipschitz constant of ``M⁻¹ ∇L``, the
objective falls with every step, and fixed points are critical (arXiv 2507.09428, section 4).

α = 1 is *not* safe for the KL divergence, although M is its Hessian in the K-FAC approximation;
and with few tokens the step is mostly sampling noise in the many directions of small
curvature (docs/training.md says more).  Steps are backtracked, so that costs time and not the
model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fxcompress.forms.target import Quadratic
from fxcompress.metric.elementwise import Elementwise
from fxcompress.metric.quadratic import Grouped, Kronecker
from fxcompress.metric.whiten import Whitener


def natural(metric: Quadratic, gradient: Tensor) -> Tensor:
    """``M⁻¹ ∇`` of one weight, damping included, float64; 0 if the metric is.

    Args:
        metric: M at the site.
        gradient: with respect to the weight (canonical layout).
    """
    wide = gradient.to(torch.float64)
    if metric.null:
        return torch.zeros_like(wide)
    if isinstance(metric, Grouped):
        parts = zip(metric.groups, wide, strict=True)
        return torch.stack([natural(group, part) for group, part in parts])
    if isinstance(metric, Elementwise):
        floor = 1e-6 * float(metric.entries.mean())
        return wide / metric.unit / metric.unit / metric.entries.clamp_min(floor)
    assert isinstance(metric, Kronecker)
    assert isinstance(metric.outputs, Whitener)
    flat = wide.flatten(1)
    return metric.inputs.solve(metric.outputs.solve(flat).T).T.reshape(wide.shape)
