"""Copies that share parameters, and copies that stop sharing them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.rewrite import own_parameters, prepared, skeleton
from tests.zoo import ZOO


class Listed(nn.Module):
    """Computes with parameters that it also holds in a list, as ``nn.LSTM`` does."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(4))
        self.held = [self.scale]
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) * self.held[0]


@pytest.mark.parametrize("name", ["llama", "gpt2", "attention", "lstm", "resnet"])
def test_a_skeleton_shares_parameters_but_not_buffers(name: str) -> None:
    model = ZOO[name].build()
    copied = skeleton(model)
    ours, theirs = dict(copied.named_parameters()), dict(model.named_parameters())
    assert ours.keys() == theirs.keys()
    assert all(ours[key] is theirs[key] for key in theirs)
    buffers = dict(model.named_buffers())
    assert all(buffer is not buffers[key] for key, buffer in copied.named_buffers())


def test_preparing_leaves_the_model_alone() -> None:
    model = ZOO["transformer_encoder"].build()
    state = {k: v.clone() for k, v in model.state_dict().items()}
    prepared(model)
    assert type(model.layers[0].self_attn) is nn.MultiheadAttention
    assert model.use_nested_tensor
    assert all(torch.equal(model.state_dict()[k], v) for k, v in state.items())
    assert model.state_dict().keys() == state.keys()


@pytest.mark.parametrize("make", [Listed, lambda: nn.LSTM(4, 4)])
def test_own_parameters_are_those_that_are_computed_with(make: type[nn.Module]) -> None:
    model = make()
    x = torch.randn(2, 4)
    own = own_parameters(skeleton(model), model)
    assert not {id(p) for p in own.parameters()} & {id(p) for p in model.parameters()}

    def run(module: nn.Module) -> Tensor:
        out = module(x)
        return out[0] if isinstance(out, tuple) else out

    before = run(model).detach()
    assert torch.equal(run(own), before)
    with torch.no_grad():
        for parameter in own.parameters():
            parameter.mul_(3.0)
    assert torch.equal(run(model), before)
    assert not torch.equal(run(own), before)


def test_ties_stay_tied() -> None:
    model = ZOO["tied"].build()
    own = own_parameters(skeleton(model), model)
    assert own.head.weight is own.embedding.weight
    assert own.head.weight is not model.head.weight


def test_what_was_not_shared_is_not_copied() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    copied = skeleton(model)
    copied[1] = nn.Linear(4, 4)
    new = copied[1].weight
    assert own_parameters(copied, model)[1].weight is new


def test_frozen_parameters_stay_frozen() -> None:
    model = nn.Sequential(nn.Linear(4, 4).requires_grad_(False), nn.Linear(4, 4))
    own = own_parameters(skeleton(model), model)
    assert [p.requires_grad for p in own.parameters()] == [False, False, True, True]


def test_training_a_compressed_model_leaves_the_original_alone() -> None:
    case = ZOO["lstm"]
    model = case.build()
    small = fxcompress.compile(model, "every-linear", [case.batch()], keep=0.5, progress=False)
    before, after = model(**case.batch()).detach(), small(**case.batch()).detach()
    with torch.no_grad():
        for parameter in small.lstm.parameters():
            parameter.zero_()
    assert torch.equal(model(**case.batch()), before)
    assert not torch.equal(small(**case.batch()), after)


def test_in_place_keeps_the_object_and_its_other_parameters() -> None:
    case = ZOO["bert"]
    model = case.build()
    embedding = model.bert.embeddings.word_embeddings.weight
    small = fxcompress.compile(
        model, "every-linear", [case.batch()], keep=0.5, inplace=True, progress=False
    )
    assert small is model
    assert model.bert.embeddings.word_embeddings.weight is embedding
    assert fxcompress.plan_of(model).rewritten
