"""Every form on every shape: the product, the dense view, the exact counts."""

from __future__ import annotations

import copy
import pickle
from itertools import product

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.forms import FormError, LinearShape, find_form, fit, register_form
from fxcompress.forms.form import Form
from fxcompress.forms.ordered import blocks_of, order_of
from fxcompress.forms.pivoted import (
    LARGEST_ENTRY,
    amplification,
    choose_blocks,
    choose_pivots,
)

SHAPES = [(6, 9), (9, 6), (7, 7), (1, 5), (5, 1), (40, 24)]
FORMS = {name: find_form(name) for name in ("low_rank", "pivoted")}
CASES = [
    (form, m, n, rank, bias)
    for form, (m, n), bias in product(FORMS, SHAPES, (True, False))
    for rank in sorted({1, min(m, n) // 2, min(m, n)} - {0})
]


def factors(m: int, n: int, rank: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(m * 100 + n * 10 + rank)
    left = torch.randn(m, rank, generator=generator, dtype=torch.float64)
    right = torch.randn(rank, n, generator=generator, dtype=torch.float64)
    bias = torch.randn(m, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 2, n, generator=generator, dtype=torch.float64)
    return left.to(dtype), right.to(dtype), bias.to(dtype), x.to(dtype)


@pytest.mark.parametrize(("name", "m", "n", "rank", "bias"), CASES)
def test_body_is_the_product(name: str, m: int, n: int, rank: int, bias: bool) -> None:
    form = FORMS[name]
    left, right, b, x = factors(m, n, rank)
    shape = LinearShape(n, m, bias, torch.float64)
    body = form.empty(shape, rank)
    form.fill(body, (left, right), b if bias else None)
    dense = left @ right
    expected = x @ dense.T + (b if bias else 0)
    bound = {"rtol": 0, "atol": 1e-11}  # float64 rounding, times entries of C of at most 8
    torch.testing.assert_close(body(x), expected, **bound)
    torch.testing.assert_close(form.weight(body, shape), dense, **bound)
    if bias:
        torch.testing.assert_close(form.bias(body, shape), b, **bound)
    else:
        assert form.bias(body, shape) is None


@pytest.mark.parametrize(("name", "m", "n", "rank", "bias"), CASES)
def test_counts_are_exact(name: str, m: int, n: int, rank: int, bias: bool) -> None:
    form = FORMS[name]
    shape = LinearShape(n, m, bias, torch.bfloat16)
    body = form.empty(shape, rank)
    ranks = np.array([rank])
    biases = m if bias else 0
    assert sum(p.numel() for p in body.parameters()) == form.parameters(shape, ranks)[0] + biases
    assert _stored(body) == fit(form, [shape], order=0).bytes(ranks)[0] + 2 * biases
    left, right, b, _ = factors(m, n, rank)
    form.fill(body, (left, right), b if bias else None)
    order = blocks_of(body)
    assert _stored(body) == fit(form, [shape], order=order).bytes(ranks)[0] + 2 * biases
    assert _stored(body) <= form.bytes(shape, ranks)[0] + 2 * biases
    twin = fit(form, [shape], order=order).empty(rank).heads[0]
    twin.load_state_dict(body.state_dict(), strict=True)
    assert _stored(twin) == _stored(body)
    with FlopCounterMode(display=False) as flops, torch.no_grad():
        body.to(torch.float32)(torch.randn(5, n))
    assert flops.get_total_flops() == 2 * 5 * form.macs(shape, ranks)[0]


def _stored(body: nn.Module) -> int:
    """Bytes of everything that a state dict holds."""
    tensors = [*body.parameters(), *body.buffers()]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_pivoted_saves_at_every_rank_below_full() -> None:
    shape = LinearShape(12, 20, False)
    ranks = np.arange(1, 12)
    assert (FORMS["pivoted"].parameters(shape, ranks) < 12 * 20).all()
    assert FORMS["pivoted"].parameters(shape, np.array([12]))[0] == 12 * 20
    assert FORMS["low_rank"].parameters(shape, np.array([8]))[0] > 12 * 20


@pytest.mark.parametrize("name", FORMS)
def test_factors_train_and_travel(name: str) -> None:
    form = FORMS[name]
    left, right, b, x = factors(8, 6, 3)
    shape = LinearShape(6, 8, True, torch.float64)
    body = form.empty(shape, 3)
    form.fill(body, (left, right), b)
    body(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in body.parameters())
    (gradient,) = torch.autograd.grad(form.weight(body, shape).sum(), [next(body.parameters())])
    assert gradient.abs().sum() > 0
    for twin in (copy.deepcopy(body), pickle.loads(pickle.dumps(body))):
        assert torch.equal(twin(x), body(x))
    fresh = form.empty(LinearShape(6, 8, True, torch.float64), 3)
    fresh.load_state_dict(body.state_dict(), strict=True)
    assert torch.equal(fresh(x), body(x))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FORMS)
def test_narrow_types(name: str, dtype: torch.dtype) -> None:
    """No worse than a dense layer of the type, up to the growth that pivoting allows."""
    form = FORMS[name]
    left, right, b, x = factors(40, 24, 12, torch.float32)
    body = form.empty(LinearShape(24, 40, True, dtype), 12)
    form.fill(body, (left, right), b)
    assert {p.dtype for p in body.parameters()} == {dtype}
    exact = x.double() @ (left.double() @ right.double()).T + b.double()
    error = (body(x.to(dtype)).double() - exact).abs().max()
    dense = x.to(dtype) @ (left @ right).to(dtype).T + b.to(dtype)
    assert error < 4 * LARGEST_ENTRY * (dense.double() - exact).abs().max()


def test_low_rank_is_balanced() -> None:
    left, right, _, _ = factors(8, 6, 3)
    left = left * torch.tensor([1e4, 1.0, 1e-4])
    body = FORMS["low_rank"].empty(LinearShape(6, 8, False, torch.float64), 3)
    FORMS["low_rank"].fill(body, (left, right), None)
    up, down = body.up.weight.norm(dim=0), body.down.weight.norm(dim=1)
    torch.testing.assert_close(up, down)


def test_low_rank_of_a_dead_component_stays_finite() -> None:
    left, right, _, x = factors(8, 6, 3)
    left[:, 1] = 0
    right[2] = 0
    body = FORMS["low_rank"].empty(LinearShape(6, 8, False, torch.float64), 3)
    FORMS["low_rank"].fill(body, (left, right), None)
    torch.testing.assert_close(body(x), x @ (left @ right).T)


def test_names_are_unique() -> None:
    with pytest.raises(ValueError, match="already registered"):
        register_form(FORMS["low_rank"])


# ---- pivoting on matrices that are known to be nasty ----------------------------------


def hilbert(m: int, r: int) -> Tensor:
    return 1.0 / (torch.arange(m)[:, None] + torch.arange(r)[None] + 1.0).double()


def kahan(m: int, r: int) -> Tensor:
    """Where column-pivoted QR misjudges the smallest singular value."""
    s, c = np.sin(1.2), np.cos(1.2)
    upper = torch.full((r, r), -c, dtype=torch.float64).triu(1) + torch.eye(r).double()
    square = torch.diag(s ** torch.arange(r, dtype=torch.float64)) @ upper
    return torch.cat([square.T, 1e-3 * torch.randn(m - r, r, dtype=torch.float64)])


def wilkinson(m: int, r: int) -> Tensor:
    """Where LU with partial pivoting grows like 2^(r - 1)."""
    square = torch.eye(r).double() - torch.ones(r, r).double().tril(-1)
    square[:, -1] = 1
    return torch.cat([square, -torch.ones(m - r, r).double().tril()])


def repeated(m: int, r: int) -> Tensor:
    """Equal rows, up to noise of 1e-13: most choices of pivots are singular."""
    rows = torch.randn(r, r, dtype=torch.float64)
    return rows[torch.arange(m) % r] + 1e-13 * torch.randn(m, r, dtype=torch.float64)


def graded(m: int, r: int) -> Tensor:
    return torch.randn(m, r, dtype=torch.float64) * 10.0 ** -torch.arange(r).double()


def sparse(m: int, r: int) -> Tensor:
    """Rows of zeros, and a basis that hides in the last ones."""
    out = torch.zeros(m, r, dtype=torch.float64)
    out[-r:] = torch.eye(r).double()
    return out


def deficient(m: int, r: int) -> Tensor:
    """Rank r - 2: what a weight of lower rank than planned gives."""
    return torch.randn(m, r - 2).double() @ torch.randn(r - 2, r).double()


NASTY = [hilbert, kahan, wilkinson, repeated, graded, sparse, deficient]


@pytest.mark.parametrize("make", NASTY, ids=lambda f: f.__name__)
@pytest.mark.parametrize(("m", "r"), [(30, 12), (60, 40), (13, 12)])
def test_pivoting_of_nasty_matrices(make: object, m: int, r: int) -> None:
    torch.manual_seed(0)
    columns = make(m, r)  # type: ignore[operator]
    left = torch.randn(70, r, dtype=torch.float64)
    basis = torch.linalg.qr(columns).Q
    pivots, c = choose_pivots(basis)
    assert len(pivots.unique()) == r
    assert float(c.abs().max()) <= LARGEST_ENTRY * (1 + 1e-9)
    others = [i for i in range(m) if i not in set(pivots.tolist())]
    torch.testing.assert_close(c @ basis[pivots], basis[others], rtol=0, atol=1e-12)
    form = FORMS["pivoted"]
    shape = LinearShape(m, 70, False, torch.float64)
    body = form.empty(shape, r)
    form.fill(body, (left, columns.T), None)
    dense = left @ columns.T
    bound = {"rtol": 0, "atol": 1e-12 * float(dense.abs().max()) * r}
    torch.testing.assert_close(form.weight(body, shape), dense, **bound)
    x = torch.randn(3, m, dtype=torch.float64)
    torch.testing.assert_close(body(x), x @ dense.T, rtol=0, atol=m**0.5 * bound["atol"])
    # The pivots are columns of the product, as they are.
    order = order_of(body, m)
    chosen = torch.arange(r) if order is None else order[:r]
    torch.testing.assert_close(body.pivot.weight.detach(), dense[:, chosen], **bound)
    # Whoever makes the input in the order that the form asks for needs none in the body.
    order = form.input_order(columns.T)
    assert order.sort().values.tolist() == list(range(m))
    ready = form.empty(shape, r)
    form.fill(ready, (left, columns.T[:, order]), None)
    assert make is deficient or blocks_of(ready) == 0  # its row space has no one basis
    torch.testing.assert_close(ready(x[:, order]), x @ dense.T, rtol=0, atol=m**0.5 * bound["atol"])


def test_lu_alone_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    """LU picks pivots with coefficients over a thousand here; the exchanges bring them down."""
    basis = torch.linalg.qr(kahan(60, 40)).Q
    monkeypatch.setattr("fxcompress.forms.pivoted.LARGEST_ENTRY", 1e9)
    _, unbounded = choose_pivots(basis)
    assert float(unbounded.abs().max()) > 1000
    monkeypatch.undo()
    _, bounded = choose_pivots(basis)
    assert float(bounded.abs().max()) <= LARGEST_ENTRY


def test_pivoting_gives_up_with_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.forms.pivoted.EXCHANGES", 1)
    body = FORMS["pivoted"].empty(LinearShape(60, 20, False), 40)
    with pytest.raises(FormError, match="did not settle within 1 row exchanges"):
        FORMS["pivoted"].fill(body, (torch.randn(20, 40).double(), kahan(60, 40).T), None)


# ---- the order of the input -----------------------------------------------------------


def filled(columns: Tensor, dtype: torch.dtype = torch.float32) -> tuple[fx.GraphModule, float]:
    """A body for a weight with these columns (n x r) as its row space, and its relative error."""
    n, r = columns.shape
    generator = torch.Generator().manual_seed(0)
    left = torch.randn(50, r, generator=generator, dtype=torch.float64)
    x = torch.randn(64, n, generator=generator, dtype=torch.float64).to(dtype)
    form = FORMS["pivoted"]
    body = form.empty(LinearShape(n, 50, False, dtype), r)
    form.fill(body, (left, columns.T), None)
    exact = x.double() @ columns @ left.T
    return body, float((body(x).double() - exact).norm() / exact.norm())


def test_an_input_whose_first_channels_are_good_pivots_stays_as_it_is() -> None:
    torch.manual_seed(0)
    columns = torch.cat([torch.eye(16), torch.randn(48, 16)]).double()
    body, error = filled(columns)
    assert blocks_of(body) == 0
    assert not [*body.buffers()]
    assert error < 1e-6


@pytest.mark.parametrize(("size", "blocks"), [(32, 4), (16, 8), (8, 16), (4, 32), (1, 128)])
def test_the_largest_blocks_that_are_good_enough_are_moved(size: int, blocks: int) -> None:
    """Good pivots are in blocks of one size that stand apart, or do not stand together at all."""
    torch.manual_seed(0)
    columns = 1e-5 * torch.randn(128, 64).double()
    places = torch.arange(128).reshape(-1, size)[1::2].flatten()  # every other block
    columns[places] = torch.eye(64).double()
    body, error = filled(columns)
    assert blocks_of(body) == blocks
    assert order_of(body, 128)[:64].sort().values.tolist() == places.tolist()
    assert error < 1e-6


def test_narrow_types_ask_for_better_pivots() -> None:
    torch.manual_seed(1)
    columns = torch.randn(128, 64).double()
    errors = {}
    orders = {}
    for dtype in (torch.float32, torch.bfloat16):
        body, errors[dtype] = filled(columns, dtype)
        orders[dtype] = blocks_of(body)
    assert orders[torch.float32] < orders[torch.bfloat16]
    assert errors[torch.bfloat16] < 0.05


def test_no_weight_at_all() -> None:
    body, _ = filled(torch.zeros(24, 8).double())
    assert not bool(body.pivot.weight.any())
    assert bool(body.combine.weight.isfinite().all())


@pytest.mark.parametrize("size", [1, 2, 5])
def test_blocks_are_an_order(size: int) -> None:
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(40, 10).double()).Q
    basis[:20] = 0  # dead channels, whose volume is zero
    order = choose_blocks(basis, size)
    assert order.sort().values.tolist() == list(range(40 // size))
    assert bool((order[: 10 // size] >= 20 // size).all())


def test_amplification_is_that_of_rounding() -> None:
    """Against rounding every number at random, with inputs of equal size."""
    torch.manual_seed(0)
    pivots, combination = torch.randn(30, 12).double(), 3 * torch.randn(12, 40).double()
    dense = torch.cat([pivots, pivots @ combination], 1)
    x, unit = torch.randn(4000, 52).double(), 1e-6

    def rounded(t: Tensor) -> Tensor:
        return t * (1 + unit * torch.randn_like(t))

    exact = x @ dense.T
    middle = x[:, :12] + x[:, 12:] @ combination.T
    errors = [rounded(middle) @ pivots.T - exact, x @ rounded(dense).T - exact]
    measured = float(errors[0].norm() / errors[1].norm())
    assert measured == pytest.approx(amplification(pivots, combination), rel=0.1)


def test_all_forms_are_documented() -> None:
    for form in FORMS.values():
        assert isinstance(form, Form)
        module = __import__(type(form).__module__, fromlist=["x"])
        assert "before::" in module.__doc__
        assert "after::" in module.__doc__


@pytest.mark.parametrize("name", ["low_rank", "pivoted"])
@pytest.mark.parametrize(("m", "n"), [(1, 1), (2, 2), (3, 3), (16, 24), (1536, 576), (7, 1)])
def test_break_even_is_the_first_rank_that_saves_nothing(name: str, m: int, n: int) -> None:
    form = fit(find_form(name), [LinearShape(n, m, False)])
    full = form.full_rank()
    assert isinstance(full, int)
    costs = form.parameters(np.arange(1, full + 1))
    worse = [rank for rank, cost in enumerate(costs, 1) if cost >= m * n]
    assert form.break_even() == (worse[0] if worse else full)
    if name == "pivoted":
        assert form.break_even() == full
