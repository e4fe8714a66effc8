"""Where many positions make one prediction: the trace of the Fisher, against dense float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.metric import METRICS, calibrate
from fxcompress.metric import pooled as module
from fxcompress.metric.pooled import trace
from fxcompress.rules import parse_rules
from tests.metric.test_moments import target


class Pooled(nn.Module):
    """Layers before a mean over (real) positions, one of them called twice, and one after it."""

    def __init__(self, *, pool: bool = True, n: int = 5) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.twice, self.last = nn.Linear(n, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.pool = pool

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        h = torch.tanh(self.twice(torch.tanh(self.twice(self.first(x)))))
        if self.pool and attention_mask is not None:
            real = attention_mask.to(h.dtype)[..., None]
            h = (h * real).sum(1) / real.sum(1)
        elif self.pool:
            h = h.flatten(1, -2).mean(1)
        out: Tensor = self.last(h)
        return out


NAMES = ("first", "twice", "last")
CALLS = {"first": 1, "twice": 2, "last": 1}


def cross_entropy(output: Tensor, batch: object) -> Tensor:
    classes = torch.arange(output[..., 0].numel()) % 3
    return F.cross_entropy(output.flatten(0, -2), classes, reduction="none")


@pytest.mark.parametrize("kind", ["plain", "padded", "images"])
def test_the_trace_is_that_of_the_fisher(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PROBES", 4000)
    model = Pooled().double()
    data = 0.3 * torch.randn(6, 12, 5, dtype=torch.float64) + torch.ones(6, 1, 5).double()
    given: dict[str, Tensor] = {"x": data.unflatten(1, (3, 4)) if kind == "images" else data}
    if kind == "padded":
        lengths = torch.tensor([12, 3, 5, 12, 1, 7])
        given["attention_mask"] = (torch.arange(12) < lengths[:, None]).long()
    sites = [target(model, name, calls=CALLS[name]) for name in NAMES]
    # Every batch has other probes: two of them.
    found = calibrate(model, sites, [given, given], METRICS["kfac"], loss=cross_entropy).moments
    plain = calibrate(model, sites, [given], METRICS["ekfac"], loss=cross_entropy).moments
    losses = cross_entropy(model(**given), None)
    for name in NAMES:
        weight = model.get_submodule(name).weight
        assert isinstance(weight, Tensor)
        gradients = [torch.autograd.grad(one, weight, retain_graph=True)[0] for one in losses]
        true = float(torch.stack(gradients).square().sum()) / 6
        a, g, unscaled = found[name].input, found[name].output, plain[name].output
        assert a is not None
        assert g is not None
        assert unscaled is not None
        scale = trace(g) / trace(unscaled)
        torch.testing.assert_close(g, unscaled * scale)
        if name == "last":  # one position a sample
            assert scale == pytest.approx(1, rel=1e-14)  # two equal batches, summed
        else:  # 24,000 products, all of much the same gradient: a few per cent
            assert trace(a) * trace(g) == pytest.approx(true, rel=0.1)
            assert scale > 1.5


def test_positions_that_predict_by_themselves_are_left_as_they_are() -> None:
    model, data = Pooled(pool=False).double(), torch.randn(6, 7, 5, dtype=torch.float64)
    sites = [target(model, name, calls=CALLS[name]) for name in NAMES]
    found, plain = (
        calibrate(model, sites, [data, data], METRICS[kind]).moments for kind in ("kfac", "ekfac")
    )
    for name in NAMES:
        assert torch.equal(found[name].output, plain[name].output)  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(7, 5), (1, 5), (7, 7)])
def test_trace_of_any_kind_of_moment(shape: tuple[int, int]) -> None:
    rows = torch.randn(*shape, dtype=torch.float64)
    whole = rows.T @ rows
    assert trace(whole) == pytest.approx(float(rows.square().sum()))
    assert trace(whole.diagonal()) == pytest.approx(trace(whole))
    if shape[0] < shape[1]:
        assert trace(rows) == pytest.approx(trace(whole))


def test_predictions_before_and_after_a_mean_are_on_one_scale() -> None:
    """Before it they were too low by the number of positions, where these are much alike."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.pre = nn.Sequential(nn.Linear(8, 24), nn.ReLU(), nn.Linear(24, 24), nn.ReLU())
            self.post = nn.Sequential(nn.Linear(24, 24), nn.ReLU(), nn.Linear(24, 5))

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.post(self.pre(x).mean(1))
            return out

    def data(seed: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        own = torch.randn(128, 1, 8, generator=generator)
        return own + 0.2 * torch.randn(128, 50, 8, generator=generator)

    rules = parse_rules(
        "budget: {keep: 0.5, of: matched}\n"
        "metric: {kind: kfac, damping: {input: 1.0e-3, output: 1.0e-3}}\n"
        "solver: {allocation: uniform}\n"
        "rules: [{id: r, match: {node: {op: linear}}, rewrite: {form: low_rank}}]",
        "r.yaml",
    )
    model = Net()
    small = fxcompress.compile(model, rules, [data(seed) for seed in range(4)], progress=False)
    fidelity = fxcompress.measure(model, small, [data(9)])
    ratios = {site.name: site.measured / site.predicted for site in fidelity.sites}
    assert all(0.3 < ratio < 3 for ratio in ratios.values()), ratios
