"""The algorithms that fxcompress is compared with do what their papers say."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

EXAMPLES = Path(__file__).parent.parent / "examples"


def example(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


peers: Any = example("peers")


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 24, 3, stride=2, padding=1, bias=False)
        self.point = nn.Conv2d(24, 24, 1)
        self.head = nn.Linear(24, 5)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.wide(torch.relu(self.stem(x))))
        return self.head(torch.relu(self.point(h)).mean((2, 3)))


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net().eval()


X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(0))


def macs(model: nn.Module) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(X[:1])
    return flops.get_total_flops() // 2


def output(model: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(X)
    return out


def test_costs_are_those_of_the_flop_counter(net: Net) -> None:
    layers = {layer.name: layer for layer in peers.layers_of(net, X)}
    assert sum(layer.macs for layer in layers.values()) == macs(net)
    wide = layers["wide"]
    rest = macs(net) - wide.macs
    cases = [
        (peers.channel_body(wide, torch.zeros(24, 5), torch.zeros(5, 144)),
         peers.channel_cost(wide, 5)),
        (peers.spatial_body(net.wide, 5), peers.spatial_cost(wide, 5)),
        (peers.tucker_body(net.wide, 4, 6), peers.tucker_cost(wide, 4, 6)),
    ]  # fmt: skip
    for body, cost in cases:
        assert macs(peers.replaced(net, {"wide": body})) == rest + cost


def test_full_rank_changes_nothing(net: Net) -> None:
    layers = {layer.name: layer for layer in peers.layers_of(net, X)}
    root = torch.linalg.cholesky(torch.eye(144).double() * 2 + 0.5)
    new = {
        "stem": peers.tucker_body(net.stem, 3, 16),
        "wide": peers.channel_body(layers["wide"], *peers.truncated(net.wide.weight, root, 24)),
        "head": peers.channel_body(layers["head"], *peers.truncated(net.head.weight, None, 5)),
    }
    torch.testing.assert_close(output(peers.replaced(net, new)), output(net), rtol=0, atol=1e-5)
    spatial = peers.replaced(net, {"wide": peers.spatial_body(net.wide, 48)})
    torch.testing.assert_close(output(spatial), output(net), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep", [0.4, 0.7])
def test_budgets_are_met(net: Net, keep: float) -> None:
    def evaluate(model: nn.Module) -> float:
        return -float((output(model) - output(net)).norm())

    found = {
        "svd": peers.plain_svd(net, keep, X),
        "balf": peers.balf(net, keep, X, [X]),
        "spatial": peers.spatial_greedy(net, keep, X, evaluate),
        "tucker": peers.tucker_vbmf(net, keep, X),
    }
    for name, small in found.items():
        assert macs(small) <= keep * macs(net)
        # Random weights are noise to VBMF: its ranks are the least there are.
        assert name == "tucker" or macs(small) > 0.4 * keep * macs(net)


def test_whitening_is_better_for_the_outputs(net: Net) -> None:
    layer = next(each for each in peers.layers_of(net, X) if each.name == "wide")
    (root,) = peers._input_roots(net, [layer], [X])
    patches = nn.functional.unfold(torch.relu(net.stem(X)), 3, padding=1, stride=2)
    rows = patches.transpose(1, 2).flatten(0, 1).double().detach()
    torch.testing.assert_close(root @ root, rows.T @ rows, rtol=1e-4, atol=1e-4)
    errors = []
    for each in (root, None):
        left, right = peers.truncated(net.wide.weight, each, 4)
        change = net.wide.weight.detach().double().flatten(1) - left @ right
        errors.append(float((rows @ change.T).norm()))
    assert errors[0] < errors[1]


@pytest.mark.parametrize("rank", [0, 3, 8])
def test_variational_bayes_finds_the_rank_behind_the_noise(rank: int) -> None:
    torch.manual_seed(rank)
    noise = torch.randn(60, 150).double()
    signal = 3 * torch.randn(60, rank).double() @ torch.randn(rank, 150).double()
    assert peers.vbmf_rank(signal + noise) == rank
    assert peers.vbmf_rank((signal + noise).T) == rank
