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
def verify(body: nn.Module, exact: Tensor, inputs: Tensor, channels: int = -1) -> None:
    """Compare ``body(inputs)`` with what it stands for, computed in float64.

    Two yardsticks.  *Is it right?*  Every output channel may be off by what rounding the
    parameters to the model's type does to it, which is found by rounding them at random: so a
    wrong entry is found in bfloat16 too, and a right body passes in float64 too.  *Is it of use?*
    All outputs together must be accurate enough: a form that amplifies rounding errors is
    not, though nothing is wrong with it.

    Args:
        body: in the model's type.
        exact: outputs of the operator with the weight that the body stands for, float64.
        inputs: that the outputs belong to, in the model's type, or integers.
        channels: the dimension of outputs that counts their channels.

    Raises:
        FormError: the outputs are not finite, wrong, or too inaccurate.
    """
    got = body(inputs)
    dtype = got.dtype
    got = got.double()
    if not bool(got.isfinite().all()):
        raise FormError("the rewritten layer returned values that are not finite")
    error = _rms(got - exact, channels)
    allowed = SLACK * _spread(body, inputs, dtype, channels)
    kind = str(dtype).removeprefix("torch.")
    if bool((error > allowed).any()):
        worst = int((error - allowed).argmax())
        raise FormError(
            f"output {worst} of the rewritten layer is off by {float(error[worst]):.1e}, and "
            f"rounding in {kind} explains {float(allowed[worst]):.1e}"
        )
    scale, overall = float(_rms(exact, channels).norm()), float(error.norm())
    if overall > scale * max(INACCURATE, 32 * torch.finfo(dtype).eps):
        raise FormError(
            f"the rewritten layer is off by {overall / scale:.1e} of its output: this form "
            f"amplifies rounding errors in {kind} too much"
        )


def _spread(body: nn.Module, inputs: Tensor, dtype: torch.dtype, channels: int) -> Tensor:
    """What rounding parameters and result does to each output channel, root mean square (m)."""
    unit = FINEST.get(dtype, torch.finfo(dtype).eps) / 2
    generator = torch.Generator(inputs.device).manual_seed(0)
    rounded = copy.deepcopy(body).double()
    inputs = inputs.double() if inputs.is_floating_point() else inputs
    middle: Tensor = rounded(inputs)
    square: Tensor = _rms(unit * middle, channels).square()
    for _ in range(DRAWS):
        for new, parameter in zip(rounded.parameters(), body.parameters(), strict=True):
            noise = torch.rand(parameter.shape, generator=generator, device=parameter.device)
            new.copy_(parameter.double() * (1 + unit * (2 * noise - 1)))
        square += _rms(rounded(inputs) - middle, channels).square() / DRAWS
    return square.sqrt()


def _rms(values: Tensor, channels: int) -> Tensor:
    """Root mean square of each channel."""
    return values.movedim(channels, -1).flatten(0, -2).square().mean(0).sqrt()
