"""Hidden values of many architectures with fewer channels, against dense layers with zeros."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fxcompress.operators.applied import operator_at
from tests.architectures.test_every_operator import run
from tests.hidden import hidden_groups, narrowed_pair
from tests.zoo import ZOO

NARROWED = {
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "gpt2", "bert", "roberta", "vit"),
    *("swin", "whisper", "t5", "clip", "wav2vec2", "transformer_encoder", "resnet"),
} & set(ZOO)
"""Architectures whose feed-forward blocks or blocks of convolutions have to be found."""


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", ZOO)
def test_as_with_columns_of_zeros(name: str, share: float) -> None:
    torch.manual_seed(0)
    case = ZOO[name]
    model, batch = case.build().double().eval(), case.batch(torch.float64)
    example = (batch["x"],) if isinstance(model, nn.Sequential) and "x" in batch else batch
    work, groups, _ = hidden_groups(model, example)
    if not groups:
        assert name not in NARROWED
        pytest.skip("no hidden value")
    small, reference = narrowed_pair(model, work, groups, share)
    with torch.no_grad():
        got, wanted = run(small, batch), run(reference, batch)
    bound = 1e-5 if case.single else 1e-9
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound * float(b.abs().max()))
    for group in groups:
        name = group.sites[-1].name
        assert type(small.get_submodule(name)) is type(work.get_submodule(name))
        layer = operator_at(small, name)
        assert layer.weight.shape != operator_at(work, name).weight.shape or share == 1
