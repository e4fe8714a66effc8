"""Rows of convolutions against autograd: the gradient of the weight is ``Σ_t g_t a_tᵀ``."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fxcompress.operators import rows
from fxcompress.operators.modules import shape_of
from fxcompress.operators.patches import blocks
from tests.convolutions import CASES, build, data


@pytest.fixture(params=[1 << 24, 60], ids=["one block", "many blocks"])
def block(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(rows, "BLOCK", request.param)
    return int(request.param)


@pytest.mark.parametrize("case", CASES)
def test_patches_and_gradients_make_the_gradient_of_the_weight(case: str, block: int) -> None:
    torch.manual_seed(0)
    layer = build(CASES[case])
    shape: Any = shape_of(layer)
    x = data(layer, items=3)
    out = layer(x)
    g = torch.randn_like(out)
    out.backward(g)
    expected = shape.canonical(layer.weight.grad).flatten(2)
    total, positions = torch.zeros_like(expected), 0
    for _, taps, part in blocks(x, g, shape):
        assert part is not None
        total += torch.einsum("sglm,sglp->gmp", part, taps)
        positions += taps.shape[0] * taps.shape[2]
        if block == 60:  # one line of one sample, at least
            assert taps.shape[0] == 1
    torch.testing.assert_close(total, expected, rtol=1e-10, atol=1e-10)
    assert positions == out.numel() // shape.out_features


@pytest.mark.parametrize("case", ["2d, strided, dilated, groups", "transposed 2d, groups", "3d"])
def test_gradients_sample_by_sample(case: str, block: int) -> None:
    torch.manual_seed(0)
    layer = build(CASES[case])
    shape: Any = shape_of(layer)
    x = data(layer, items=3)
    g = torch.randn_like(layer(x))
    each = []
    for sample, part in zip(x, g, strict=True):
        layer.zero_grad()
        layer(sample[None]).backward(part[None])
        each.append(shape.canonical(layer.weight.grad).flatten(2).clone())
    expected = torch.stack(each)
    found = torch.cat([*shape.weight_gradients(x, g)])
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    squares = expected.square()
    torch.testing.assert_close(shape.squared_gradients(x, g, entries=True), squares.sum(0))
    torch.testing.assert_close(shape.squared_gradients(x, g, entries=False), squares.mean(3).sum(0))


def test_the_whole_unfolded_batch_is_never_in_memory() -> None:
    """A batch whose patches take 2.4 GB is gone through in blocks of 64 MiB."""
    layer = torch.nn.Conv2d(64, 8, 3, padding=1)
    shape: Any = shape_of(layer)
    x = torch.zeros(16, 64, 256, 256)
    largest = seen = 0
    for part in shape.input_rows(x, None):
        largest = max(largest, part.numel())
        seen += part.shape[1]
    assert seen == 16 * 256 * 256
    assert largest <= rows.BLOCK
    assert 9 * x.numel() > 30 * rows.BLOCK
