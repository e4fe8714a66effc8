"""Check a body against the product that it stands for, on inputs the model really met."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxcompress.forms import FormError

SLACK = 32.0
"""A body may be this many times less accurate than a dense layer of the same type."""


@torch.no_grad()
def verify(
    body: fx.GraphModule, left: Tensor, right: Tensor, bias: Tensor | None, rows: Tensor
) -> None:
    """Compare ``body(x)`` with ``left @ right @ x + bias`` computed in float64.

    The yardstick is the error that the dense product makes in the model's own type on the
    same rows, so the check means the same in float64 and in bfloat16.

    Args:
        body: takes (rows x n) to (rows x m) in the model's type.
        left: (m x r).
        right: (r x n).
        bias: (m), or None.
        rows: held inputs (rows x n).

    Raises:
        FormError: the outputs are not finite, or differ by more than rounding explains.
    """
    dense = left.double() @ right.double()
    exact = rows.double() @ dense.T
    narrow = (rows @ dense.to(rows.dtype).T).double()
    if bias is not None:
        exact = exact + bias.double()
        narrow = narrow + bias.double()
    got = body(rows).double()
    if not bool(got.isfinite().all()):
        raise FormError("the rewritten layer returned values that are not finite")
    scale = float(exact.abs().max())
    allowed = float((narrow - exact).abs().max()) + torch.finfo(rows.dtype).eps * scale
    error = float((got - exact).abs().max())
    if error > SLACK * allowed:
        raise FormError(
            f"the rewritten layer is off by {error:.1e} on outputs up to {scale:.1e}; a dense "
            f"layer in {str(rows.dtype).removeprefix('torch.')} is off by {allowed:.1e}"
        )
