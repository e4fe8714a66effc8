"""Muon in float32: steps whose singular values are all alike.

The momentum of every matrix is replaced by roughly its polar factor ``U Vᵀ``, found by
Newton-Schulz iteration (Jordan et al. 2024, "Muon"), so that a step goes as far in directions of
small gradients as in those of large ones.

``torch.optim.Muon`` does the same in bfloat16, which processors without instructions for it
multiply some twenty times slower than float32 (seen with ``ONEDNN_MAX_CPU_ISA=AVX2``): a step
on SmolLM2 would take minutes there.  Here the iteration runs on the smaller one of the two Gram
matrices, which makes up for float32 where bfloat16 is fast.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic polynomial: the steepest at 0 that stays close to 1 (Jordan et al.)."""

ITERATIONS = 5

MOMENTUM = 0.9


class Muon(torch.optim.Optimizer):
    """Nesterov's momentum, orthogonalized.

    The root mean square of an update is a fifth of the rate, as is that of Adam, roughly
    (Liu et al. 2025, "Muon is scalable for LLM training", section 2.2).

    Args:
        parameters: matrices.
        lr: learning rate.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float = 0.0) -> None:
        super().__init__(parameters, {"lr": lr})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step.

        Args:
            closure: as of ``torch.optim``; not used here.
        """
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                grad = parameter.grad.to(torch.promote_types(parameter.dtype, torch.float32))
                state: dict[str, Any] = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(grad)
                momentum = state["momentum"].lerp_(grad, 1 - MOMENTUM)
                update = orthogonalized(grad.lerp(momentum, MOMENTUM))
                length = 0.2 * max(parameter.shape) ** 0.5 * group["lr"]
                parameter.add_(update.to(parameter.dtype), alpha=-length)


def orthogonalized(matrix: Tensor) -> Tensor:
    """About the polar factor ``U Vᵀ`` of a matrix ``U Σ Vᵀ`` (m x n): singular values near 1.

    With ``X ← a X + b (X Xᵀ) X + c (X Xᵀ)² X`` repeated, the result is a polynomial in
    ``G = X Xᵀ``, times X; it is gathered in the coordinates of the smaller Gram matrix, which costs
    ``34 r³ + 4 r² n`` for r ≤ n instead of ``10 r³ + 20 r² n``.

    Returns:
        Singular values from 0.68 to 1.21 where those of the matrix are above 0.0015 of its
        Frobenius norm, and smaller ones below; 0 for a zero matrix.
    """
    x = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    x = x / x.norm().clamp_min(torch.finfo(x.dtype).tiny)
    gram = x @ x.T
    product = factor = _factor(gram)
    for _ in range(ITERATIONS - 1):
        gram = factor @ gram @ factor
        factor = _factor(gram)
        product = factor @ product
    out: Tensor = product @ x
    return out if matrix.shape[0] <= matrix.shape[1] else out.T


def _factor(gram: Tensor) -> Tensor:
    """``a I + b G + c G²``."""
    a, b, c = COEFFICIENTS
    out: Tensor = torch.addmm(gram, gram, gram, beta=b, alpha=c)
    out.diagonal().add_(a)
    return out
