"""Frozen weights and biases that learn, or the other way round, stay so."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.rewrite import Factorized, JointMember, ProjectedAttention
from fxcompress.rules import parse_rules
from tests.small import rules

N = 24


def data(*size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, *size, generator=generator) for _ in range(4)]


def linears() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(N, N), nn.ReLU(), nn.Linear(N, N), nn.ReLU(), nn.Linear(N, 5))


def freeze(model: nn.Module, kind: str) -> None:
    """Freeze the weights, or the biases."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.rpartition(".")[2] != kind)


def check(small: nn.Module, frozen: str) -> None:
    """Factors learn if weights do, biases if biases do."""
    found = [m for m in small.modules() if isinstance(m, Factorized)]
    assert found
    for each in found:
        for name, parameter in each.named_parameters():
            assert parameter.requires_grad == (name.rpartition(".")[2] != frozen), name


BOTH = pytest.mark.parametrize("frozen", ["weight", "bias"])


@BOTH
@pytest.mark.parametrize("form", ["low_rank", "pivoted", "any"])
def test_linear_layers(form: str, frozen: str) -> None:
    model = linears()
    freeze(model, frozen)
    rewrite: Any = {"any_of": ["pivoted", "low_rank"]} if form == "any" else {"form": form}
    small = fxcompress.compile(model, rules(0.6, rewrite=rewrite), data(N), progress=False)
    check(small, frozen)
    train(small, frozen)


def train(small: nn.Module, frozen: str) -> None:
    """What is frozen is the same after a step."""
    layers = [m for m in small.modules() if isinstance(m, Factorized)]
    before = [getattr(layer, frozen).detach().clone() for layer in layers]
    optimizer = torch.optim.SGD([p for p in small.parameters() if p.requires_grad], 0.1)
    small(data(N)[0]).square().sum().backward()
    optimizer.step()
    for layer, value in zip(layers, before, strict=True):
        torch.testing.assert_close(getattr(layer, frozen).detach(), value, rtol=0, atol=1e-6)


@BOTH
@pytest.mark.parametrize("solver", [{"rounds": 2, "steps": 2}, {"rounds": 1, "steps": 0}])
def test_rounds(frozen: str, solver: dict[str, Any]) -> None:
    model = linears()
    freeze(model, frozen)
    loaded = parse_rules(
        json.dumps({
            "budget": {"keep": 0.6, "of": "matched"},
            "solver": solver,
            "rules": [{
                "id": "all", "match": {"node": {"op": "linear", "as": "fc"}},
                "rewrite": {"any_of": ["pivoted", "low_rank"]},
            }],
        }),
        "rounds.yaml",
    )  # fmt: skip
    small = fxcompress.compile(model, loaded, data(N), progress=False)
    check(small, frozen)


@BOTH
def test_during_training(frozen: str) -> None:
    model = linears()
    freeze(model, frozen)
    isvt = fxcompress.ISVT(model, rules(0.6), data(N), steps=4, every=2, progress=False)
    for _ in range(4):
        isvt.step()
    check(isvt.finalize(), frozen)


@BOTH
def test_convolutions(frozen: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Flatten(),
        nn.Linear(16 * 16, 4),
    )  # fmt: skip
    freeze(model, frozen)
    images = data(8, 8, 8)
    kernels: Any = {"node": {"op": "conv2d", "as": "c"}}
    forms: Any = {"any_of": ["channel", "channel_input", "spatial", "tucker2"]}
    small = fxcompress.compile(
        model, rules(0.6, match=kernels, rewrite=forms), images, progress=False
    )
    check(small, frozen)


def test_a_bias_that_is_mixed_with_the_weight() -> None:
    """The dense bias of ``pivoted`` convolutions is a sum of biases and products with factors."""
    model = nn.Sequential(nn.Conv2d(8, 16, 3), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 36, 4))
    freeze(model, "bias")
    only = rules(0.6, match={"node": {"op": "conv2d", "as": "c"}}, rewrite={"form": "pivoted"})
    with pytest.raises(fxcompress.BudgetError, match="its bias is frozen"):
        fxcompress.compile(model, only, data(8, 8, 8), progress=False)


class Heads(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k = nn.Linear(N, N), nn.Linear(N, N)
        self.out = nn.Linear(N, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.q(x)) * torch.tanh(self.k(x)))


TOGETHER = json.dumps({
    "budget": {"keep": 0.6, "of": "matched"},
    "rules": [{
        "id": "heads",
        "match": {"group": {"op": "linear", "as": "half", "name": "{q,k}"}},
        "rewrite": {"form": "joint"},
    }],
})  # fmt: skip


@BOTH
def test_layers_that_share_a_factor(frozen: str) -> None:
    model = Heads()
    freeze(model, frozen)
    small = fxcompress.compile(model, parse_rules(TOGETHER, "joint.yaml"), data(N), progress=False)
    assert isinstance(small.q, JointMember)
    check(small, frozen)


def test_a_frozen_layer_shares_no_factor_with_one_that_learns() -> None:
    model = Heads()
    model.q.weight.requires_grad_(False)
    with pytest.raises(fxcompress.RuleError, match="some of their weights learn"):
        fxcompress.compile(model, parse_rules(TOGETHER, "joint.yaml"), data(N), progress=False)


@BOTH
def test_attention(frozen: str) -> None:
    attention = nn.MultiheadAttention(N, 2, batch_first=True)
    attention.in_proj_weight.requires_grad_(frozen != "weight")
    attention.in_proj_bias.requires_grad_(frozen != "bias")
    attention.out_proj.weight.requires_grad_(False)
    made = ProjectedAttention.of(attention)
    for part in (made.q_proj, made.k_proj, made.v_proj):
        assert part.weight.requires_grad == (frozen != "weight")
        assert part.bias.requires_grad == (frozen != "bias")
    assert not made.out_proj.weight.requires_grad
    assert made.out_proj.bias.requires_grad


def test_a_folded_norm_leaves_the_bias_free() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3, bias=False), nn.BatchNorm2d(8)).eval()
    model[0].weight.requires_grad_(False)
    from fxcompress.plans.plan import Folded
    from fxcompress.rewrite import fold_batch_norms

    fold_batch_norms(model, [Folded(convolution="0", norm="1")])
    assert not model[0].weight.requires_grad
    assert model[0].bias.requires_grad
