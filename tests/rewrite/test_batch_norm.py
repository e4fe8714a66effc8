"""Folding batch norms: exact in eval mode, and only where it is."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import fxcompress
from tests.convolutions import CASES, build, data

RULES = """
version: 1
budget: {keep: %s, unit: macs}
metric: {kind: %s}
rules:
  - id: convolutions
    match: {node: {op: [conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d,
                        conv_transpose3d]}}
    rewrite: {any_of: [channel, channel_input, spatial, pivoted], fold_batch_norm: true}
"""


def rules(tmp_path: Path, keep: float = 0.7, kind: str = "kfac") -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES % (keep, kind))
    return path


def norm_for(layer: Any, **words: Any) -> nn.Module:
    norm: Any = getattr(nn, f"BatchNorm{len(layer.kernel_size)}d")(layer.out_channels, **words)
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.2, 3)
    if norm.weight is not None:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    return norm.double().eval()


class Pooled(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flatten(2).mean(2)[:, :4]


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("case", CASES)
@torch.no_grad()
def test_the_same_function(case: str, bias: bool, affine: bool) -> None:
    from fxcompress.plans.plan import Folded
    from fxcompress.rewrite import fold_batch_norms

    torch.manual_seed(0)
    layer = build(CASES[case], bias=bias)
    model = nn.Sequential(layer, norm_for(layer, affine=affine), nn.ReLU())
    x = data(layer)
    expected = model(x)
    fold_batch_norms(model, [Folded(convolution="0", norm="1")])
    assert isinstance(model[1], nn.Identity)
    torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-9)


def network() -> nn.Sequential:
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 24, 3)
    return nn.Sequential(
        first,
        norm_for(first).float(),
        nn.ReLU(),
        second,
        norm_for(second).float(),
        nn.ReLU(),
        Pooled(),
    ).eval()


BATCHES = [torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(i)) for i in range(3)]


@pytest.mark.parametrize("graph", [False, True])
def test_the_whole_compiler(tmp_path: Path, graph: bool) -> None:
    model: nn.Module = network()
    given = copy.deepcopy(model.state_dict())
    model = fx.symbolic_trace(model) if graph else model
    small = fxcompress.compile(model, rules(tmp_path), BATCHES)
    assert all(torch.equal(value, model.state_dict()[key]) for key, value in given.items())
    plan = fxcompress.plan_of(small)
    assert [(pair.convolution, pair.norm) for pair in plan.folded] == [("0", "1"), ("3", "4")]
    assert not any(isinstance(module, nn.BatchNorm2d) for module in small.modules())
    assert {node.op for node in plan.before} >= {"batch_norm"}
    assert "batch_norm" not in {node.op for node in plan.after}
    assert plan.model_after.parameters == sum(p.numel() for p in small.parameters())
    assert plan.budget.cost <= 0.7 * plan.budget.dense
    fxcompress.save(small, tmp_path / "out")
    fresh: nn.Module = network()
    back = fxcompress.load(tmp_path / "out", fx.symbolic_trace(fresh) if graph else fresh)
    torch.testing.assert_close(back(BATCHES[0]), small(BATCHES[0]), rtol=0, atol=0)
    with pytest.raises(fxcompress.LoadError, match="no batch norm 1 after a convolution 0"):
        fxcompress.load(tmp_path / "out", nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU()))


def test_nothing_but_the_norms_changes_at_full_budget(tmp_path: Path) -> None:
    model = network()
    small = fxcompress.compile(model, rules(tmp_path, keep=1.0), BATCHES)
    torch.testing.assert_close(small(BATCHES[0]), model(BATCHES[0]), rtol=1e-4, atol=1e-4)
    assert fxcompress.plan_of(small).model_after.parameters < 0.99 * sum(
        p.numel() for p in model.parameters()
    )


def test_the_metric_sees_through_it(tmp_path: Path) -> None:
    """In K-FAC without damping scaling the outputs changes no truncated weight."""
    text = RULES.replace("{kind: %s}", "{kind: %s, damping: {input: 0.0, output: 0.0}}")
    path = tmp_path / "rules.yaml"
    outputs = []
    for fold in ("true", "false"):
        plain = (text % (0.6, "kfac")).replace("fold_batch_norm: true", f"fold_batch_norm: {fold}")
        path.write_text(plain)
        small = fxcompress.compile(network().double(), path, [b.double() for b in BATCHES])
        outputs.append(small(BATCHES[0].double()))
    torch.testing.assert_close(outputs[0], outputs[1], rtol=1e-5, atol=1e-5)


class Shared(nn.Module):
    """The convolution's value is used beside the norm."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv(x)
        return (h + self.norm(h)).mean((2, 3))


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.norm(self.conv(x)))).mean((2, 3))


@pytest.mark.parametrize(
    ("model", "reason"),
    [
        (Shared(), "read by others than the batch norm"),
        (Twice(), "called several times"),
        (nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), Pooled()), "no batch norm follows"),
        (
            nn.Sequential(
                nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16, track_running_stats=False), Pooled()
            ),
            "no running statistics",
        ),
    ],
)
def test_where_it_is_not_exact_it_is_refused(model: nn.Module, reason: str, tmp_path: Path) -> None:
    with pytest.warns(fxcompress.FxcompressWarning, match=reason):
        small = fxcompress.compile(model.eval(), rules(tmp_path), BATCHES)
    assert not fxcompress.plan_of(small).folded
