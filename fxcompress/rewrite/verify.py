"""Check a body against the product that it stands for, on inputs the model really met."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from fxcompress.forms import FormError

SLACK = 24.0
"""How many times the spread that rounding its parameters causes an output may be off."""

DRAWS = 8
"""Roundings that the spread is estimated from; with fewer, chance makes it too small."""

FINEST = {torch.float32: 4e-6, torch.float64: 1e-12}
"""Relative errors below this are not looked at.  Half precision is summed up in float32, so
that its rounding is all there is; these types sum up in themselves, which adds to it with the
width, and the decomposition behind a float64 body is not exact either."""

INACCURATE = 1e-4
"""A body may be off by this fraction of its output, or by 32 roundings if that is more."""


@torch.no_grad()
def verify(body: nn.Module, left: Tensor, right: Tensor, bias: Tensor | None, rows: Tensor) -> None:
    """Compare ``body(x)`` with ``left @ right @ x + bias`` computed in float64.

    Two yardsticks.  *Is it right?*  Every output may be off by what rounding the parameters to
    the model's type does to that output, which is found by rounding them at random: so a wrong
    entry is found in bfloat16 too, and a right body passes in float64 too.  *Is it of use?*
    All outputs together must be accurate enough: a form that amplifies rounding errors is
    not, though nothing is wrong with it.

    Args:
        body: takes (rows x n) to (rows x m) in the model's type.
        left: (m x r).
        right: (r x n).
        bias: (m), or None.
        rows: held inputs (rows x n).

    Raises:
        FormError: the outputs are not finite, wrong, or too inaccurate.
    """
    exact = rows.double() @ right.double().T @ left.double().T
    if bias is not None:
        exact = exact + bias.double()
    got = body(rows).double()
    if not bool(got.isfinite().all()):
        raise FormError("the rewritten layer returned values that are not finite")
    error, allowed = _rms(got - exact), SLACK * _spread(body, rows)
    kind = str(rows.dtype).removeprefix("torch.")
    if bool((error > allowed).any()):
        worst = int((error - allowed).argmax())
        raise FormError(
            f"output {worst} of the rewritten layer is off by {float(error[worst]):.1e}, and "
            f"rounding in {kind} explains {float(allowed[worst]):.1e}"
        )
    scale, overall = float(_rms(exact).norm()), float(error.norm())
    if overall > scale * max(INACCURATE, 32 * torch.finfo(rows.dtype).eps):
        raise FormError(
            f"the rewritten layer is off by {overall / scale:.1e} of its output: this form "
            f"amplifies rounding errors in {kind} too much"
        )


def _spread(body: nn.Module, rows: Tensor) -> Tensor:
    """What rounding parameters and result does to each output, root mean square (m)."""
    unit = FINEST.get(rows.dtype, torch.finfo(rows.dtype).eps) / 2
    generator = torch.Generator(rows.device).manual_seed(0)
    rounded, rows = copy.deepcopy(body).double(), rows.double()
    middle: Tensor = rounded(rows)
    square: Tensor = (unit * middle).square().mean(0)
    for _ in range(DRAWS):
        for new, parameter in zip(rounded.parameters(), body.parameters(), strict=True):
            noise = torch.rand(parameter.shape, generator=generator, device=parameter.device)
            new.copy_(parameter.double() * (1 + unit * (2 * noise - 1)))
        square += (rounded(rows) - middle).square().mean(0) / DRAWS
    return square.sqrt()


def _rms(values: Tensor) -> Tensor:
    """Root mean square of each column."""
    return values.square().mean(0).sqrt()
