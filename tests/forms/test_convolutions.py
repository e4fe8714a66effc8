"""Forms of convolutions against the operator itself, in float64."""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from fxcompress.forms import Form, Target, find_form, fit
from fxcompress.forms.ordered import blocks_of
from fxcompress.forms.target import Rank
from fxcompress.metric.kronecker import Kronecker
from fxcompress.metric.quadratic import Grouped
from fxcompress.metric.whiten import Whitener, whitener
from fxcompress.operators.convolution import ConvShape
from fxcompress.operators.modules import shape_of
from tests.convolutions import CASES, build, data, dense_loss, factors

NAMES = ("channel", "channel_input", "spatial", "tucker2", "pivoted", "low_rank")


def metric(a: Tensor, g: Tensor) -> Grouped:
    pairs = zip(a, g, strict=True)
    return Grouped(tuple(Kronecker(whitener(x, 0.0), whitener(y, 0.0)) for x, y in pairs))


def form_for(name: str, layer: nn.Module) -> tuple[Form, ConvShape]:
    shape = shape_of(layer)
    try:
        form = find_form(name, shape.op)
    except KeyError:
        pytest.skip(f"{name} is not for {shape.op}")
    if form.misfit(shape):
        pytest.skip(str(form.misfit(shape)))
    return form, shape


