"""``nn.TransformerEncoder`` has fused kernels that would run past a rewritten layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import fxcompress
from fxcompress.rewrite import Factorized
from fxcompress.rewrite.fast_paths import disable_fast_paths
from tests.full_rank import counted_calls, factorized, rewrite
from tests.zoo import ZOO


@contextmanager
def fused_calls() -> Iterator[list[int]]:
    """Calls of the fused encoder layer, counted."""
    calls: list[int] = []
    fused = torch._transformer_encoder_layer_fwd

    def counting(*args: object) -> torch.Tensor:
        calls.append(1)
        return fused(*args)

    torch._transformer_encoder_layer_fwd = counting
    try:
        yield calls
    finally:
        torch._transformer_encoder_layer_fwd = fused


@pytest.mark.parametrize("name", ["transformer_encoder", "transformer_encoder_padded"])
def test_bodies_run_where_torch_would_have_taken_its_fast_path(name: str) -> None:
    case = ZOO[name]
    pair = rewrite(case.build(), case.batch())
    assert torch.backends.mha.get_fastpath_enabled()
    with torch.no_grad(), fused_calls() as fused:
        pair.original(**case.batch())
        assert len(fused) == 2  # both layers: the fast path is real, and on
        fused.clear()
        with counted_calls(pair.model) as bodies:
            pair.model(**case.batch())
        assert not fused
    assert len(bodies) == 12
    assert set(bodies.values()) == {1}


def test_without_the_switch_the_rewritten_layer_would_be_bypassed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Which shows that the test above can fail: only linear1 and linear2 are rewritten.

    A lazy weight keeps torch off its fast path by being a subclass; a plain one does not.
    """
    monkeypatch.setattr(Factorized, "weight", property(Factorized.dense))
    case = ZOO["transformer_encoder"]
    pair = rewrite(case.build(), case.batch())
    model = case.build()
    for index, layer in enumerate(model.layers):
        for part in ("linear1", "linear2"):
            setattr(layer, part, pair.model.get_submodule(f"layers.{index}.{part}"))
    with torch.no_grad(), fused_calls() as fused, counted_calls(model) as bodies:
        model(**case.batch())
        assert len(fused) == 2
        assert set(bodies.values()) == {0}
        disable_fast_paths(model, [*factorized(model)])
        model(**case.batch())
    assert len(fused) == 2
    assert set(bodies.values()) == {1}


def test_layers_that_are_not_rewritten_keep_their_fast_path() -> None:
    model = ZOO["transformer_encoder"].build()
    disable_fast_paths(model, ["layers.1.linear1"])
    assert [layer.activation_relu_or_gelu for layer in model.layers] == [1, 0]
    assert not model.use_nested_tensor


@pytest.mark.parametrize("name", ["transformer_encoder", "transformer_encoder_padded"])
def test_compile_rewrites_an_encoder_with_gradients_and_padding(name: str) -> None:
    case = ZOO[name]
    model = case.build()
    batches = [case.batch(), case.other_batch()]
    small = fxcompress.compile(model, "every-linear", batches, keep=0.6, progress=False)
    rewritten = fxcompress.plan_of(small).rewritten
    assert rewritten
    with torch.no_grad(), fused_calls() as fused, counted_calls(small) as bodies:
        small(**case.batch())
    assert not fused
    assert bodies == {site.name: 1 for site in rewritten}


def test_a_bare_layer_is_switched_off_too() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 24, batch_first=True).eval()
    pair = rewrite(layer, torch.randn(2, 5, 16))
    with torch.no_grad(), fused_calls() as fused, counted_calls(pair.model) as bodies:
        pair.model(torch.randn(2, 5, 16))
    assert not fused
    assert set(bodies.values()) == {1}
