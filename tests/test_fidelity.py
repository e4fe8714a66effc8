"""Measured losses against direct computations, and what is said of them beside predicted ones."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress
from fxcompress import CalibrationError, FxcompressWarning, RewriteError, plan_of
from fxcompress.pipeline.agreement import assess, units
from fxcompress.pipeline.measure import measure
from fxcompress.plans.plan import Fidelity
from tests.report.plans import plan, site
from tests.small import Net, data, net, rules, unchanged

LOW_RANK = {"form": "low_rank"}
GATES = {
    "id": "gates",
    "match": {"group": {"op": "linear", "as": "half", "name": "*.{gate,up}"}},
    "rewrite": {"form": "joint"},
}


class Gated(nn.Module):
    """A gated feed-forward layer that runs twice, with one output layer of two names."""

    def __init__(self, width: int = 12, classes: int = 8) -> None:
        super().__init__()
        self.block = nn.ModuleDict(
            {
                "gate": nn.Linear(width, 2 * width),
                "up": nn.Linear(width, 2 * width),
                "down": nn.Linear(2 * width, width),
            }
        )
        self.out = nn.Linear(width, classes)
        self.alias = self.out

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(2):
            hidden = F.silu(self.block["gate"](x)) * self.block["up"](x)
            x = x + self.block["down"](hidden)
        return self.out(x) + self.alias(torch.tanh(x))


class Pictures(nn.Module):
    """A convolution with a batch norm behind it, and an attention that has to be split."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.attention = nn.MultiheadAttention(12, 2, batch_first=True)
        self.out = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.norm(self.conv(x))).flatten(2).transpose(1, 2)
        return self.out(x + self.attention(x, x, x, need_weights=False)[0])


def wide(model: nn.Module) -> nn.Module:
    return model.double().eval()


def rows(width: int, seed: int, batches: int = 3) -> list[Tensor]:
    return [batch.double() for batch in data(batches, 32, width, seed)]


def gated(traced: bool = False) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = wide(Gated())
    if traced:
        model = fx.symbolic_trace(model)
    names = ["*down", "out", "alias"]
    loaded = rules(0.5, rewrite=LOW_RANK, name=names, more=[GATES], allocation="uniform")
    return model, fxcompress.compile(model, loaded, rows(12, 1))


def pictures() -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = Pictures().double()
    model(torch.randn(16, 3, 6, 6).double())  # running statistics
    model.eval()
    convolution = {
        "id": "conv",
        "match": {"node": {"op": "conv2d"}},
        "rewrite": {"form": "channel", "fold_batch_norm": True},
    }
    loaded = rules(0.5, rewrite=LOW_RANK, more=[convolution], allocation="uniform")
    return model, fxcompress.compile(model, loaded, images(1))


def images(seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(8, 3, 6, 6, generator=generator).double() for _ in range(3)]


def kl(p: Tensor, q: Tensor) -> float:
    """Mean KL of logits (..., classes), written out."""
    p, q = p.detach().softmax(-1), q.detach().softmax(-1)
    return float((p * (p / q).log()).sum(-1).mean())


def direct(model: nn.Module, small: nn.Module, paths: Sequence[str], batch: Tensor) -> float:
    """KL to the model of one in which the weights at some paths are those of the small one."""
    changed = copy.deepcopy(model)
    for path in paths:
        changed.get_submodule(path).weight.data = small.get_submodule(path).weight.detach() + 0
    return kl(model(batch), changed(batch))


# ---- measured values ------------------------------------------------------------------


def test_a_softmax_regression_is_measured_exactly() -> None:
    torch.manual_seed(0)
    model = wide(nn.Sequential(nn.Linear(24, 10)))
    small = fxcompress.compile(model, rules(0.5, rewrite=LOW_RANK), rows(24, 1))
    held_out = rows(24, 2)
    found = measure(model, small, held_out)
    (one,) = found.sites
    means = [kl(model(batch), small(batch)) for batch in held_out]
    assert found.measured == pytest.approx(np.mean(means), rel=1e-9)
    assert one.measured == pytest.approx(found.measured, rel=1e-9)
    assert one.error == pytest.approx(np.std(means, ddof=1) / np.sqrt(3), rel=1e-9)
    assert one.predicted == plan_of(small).sites[0].predicted > 0
    assert (found.batches, found.predictions, found.output) == (3, 96, "categorical")