def some_ranks(full: Rank) -> list[Rank]:
    if isinstance(full, int):
        return sorted({1, max(1, full // 2), full})
    first, second = full
    return sorted({(1, 1), (max(1, first // 2), second), (first, max(1, second // 2)), full})


def with_weight(layer: nn.Module, shape: ConvShape, weight: Tensor) -> nn.Module:
    other = copy.deepcopy(layer)
    with torch.no_grad():
        other.weight.copy_(shape.stored(weight))
    return other


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(2, 1, 7, padding=3),
        nn.Conv2d(8, 1, 1),
        nn.Conv1d(8, 8, 3, groups=8),
        nn.Conv2d(8, 4, 3, groups=4),
        nn.ConvTranspose2d(4, 1, 3),
        nn.Conv3d(1, 1, 1),
    ],
)
def test_every_form_counts_for_one_output_channel(layer: nn.Module, name: str) -> None:
    """Whether it fits or not: costs are asked for at all ranks that there are, even none."""
    shape = replace(shape_of(layer), inputs=((2, 9, 9, 9)[: layer.weight.dim() - 1],))
    try:
        form = find_form(name, shape.op)
    except KeyError:
        pytest.skip(f"{name} is not for {shape.op}")
    full = form.full_rank(shape)
    ranks = np.empty((0,) if isinstance(full, int) else (0, 2), dtype=np.int64)
    for count in (form.parameters, form.macs, form.bytes):
        assert len(count(shape, ranks)) == 0


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_bodies_compute_what_their_factors_stand_for(case: str, name: str) -> None:
    torch.manual_seed(0)
    layer = build(CASES[case])
    form, shape = form_for(name, layer)
    weight = shape.canonical(layer.weight)
    a, g = factors(shape)
    target = Target(weight, metric(a, g))
    x = data(layer)
    for rank in some_ranks(form.full_rank(shape)):
        found = form.factors(target, rank)
        product = form.product(shape, found)
        body = form.empty(shape, rank)
        form.fill(body, found, layer.bias)
        torch.testing.assert_close(form.weight(body, shape), product, rtol=0, atol=1e-12)
        torch.testing.assert_close(form.bias(body, shape), layer.bias, rtol=0, atol=1e-12)
        expected = with_weight(layer, shape, product)
        torch.testing.assert_close(body(x), expected(x), rtol=0, atol=1e-11)
        torch.testing.assert_close(body(x[0]), expected(x[0]), rtol=0, atol=1e-11)
        # The predicted loss is that of the weight that the body has, in the whole metric.
        (loss,) = form.losses(target, np.array([rank]))
        assert loss == pytest.approx(dense_loss(product - weight, a, g), rel=1e-8, abs=1e-12)
        if rank == form.full_rank(shape):
            torch.testing.assert_close(body(x), layer(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_counts_are_exact(case: str, name: str) -> None:
    layer = build(CASES[case])
    form, shape = form_for(name, layer)
    x = data(layer)
    measured = replace(shape, inputs=((len(x), *x.shape[2:]),))
    target = Target(shape.canonical(layer.weight), metric(*factors(shape)))
    for rank in some_ranks(form.full_rank(shape)):
        body = form.empty(shape, rank)
        for parameter in body.parameters():
            parameter.zero_()
        with FlopCounterMode(display=False) as flops:
            body(x)
        ranks = np.array([rank])
        assert form.macs(measured, ranks)[0] * 2 == flops.get_total_flops()
        weights = [p for key, p in body.named_parameters() if not key.endswith("bias")]
        assert form.parameters(shape, ranks)[0] == sum(p.numel() for p in weights)
        filled = form.empty(shape, rank)
        form.fill(filled, form.factors(target, rank), layer.bias)
        for each in (body, filled):
            weights = [p for key, p in each.named_parameters() if not key.endswith("bias")]
            size = sum(t.numel() * t.element_size() for t in [*weights, *each.buffers()])
            known = fit(form, [shape], order=blocks_of(each))
            assert known.bytes(ranks)[0] == size <= form.bytes(shape, ranks)[0]
            twin = known.empty(rank).heads[0]
            twin.load_state_dict(each.state_dict(), strict=True)
            assert torch.equal(twin(x), each(x))
    with FlopCounterMode(display=False) as flops:
        layer(x)
    assert measured.macs * 2 == flops.get_total_flops()
    assert shape.weights == layer.weight.numel()


@torch.no_grad()
def test_pivots_that_stand_first_need_no_order() -> None:
    torch.manual_seed(0)
    layer = nn.Conv2d(6, 12, 3).double()
    form, shape = form_for("pivoted", layer)
    right = torch.randn(1, 4, 6 * 9).double()
    left = torch.cat([torch.eye(4), torch.randn(8, 4)]).double()[None, :, :, None]
    dead = left.flip(1).clone()
    dead[:, :4] = 0  # the first channels say nothing of the others
    x = torch.randn(2, 6, 9, 9).double()
    for factor, blocks in ((left, 0), (dead, 12)):
        body = form.empty(shape, 4)
        form.fill(body, (factor, right), layer.bias)
        assert blocks_of(body) == blocks
        expected = with_weight(layer, shape, form.product(shape, (factor, right)))
        torch.testing.assert_close(body(x), expected(x), rtol=0, atol=1e-11)


@pytest.mark.parametrize("name", ["channel", "channel_input", "spatial"])
@pytest.mark.parametrize("case", ["2d", "2d, strided, dilated, groups", "transposed 2d, groups"])
def test_losses_fall_with_the_rank(case: str, name: str) -> None:
    torch.manual_seed(1)
    layer = build(CASES[case])
    form, shape = form_for(name, layer)
    weight = shape.canonical(layer.weight.detach())
    target = Target(weight, metric(*factors(shape)))
    full = form.full_rank(shape)
    assert isinstance(full, int)
    losses = form.losses(target, np.arange(full + 1))
    assert (np.diff(losses) <= 1e-12).all()
    assert losses[0] == pytest.approx(target.loss(torch.zeros_like(weight)), rel=1e-9)
    assert losses[-1] == pytest.approx(0, abs=1e-12 * losses[0])


def test_the_channel_form_is_the_best_of_its_rank() -> None:
    """Eckart and Young in the metric: no other pair of convolutions of rank 3 loses less."""
    torch.manual_seed(0)
    layer = build(CASES["2d"])
    form, shape = form_for("channel", layer)
    weight = shape.canonical(layer.weight.detach())
    a, g = factors(shape)
    left, right = form.factors(Target(weight, metric(a, g)), 3)
    best = dense_loss(form.product(shape, (left, right)) - weight, a, g)
    for _ in range(50):
        noisy = (left + 0.02 * torch.randn_like(left), right + 0.02 * torch.randn_like(right))
        assert dense_loss(form.product(shape, noisy) - weight, a, g) > best


@pytest.mark.parametrize("name", ["channel_input", "spatial"])
def test_a_metric_that_factorizes_is_truncated_exactly(name: str) -> None:
    """With A = A_C ⊗ A_Q the split is the truncated SVD of the whitened rearrangement."""
    torch.manual_seed(0)
    layer = build(CASES["2d"], n=4, m=5)
    form, shape = form_for(name, layer)
    weight = shape.canonical(layer.weight.detach())
    from tests.convolutions import spd

    columns, rows = (spd(4), spd(9)) if name == "channel_input" else (spd(12), spd(3))
    g = spd(5)
    a = torch.kron(columns, rows)  # patches in the order (n, k_1, k_2) both times
    whitened = torch.linalg.cholesky(g).T @ weight[0].flatten(1)
    split = whitened.reshape(5, len(columns), len(rows))
    split = torch.einsum(
        "mcq,cd,qr->mrd", split, torch.linalg.cholesky(columns), torch.linalg.cholesky(rows)
    )
    sigma = torch.linalg.svdvals(split.flatten(0, 1))
    target = Target(weight, metric(a[None], g[None]))
    losses = form.losses(target, np.arange(len(sigma) + 1))
    expected = [0.5 * float(sigma[r:].square().sum()) for r in range(len(sigma) + 1)]
    np.testing.assert_allclose(losses, expected, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("name", NAMES[:5])
def test_rank_deficient_weights_and_factors(name: str, rank: int) -> None:
    torch.manual_seed(0)
    layer = build(CASES["2d"])
    form, shape = form_for(name, layer)
    channel = find_form("channel", "conv2d")
    with torch.no_grad():
        small = (torch.randn(1, 8, rank).double(), torch.randn(1, rank, 54).double())
        weight = channel.product(shape, small)
        layer.weight.copy_(shape.stored(weight))
    a, g = factors(shape)
    # Dead input channels: their rows and columns of A are zero.
    a[:, :18], a[:, :, :18] = 0, 0
    pairs = ((whitener(a[0], 1e-6), whitener(g[0], 0.0)),)
    target = Target(weight, Grouped(tuple(Kronecker(*pair) for pair in pairs)))
    full = form.full_rank(shape)
    found = form.factors(target, full)
    assert all(bool(factor.isfinite().all()) for factor in found)
    torch.testing.assert_close(form.product(shape, found), weight, rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", NAMES[:5])
def test_bfloat16_bodies(name: str) -> None:
    torch.manual_seed(0)
    layer = build(CASES["2d"]).bfloat16()
    form, shape = form_for(name, layer)
    a, g = factors(shape)
    weight = shape.canonical(layer.weight.detach())
    found = form.factors(Target(weight, metric(a, g)), form.full_rank(shape))
    body = form.empty(shape, form.full_rank(shape))
    form.fill(body, found, layer.bias)
    x = torch.randn(2, 6, 7, 7).bfloat16()
    error = (body(x) - layer(x)).float().norm() / layer(x).float().norm()
    assert float(error) < 8 * torch.finfo(torch.bfloat16).eps


configurations = st.fixed_dictionaries(
    {
        "dims": st.integers(1, 3),
        "transposed": st.booleans(),
        "groups": st.integers(1, 4),
        "group_in": st.integers(1, 4),
        "group_out": st.integers(1, 4),
        "bias": st.booleans(),
        "mode": st.sampled_from(["zeros", "reflect", "replicate", "circular"]),
        "word": st.sampled_from([None, None, None, "same", "valid"]),
        "seed": st.integers(0, 2**31),
    }
)


@settings(max_examples=200, deadline=None)
@given(configurations, st.data())
@torch.no_grad()
def test_whatever_pytorch_accepts(words: dict[str, Any], draw: st.DataObject) -> None:
    """Every configuration is rewritten to equal outputs at full rank, or refused with a reason."""
    torch.manual_seed(words["seed"])
    dims, transposed = words["dims"], words["transposed"]

    def each(low: int, high: int) -> tuple[int, ...]:
        return tuple(draw.draw(st.integers(low, high)) for _ in range(dims))

    more: dict[str, Any] = {
        "kernel_size": each(1, 3), "stride": each(1, 3), "dilation": each(1, 2),
        "padding": each(0, 3), "groups": words["groups"], "bias": words["bias"],
    }  # fmt: skip
    if transposed:
        more["output_padding"] = each(0, 1)
    else:
        more["padding_mode"] = words["mode"]
        if words["word"]:
            more["padding"] = words["word"]
    n, m = words["groups"] * words["group_in"], words["groups"] * words["group_out"]
    x = torch.randn(2, n, *([6] * dims), dtype=torch.float64)
    cls = getattr(nn, f"Conv{'Transpose' if transposed else ''}{dims}d")
    try:
        layer = cls(n, m, dtype=torch.float64, **more)
        expected = layer(x)
    except (ValueError, RuntimeError):
        return  # PyTorch does not accept it
    shape = shape_of(layer)
    weight = shape.canonical(layer.weight)
    target = Target(weight, metric(*factors(shape)))
    for name in NAMES:
        try:
            form = find_form(name, shape.op)
        except KeyError:
            continue
        reason = form.misfit(shape)
        if reason is not None:
            assert len(reason) > 10
            continue
        full = form.full_rank(shape)
        body = form.empty(shape, full)
        form.fill(body, form.factors(target, full), layer.bias)
        torch.testing.assert_close(body(x), expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("rows_only", [False, True], ids=["euclidean", "diagonal"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_metrics_without_an_input_factor(case: str, name: str, rows_only: bool) -> None:
    torch.manual_seed(0)
    layer = build(CASES[case])
    form, shape = form_for(name, layer)
    weight = shape.canonical(layer.weight)
    a = torch.eye(shape.group_in * shape.taps).double().repeat(shape.groups, 1, 1)
    scale = torch.rand(shape.groups, shape.group_out).double() + 0.1
    g = torch.diag_embed(scale if rows_only else torch.ones_like(scale))
    outputs = [whitener(each, 0.0) if rows_only else Whitener() for each in scale]
    target = Target(weight, Grouped(tuple(Kronecker(Whitener(), each) for each in outputs)))
    for rank in some_ranks(form.full_rank(shape)):
        product = form.product(shape, form.factors(target, rank))
        (loss,) = form.losses(target, np.array([rank]))
        assert loss == pytest.approx(dense_loss(product - weight, a, g), rel=1e-8, abs=1e-12)
