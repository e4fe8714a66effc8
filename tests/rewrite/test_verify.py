"""``verify`` rejects what is wrong and accepts what is right, in every type."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from fxcompress.forms import FormError, LinearShape, find_form
from fxcompress.rewrite import verify

N, M, RANK = 96, 64, 24
TYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
FORM = pytest.mark.parametrize("form", ["low_rank", "pivoted"])


def built(
    form: str, dtype: torch.dtype, bias: bool = True, n: int = N, m: int = M, rank: int = RANK
) -> tuple[fx.GraphModule, list[Tensor]]:
    """A filled body and the other arguments of ``verify``; outputs are of order one."""
    # The spectrum of a trained layer: it falls over two orders of magnitude.
    decay = torch.logspace(0, -2, rank, dtype=torch.float64)
    left = torch.randn(m, rank, dtype=torch.float64) * decay
    right = torch.randn(rank, n, dtype=torch.float64) / n**0.5
    offset = torch.randn(m, dtype=torch.float64).to(dtype) if bias else None
    body = find_form(form).empty(LinearShape(n, m, bias, dtype), rank)
    find_form(form).fill(body, (left, right), offset)
    return body, [left, right, offset, torch.randn(32, n, dtype=torch.float64).to(dtype)]


def verify_product(
    body: fx.GraphModule, left: Tensor, right: Tensor, bias: Tensor | None, rows: Tensor
) -> None:
    """``verify`` against ``left @ right @ x + bias`` in float64."""
    exact = rows.double() @ right.double().T @ left.double().T
    verify(body, exact if bias is None else exact + bias.double(), rows)


@TYPES
@FORM
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("seed", range(5))
def test_a_right_body_passes(form: str, dtype: torch.dtype, bias: bool, seed: int) -> None:
    torch.manual_seed(seed)
    body, arguments = built(form, dtype, bias)
    verify_product(body, *arguments)


def scale_one_factor(body: fx.GraphModule) -> None:
    first(body).mul_(1.5)


def flip_an_output(body: fx.GraphModule) -> None:
    last(body)[0].neg_()


def drop_a_component(body: fx.GraphModule) -> None:
    last(body)[:, 0] = 0


def shift_the_bias(body: fx.GraphModule) -> None:
    bias = next(p for name, p in body.named_parameters() if name.endswith("bias"))
    bias[0] += 1


def swap_two_outputs(body: fx.GraphModule) -> None:
    matrix = last(body)
    matrix[[0, 1]] = matrix[[1, 0]].clone()


def not_a_number(body: fx.GraphModule) -> None:
    last(body)[0, 0] = float("nan")


def first(body: fx.GraphModule) -> Tensor:
    return next(p for p in body.parameters() if p.dim() == 2)


def last(body: fx.GraphModule) -> Tensor:
    return [p for p in body.parameters() if p.dim() == 2][-1]


@TYPES
@FORM
@pytest.mark.parametrize(
    "corrupt",
    [
        scale_one_factor, flip_an_output, drop_a_component, shift_the_bias, swap_two_outputs,
        not_a_number,
    ],
)  # fmt: skip
def test_a_corrupted_body_is_rejected(
    form: str, dtype: torch.dtype, corrupt: Callable[[fx.GraphModule], None]
) -> None:
    body, arguments = built(form, dtype)
    with torch.no_grad():
        corrupt(body)
    with pytest.raises(FormError, match=r"off by|not finite"):
        verify_product(body, *arguments)


@TYPES
def test_a_wrong_order_of_pivots_is_rejected(dtype: torch.dtype) -> None:
    _, arguments = built("pivoted", dtype)
    left, right, offset, _ = arguments
    right[:, :8] = 0  # pivots are elsewhere
    body = find_form("pivoted").empty(LinearShape(N, M, True, dtype), RANK)
    find_form("pivoted").fill(body, (left, right), offset)
    verify_product(body, *arguments)
    order = body.get_buffer("order")
    order.copy_(order.roll(1))
    with pytest.raises(FormError, match="off by"):
        verify_product(body, *arguments)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-10), (torch.float32, 1e-3)])
def test_small_errors_are_found_in_wide_types(dtype: torch.dtype, error: float) -> None:
    body, arguments = built("low_rank", dtype)
    with torch.no_grad():
        last(body)[3].mul_(1 + error)
    with pytest.raises(FormError, match="output 3 of the rewritten layer is off by"):
        verify_product(body, *arguments)


@TYPES
@FORM
def test_large_layers_with_outliers_pass(form: str, dtype: torch.dtype) -> None:
    """Channels a hundred times larger than the others, as decoders have them."""
    body, arguments = built(form, dtype, n=768, m=512, rank=300)
    arguments[-1][:, 5] *= 100
    verify_product(body, *arguments)


def test_a_form_that_amplifies_rounding_is_given_up() -> None:
    """Nothing is wrong with this body: two large numbers that nearly cancel."""
    body, (left, right, _, rows) = built("low_rank", torch.bfloat16, bias=False)
    left[:, 1], right[1] = -left[:, 0], right[0] * (1 - 2**-7)
    left[:, :2] *= 1e4
    find_form("low_rank").fill(body, (left, right), None)
    with pytest.raises(FormError, match="amplifies rounding"):
        verify_product(body, left, right, None, rows)


def test_a_zero_weight_passes() -> None:
    body, (left, right, offset, rows) = built("low_rank", torch.float32, bias=False)
    with torch.no_grad():
        last(body).zero_()
    verify_product(body, left * 0, right, offset, rows)