@pytest.mark.parametrize("traced", [False, True], ids=["modules", "fx graph"])
def test_sites_and_bundles_are_rewritten_one_at_a_time(traced: bool) -> None:
    """Among them a bundle, modules that run twice, and one of two names."""
    model, small = gated(traced)
    held_out = rows(12, 2)
    found = measure(model, small, held_out)
    plain, readable = gated()  # the same factors; only facades tell their weight
    groups = {one.name: one.sites for one in found.sites}
    assert sorted(map(len, groups.values())) == [1, 1, 2]
    for one in found.sites:
        expected = np.mean([direct(plain, readable, one.sites, batch) for batch in held_out])
        assert one.measured == pytest.approx(expected, rel=1e-8)
        entries = [each for each in plan_of(small).sites if each.name in one.sites]
        assert one.predicted == pytest.approx(sum(each.predicted for each in entries))
    whole = np.mean([kl(model(batch), small(batch)) for batch in held_out])
    assert found.measured == pytest.approx(whole, rel=1e-8)
    assert found.singly == pytest.approx(sum(one.measured for one in found.sites))


def test_folded_batch_norms_and_split_attention() -> None:
    model, small = pictures()
    assert plan_of(small).folded
    assert plan_of(small).expanded
    held_out = images(2)
    found = measure(model, small, held_out)
    whole = np.mean([kl(model(batch), small(batch)) for batch in held_out])
    assert found.measured == pytest.approx(whole, rel=1e-8)
    folded, projected = copy.deepcopy(model), copy.deepcopy(model)
    folded.conv, folded.norm = small.conv, nn.Identity()
    queries = projected.attention.in_proj_weight.data[:12]
    queries.copy_(small.attention.q_proj.weight.detach() + 0)
    by_name = {one.name: one.measured for one in found.sites}
    for name, changed in (("conv", folded), ("attention.q_proj", projected)):
        expected = np.mean([kl(model(batch), changed(batch)) for batch in held_out])
        assert by_name[name] == pytest.approx(expected, rel=1e-8)


def test_a_regression_is_measured_in_the_family_of_its_plan() -> None:
    torch.manual_seed(0)
    model = wide(nn.Sequential(nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 6)))
    metric = {"kind": "kfac", "output": "gaussian"}
    small = fxcompress.compile(model, rules(0.5, rewrite=LOW_RANK, metric=metric), rows(24, 1))
    held_out = torch.cat(rows(24, 2))
    found = measure(model, small, [held_out])
    with torch.no_grad():
        expected = 0.5 * (model(held_out) - small(held_out)).square().sum(1).mean()
    assert found.output == "gaussian"
    assert found.measured == pytest.approx(float(expected), rel=1e-9)
    assert found.error is None
    with pytest.warns(FxcompressWarning, match="too high"):
        other = measure(model, small, [held_out], output="categorical")
    assert other.measured == pytest.approx(kl(model(held_out), small(held_out)), rel=1e-9)


def test_several_outputs_add_up() -> None:
    class Two(Net):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            hidden = F.gelu(self.up(x))
            return self.head(self.norm(self.down(hidden))), hidden[:, :3]

    torch.manual_seed(0)
    model = wide(Two())
    kinds: dict[str, Any] = {"0": "categorical", "1": "gaussian"}
    loaded = rules(0.5, rewrite=LOW_RANK, metric={"kind": "kfac", "output": kinds})
    small = fxcompress.compile(model, loaded, rows(24, 1))
    batch = torch.cat(rows(24, 2))
    with pytest.raises(CalibrationError, match="made for several outputs"):
        measure(model, small, [batch])
    found = measure(model, small, [batch], output=kinds)
    with torch.no_grad():
        (logits, values), (q, other) = model(batch), small(batch)
    expected = kl(logits, q) + 0.5 * float((values - other).square().sum(1).mean())
    assert found.measured == pytest.approx(expected, rel=1e-9)
    assert found.output == "categorical, gaussian"


def test_padding_makes_no_prediction() -> None:
    class Tokens(Net):
        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(F.gelu(self.up(x)) @ self.up.weight)

    torch.manual_seed(0)
    model = wide(Tokens())

    def batches(seed: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        mask = torch.rand(8, 4, generator=generator) < 0.6
        return [{"x": torch.randn(8, 4, 24, generator=generator).double(), "attention_mask": mask}]

    loaded = rules(0.5, rewrite=LOW_RANK, name="head")
    small = fxcompress.compile(model, loaded, batches(1))
    (batch,) = batches(2)
    real = batch["attention_mask"]
    found = measure(model, small, [batch])
    assert found.predictions == int(real.sum()) < 32
    assert found.measured == pytest.approx(kl(model(**batch)[real], small(**batch)[real]), rel=1e-9)


def test_batches_of_different_sizes_count_by_their_predictions() -> None:
    model = wide(net())
    small = fxcompress.compile(model, rules(), rows(24, 1))
    whole = torch.cat(rows(24, 2))
    at_once = measure(model, small, [whole])
    parts = measure(model, small, torch.split(whole, [5, 80, 11]))
    assert parts.measured == pytest.approx(at_once.measured, rel=1e-9)
    assert [one.measured for one in parts.sites] == pytest.approx(
        [one.measured for one in at_once.sites], rel=1e-9
    )


# ---- the models -----------------------------------------------------------------------


def test_models_stay_as_they_are_and_the_small_one_gets_the_result(tmp_path: Path) -> None:
    model = net().train()
    small = fxcompress.compile(model, rules(), data())
    before = plan_of(small)
    calls: list[bool] = []

    def forward(called: nn.Module, batch: Tensor) -> Any:
        calls.append(called.training)
        return called(batch)

    with unchanged(model):
        found = measure(model, small, (batch for batch in data(seed=2)), forward=forward)
    assert plan_of(small) == before.model_copy(update={"fidelity": found})
    # Four batches; the dense model, each site and the small one once for each of them.
    assert calls == [False] * 4 * (len(found.sites) + 2)
    assert small.training == small.up.training == model.training
    fxcompress.save(small, tmp_path)
    assert plan_of(fxcompress.load(tmp_path, net())).fidelity == found
    again = measure(model, fxcompress.load(tmp_path, net()), data(seed=2))
    assert again.measured == pytest.approx(found.measured, rel=1e-4)


@pytest.mark.parametrize("traced", [False, True], ids=["modules", "fx graph"])
def test_an_interruption_leaves_no_trace(traced: bool) -> None:
    model, small = gated(traced)

    def interrupted() -> Iterator[Tensor]:
        yield from rows(12, 2, batches=1)
        raise KeyboardInterrupt

    with unchanged(model), unchanged(small), pytest.raises(KeyboardInterrupt):
        measure(model, small, interrupted())
    assert plan_of(small).fidelity is None


def test_a_trained_small_model_is_measured_as_it_is() -> None:
    model, small = gated()
    with torch.no_grad():
        for parameter in small.out.parameters():
            parameter.mul_(1.5)
    (batch,) = rows(12, 2, batches=1)
    found = {one.name: one.measured for one in measure(model, small, [batch]).sites}
    changed = copy.deepcopy(model)
    changed.out.weight.data = small.out.weight.detach() + 0
    changed.out.bias.data = small.out.bias.detach() + 0
    assert found["out"] == pytest.approx(kl(model(batch), changed(batch)), rel=1e-8)


def test_what_cannot_be_measured_is_told() -> None:
    model, small = gated()
    batches = rows(12, 2)
    with pytest.raises(RewriteError, match="it is compressed itself"):
        measure(small, small, batches)
    with pytest.raises(RewriteError, match="made for another model"):
        measure(net(), small, batches)
    with pytest.raises(RewriteError, match="did not come from"):
        measure(model, model, batches)
    with pytest.raises(CalibrationError, match="empty or exhausted"):
        measure(model, small, [])
    with pytest.raises(CalibrationError, match="batches must be an iterable of batches"):
        measure(model, small, batches[0])
    with pytest.raises(CalibrationError, match="the dense model rejected batch 1"):
        measure(model, small, [batches[0], torch.ones(3, 7).double()])
    whole = fxcompress.compile(model, rules(1.0, rewrite=LOW_RANK, name="out"), batches)
    with pytest.raises(RewriteError, match="nothing is rewritten"):
        measure(model, whole, batches)


def test_outputs_that_are_not_finite_are_told() -> None:
    model, small = gated()
    with torch.no_grad():
        small.block["down"].body.up.weight.fill_(torch.inf)
    with pytest.raises(
        CalibrationError, match=r"on batch 0, .* only block\.down rewritten: .* infinite"
    ):
        measure(model, small, rows(12, 2))


# ---- figures and warnings -------------------------------------------------------------


def assessed(
    predicted: Sequence[float],
    measured: Sequence[float],
    whole: float | None = None,
    noise: float = 0.01,
    **options: Any,
) -> Fidelity:
    """Eight batches of a hundred predictions; ``noise`` is the relative spread between them."""
    made = plan(
        [site(f"h.{i}.fc", 8, 8, 2, predicted=p) for i, p in enumerate(predicted)], **options
    )
    spread = 1 + noise * np.where(np.arange(8) % 2, 1.0, -1.0)
    total = sum(measured) if whole is None else whole
    sums = 100 * np.outer(spread, measured)
    return assess(made, sums, 100 * total * spread, np.full(8, 100), "categorical")


def test_mean_and_error_of_batches_of_different_sizes() -> None:
    made = plan([site("fc", 8, 8, 2, predicted=0.5)])
    sums = np.array([[1.0], [2.0], [6.0]])
    found = assess(made, sums, sums[:, 0], np.array([10, 20, 30]), "categorical")
    # 9 nats over 60 predictions; residuals 1 - 1.5, 2 - 3 and 6 - 4.5.
    assert found.measured == pytest.approx(0.15)
    assert found.error == pytest.approx((3 / 2 * (0.25 + 1 + 2.25)) ** 0.5 / 60)
    assert found.ratio == pytest.approx(0.3)


@pytest.mark.parametrize(
    ("predicted", "measured", "expected"),
    [
        ([1, 2, 3, 4], [10, 20, 30, 40], 1.0),
        ([1, 2, 3, 4], [4, 3, 2, 1], -1.0),
        ([1, 2, 3, 4], [1, 3, 2, 4], 0.8),
        # Ranks 1, 2.5, 2.5, 4 against 1, 2, 3, 4: covariance 4.5, variances 4.5 and 5.
        ([1, 2, 2, 4], [1, 2, 3, 4], 4.5 / (4.5 * 5) ** 0.5),
        ([1, 1, 1], [1, 2, 3], None),
        ([1, 2], [1, 2], None),
    ],
)
def test_rank_correlation(
    predicted: list[float], measured: list[float], expected: float | None
) -> None:
    found = assessed(predicted, measured).rank_correlation
    assert found == (None if expected is None else pytest.approx(expected))


SPREAD = [0.001 * 2**i for i in range(12)]
"""Losses of twelve sites, three and a half decades."""


def test_no_warning_where_prediction_and_measurement_agree() -> None:
    assert not assessed(SPREAD, [1.4 * value for value in SPREAD]).warnings


@pytest.mark.parametrize(
    ("found", "text"),
    [
        (assessed(SPREAD, SPREAD[::-1]), "rank the sites differently (correlation -1.00 over 12"),
        (assessed(SPREAD, [v / 5 for v in SPREAD]), "too high, in the median 5.0 times"),
        (assessed(SPREAD, [v * 5 for v in SPREAD]), "too low: measured ones are 5.0 times"),
        (assessed(SPREAD, SPREAD, 3 * sum(SPREAD)), "the whole model loses 12.2850"),
        (assessed(SPREAD, SPREAD, noise=2.0), "12 of 12 sites does not exceed"),
    ],
)
def test_a_warning_says_where_they_part(found: Fidelity, text: str) -> None:
    (warning,) = found.warnings
    assert text in warning


def test_an_order_that_means_nothing_is_no_reason_to_warn() -> None:
    alike = [1.0 + 0.01 * i for i in range(12)]
    assert assessed(alike, alike[::-1]).rank_correlation == pytest.approx(-1)
    assert not assessed(alike, alike[::-1]).warnings
    assert not assessed(SPREAD[:9], SPREAD[8::-1]).warnings  # too few
    noisy = assessed(SPREAD, SPREAD[::-1], noise=2.0)
    assert not any("differently" in warning for warning in noisy.warnings)


def test_other_units_have_no_ratio() -> None:
    found = assessed(SPREAD, [9 * v for v in SPREAD], loss_unit="half the squared weight error")
    assert found.ratio is None
    assert found.rank_correlation == pytest.approx(1)
    assert not found.warnings


def test_warnings_are_given_and_kept() -> None:
    model = wide(nn.Sequential(nn.Linear(24, 3)))
    metric = {"kind": "kfac", "damping": {"output": 100.0}}
    small = fxcompress.compile(model, rules(0.9, rewrite=LOW_RANK, metric=metric), rows(24, 1))
    with pytest.warns(FxcompressWarning, match="predicted losses are too high"):
        found = measure(model, small, rows(24, 2))
    assert "too high" in str(plan_of(small))
    assert found.warnings


def test_units_are_sites_and_bundles_in_order() -> None:
    _, small = gated()
    assert ("block.gate", "block.up") in units(plan_of(small)).values()
    assert [name for those in units(plan_of(small)).values() for name in those] == [
        entry.name for entry in plan_of(small).rewritten
    ]
