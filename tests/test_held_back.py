"""Calibration data that the metric never sees: what is set aside, chosen and measured on it."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.metric import METRICS, Moments
from fxcompress.operators.convolution import ConvShape
from fxcompress.operators.modules import shape_of
from fxcompress.pipeline.agreement import parted
from fxcompress.pipeline.held_back import DAMPING, Division, Narrowed
from fxcompress.plans.plan import HeldBack, Plan, plan_of
from tests.small import data, net, rules

HELD = {"kind": "kfac", "held_back": 0.25}


def compiled(*args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxcompress.compile(*args, **kwargs)


# ---- what is set aside -----------------------------------------------------------------


@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("total", [1, 2, 3, 8, 9, 40])
@pytest.mark.parametrize("share", [0.0, 0.125, 0.5])
def test_every_batch_is_in_one_part(total: int, share: float, known: bool) -> None:
    division = Division(iter(range(total)), total if known else None, share, seed=0)
    training = [*division]
    assert sorted(training + division.held) == [*range(total)]
    assert training == division.places
    assert division.held == division.held_places
    assert training[0] == 0  # the graph is recorded on it
    assert bool(division.held) == (share > 0 and total > 1)
    if known:
        assert division.count == len(training)
        assert len(division.held) == (max(1, int(share * total)) if share and total > 1 else 0)


def test_the_seed_draws() -> None:
    def held(seed: int, total: int | None) -> tuple[int, ...]:
        division = Division(range(64), total, 0.125, seed)
        assert len([*division]) == 56
        return tuple(division.held)

    for total in (64, None):
        assert held(0, total) == held(0, total)
        assert len({held(seed, total) for seed in range(5)}) == 5


def test_the_metric_does_not_see_it() -> None:
    """Whatever is held back, the ranks are those of the other batches alone."""
    batches = data(8)
    division = Division(batches, 8, 0.25, seed=0)
    seen = [*division]
    fixed = {"kind": "kfac", "damping": {"input": 1e-3, "output": 1e-1}}
    whole = plan_of(compiled(net(), rules(metric={**fixed, "held_back": 0.25}), batches))
    alone = plan_of(compiled(net(), rules(metric=fixed), seen))
    assert [s.rank for s in whole.sites] == [s.rank for s in alone.sites]
    assert whole.budget.fitted == pytest.approx(alone.budget.fitted, rel=1e-9)
    assert whole.calibration["batches"] == 6
    assert whole.calibration["held back"] == 2
    assert whole.budget.predicted != alone.budget.predicted


def test_errors_call_batches_by_their_place() -> None:
    for bad in range(1, 8):
        batches = data(8)
        batches[bad] = torch.full_like(batches[bad], torch.nan)
        with pytest.raises(fxcompress.CalibrationError, match=f"batch {bad}\\b"):
            fxcompress.compile(net(), rules(metric=HELD), batches)


# ---- what is measured on it ------------------------------------------------------------


def kl(p: Tensor, q: Tensor) -> Tensor:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("kind", ["kfac", "ekfac", "activation", "diagonal", "elementwise"])
def test_every_compile_measures_the_model(kind: str, inplace: bool) -> None:
    model, batches = net(), data(8)
    division = Division(batches, 8, 0.25, seed=0)
    list(division)
    loaded = rules(0.6, metric={"kind": kind, "held_back": 0.25})
    dense = [model(x).detach() for x in division.held]
    small = compiled(model, loaded, batches, inplace=inplace)
    losses = torch.cat([kl(p, small(x)) for p, x in zip(dense, division.held, strict=True)])
    found = plan_of(small).held_back
    assert found is not None
    assert found.measured == pytest.approx(float(losses.mean()), rel=1e-6)
    assert (found.batches, found.predictions, found.output) == (2, 128, "categorical")
    assert found.error is not None
    assert not small.training
    text = str(fxcompress.diff(model if inplace else net(), small)).splitlines()
    assert text[1].startswith("KL to the dense model 0.") or "e-" in text[1]
    assert "2 batches held back (128 predictions)" in text[1]


@pytest.mark.parametrize("how", [{}, {"rounds": 2, "steps": 2}], ids=["once", "rounds"])
def test_a_model_in_training_mode_is_measured_in_eval_mode(how: dict[str, int]) -> None:
    def dropping(training: bool) -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(24, 48), nn.Dropout(0.5), nn.Linear(48, 10)).train(training)

    loaded = rules(0.6, metric=HELD)
    solver = loaded.rules.solver.model_copy(update=how)
    loaded = replace(loaded, rules=loaded.rules.model_copy(update={"solver": solver}))
    learning, still = (compiled(dropping(mode), loaded, data(8)) for mode in (True, False))
    assert learning.training
    assert plan_of(learning).held_back == plan_of(still).held_back


def test_a_metric_without_data_is_measured_on_the_first_batches() -> None:
    batches = data(6)
    loaded = rules(0.6, metric={"kind": "euclidean", "held_back": 0.25})
    found = plan_of(compiled(net(), loaded, iter(batches))).held_back
    assert found is not None
    assert found.batches == 4


def test_a_loss_of_ones_own_is_measured_by_its_rise() -> None:
    def loss(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1], reduction="none")

    pairs = [(x, (x[:, 0] > 0).long()) for x in data(8)]
    division = Division(pairs, 8, 0.25, seed=0)
    list(division)
    model = net()
    small = compiled(model, rules(0.6, metric=HELD), pairs, loss=loss, forward=lambda m, b: m(b[0]))
    found = plan_of(small).held_back
    assert isinstance(found, HeldBack)
    assert found.output == "loss"
    rises = [loss(small(x[0]), x) - loss(model(x[0]), x) for x in division.held]
    assert found.measured == pytest.approx(float(torch.cat(rises).mean()), abs=2e-6)
    assert str(plan_of(small)).splitlines()[2].startswith("rise of the loss ")


@pytest.mark.parametrize("batches", [1, 4])
def test_nothing_held_back_is_not_zero(batches: int) -> None:
    share = 0.25 if batches == 1 else 0.0
    small = compiled(net(), rules(metric={"kind": "kfac", "held_back": share}), data(batches))
    plan = plan_of(small)
    assert plan.held_back is None
    assert "not measured (no calibration batch was held back)" in str(plan)
    assert plan.damping == DAMPING


# ---- what is predicted by it -----------------------------------------------------------


def random_moments(shape: Any, generator: torch.Generator) -> Moments:
    groups = shape.groups if isinstance(shape, ConvShape) else 1
    m = shape.group_out if isinstance(shape, ConvShape) else shape.out_features
    n = shape.group_in * shape.taps if isinstance(shape, ConvShape) else shape.in_features

    def gram(size: int) -> Tensor:
        x = torch.randn(groups, 3, size, generator=generator, dtype=torch.float64)  # singular
        return x.mT @ x if isinstance(shape, ConvShape) else (x.mT @ x)[0]

    positive = torch.rand(groups, m, n, generator=generator, dtype=torch.float64)
    plain = positive if isinstance(shape, ConvShape) else positive[0]
    return Moments(gram(n), gram(m), plain.mean(-1), plain)


@pytest.mark.parametrize("kind", ["euclidean", "diagonal", "elementwise", "activation", "kfac"])
@pytest.mark.parametrize(
    "module", [nn.Linear(5, 7), nn.Conv2d(4, 6, (3, 2), groups=2), nn.Conv1d(3, 4, 2)]
)
@pytest.mark.parametrize("unit", [1.0, 2.0**40])
def test_the_undamped_loss_is_that_of_the_dense_form(module: Any, kind: str, unit: float) -> None:
    generator = torch.Generator().manual_seed(0)
    shape, metric = shape_of(module), METRICS[kind]
    moments = random_moments(shape, generator)
    change = torch.randn(*shape.canonical(module.weight).shape, generator=generator).double()
    scaled = Moments(
        moments.input, moments.output, moments.weight, moments.entries, (unit, unit, unit)
    )
    flat = change.flatten(2) if isinstance(shape, ConvShape) else change[None]
    groups = range(len(flat))

    def of(moment: Tensor | None, group: int) -> Tensor:
        assert moment is not None
        return moment[group] if isinstance(shape, ConvShape) else moment

    whole, powers = 0.0, {"euclidean": 0, "kfac": 4}.get(kind, 2)
    for group in groups:
        m, n = flat[group].shape
        entries = torch.zeros(m * n, m * n, dtype=torch.float64)
        if kind == "elementwise":
            entries = torch.diag(of(moments.entries, group).flatten())
        else:
            a = of(moments.input, group) if kind in ("activation", "kfac") else torch.eye(n)
            g = torch.eye(m)
            if kind == "kfac":
                g = of(moments.output, group)
            if kind == "diagonal":
                g = torch.diag(of(moments.weight, group))
            entries = torch.kron(g.double(), a.double())
        vector = flat[group].flatten()
        whole += 0.5 * float(vector @ entries @ vector)
    found = metric.undamped_loss(shape, scaled, change)
    assert found == pytest.approx(whole * unit**powers, rel=1e-9)


def test_own_statistics_are_kept_in_float64() -> None:
    """They have no units: squares of inputs of 1e-25 are nothing in float32."""
    own = {"squares": torch.tensor([1e-50, 1e50], dtype=torch.float64)}
    narrow, moments = Narrowed(), Moments(torch.eye(2).double(), own=own)
    kept = narrow(moments)
    assert narrow(moments).input is kept.input  # sites on one input share it
    assert kept.input is not None
    assert kept.input.dtype == torch.float32
    assert torch.equal(kept.own["squares"], own["squares"])


class Wide(nn.Module):
    """More inputs than few batches have rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Linear(96, 96), nn.Linear(96, 96), nn.Linear(96, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.head(torch.tanh(self.two(torch.tanh(self.one(x)))) * 3)
        return out


def wide_data(rows: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(96, 96, generator=generator) / 96**0.5 * torch.linspace(3, 0.1, 96)
    return [torch.randn(8, 96, generator=generator) @ mixing.T for _ in range(rows // 8)]


def test_few_rows_do_not_look_better_than_many() -> None:
    """Fitted losses do: the metric knows no other directions than those that it has seen."""
    model, other = Wide().eval(), torch.cat(wide_data(4096)[-128:])
    fitted, predicted, real = [], [], []
    for rows in (64, 2048):
        loaded = rules(0.6, metric={"damping": {"input": 1e-4, "output": 1e-3}, "held_back": 0.25})
        small = compiled(model, loaded, wide_data(rows))
        budget = plan_of(small).budget
        fitted.append(budget.fitted)
        predicted.append(budget.predicted)
        real.append(float(kl(model(other), small(other)).mean()))
    assert real[0] > 2 * real[1]  # few rows are worse
    assert fitted[0] < fitted[1]  # and pretend to be better
    assert predicted[0] > predicted[1]  # those held back know it
    assert predicted[0] > 20 * fitted[0]


def test_damping_is_chosen_by_what_it_loses_elsewhere() -> None:
    model, other = Wide().eval(), torch.cat(wide_data(4096)[-128:])
    lost: dict[str, float] = {}
    plans: dict[str, Plan] = {}
    for name, damping in {"chosen": {}, "fixed": {"input": 1e-3, "output": 1e-1}}.items():
        loaded = rules(0.6, metric={"damping": damping, "held_back": 0.25})
        small = compiled(model, loaded, wide_data(64))
        lost[name] = float(kl(model(other), small(other)).mean())
        plans[name] = plan_of(small)
    assert plans["fixed"].damping == DAMPING
    assert plans["chosen"].damping[0] > DAMPING[0]
    assert lost["chosen"] < 0.9 * lost["fixed"]
    half = rules(0.6, metric={"damping": {"output": 0.5}, "held_back": 0.25})
    assert plan_of(compiled(model, half, wide_data(64))).damping[1] == 0.5


def test_a_prediction_that_does_not_hold_is_told() -> None:
    plan = plan_of(compiled(net(), rules(0.6, metric=HELD), data(8)))
    predicted = plan.budget.predicted

    def told(times: float, error: float | None, loss_unit: str = plan.loss_unit) -> list[str]:
        scaled = plan.budget.model_copy(update={"predicted": 0.1})
        other = plan.model_copy(update={"budget": scaled, "loss_unit": loss_unit})
        found = HeldBack(
            batches=2, predictions=128, output="categorical", measured=0.1 * times, error=error
        )
        return parted(other, found)

    assert predicted > 0
    assert not told(1.9, None)
    assert not told(0.6, None)
    (note,) = told(2.1, None)
    assert "loses 0.2100 nats per prediction, where the metric predicts 0.1000" in note
    (note,) = told(0.4, 0.001)
    assert "poor guide" in note
    assert not told(2.1, 0.1)  # within its error
    assert not told(5.0, None, "half the squared output error")


def test_a_plan_predicts_what_compile_does() -> None:
    loaded = rules(0.6, metric=HELD)
    planned, made = (
        fxcompress.plan(net(), loaded, data(8)),
        plan_of(compiled(net(), loaded, data(8))),
    )
    assert [s.predicted for s in planned.sites] == [s.predicted for s in made.sites]
    assert planned.budget.predicted == math.fsum(s.predicted for s in planned.sites)
    assert planned.held_back is None


def test_sites_that_the_batches_held_back_do_not_reach_keep_what_was_fitted() -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a, self.b, self.head = nn.Linear(24, 24), nn.Linear(24, 24), nn.Linear(24, 10)

        def forward(self, x: Tensor) -> Tensor:
            side = self.b if x[0, 0] > 100 else self.a
            out: Tensor = self.head(self.a(x).tanh() + side(2 * x).tanh())
            return out

    def batches() -> Iterator[Tensor]:
        for at, x in enumerate(data(3)):
            x[0, 0] = 101.0 if at in (0, 2) else 0.0  # the second one is held back
            yield x

    planned = fxcompress.plan(
        Branches().eval(), rules(0.6, metric=HELD), batches(), examples=[next(batches())]
    )
    (b,) = (site for site in planned.sites if site.name == "b")
    assert b.form is not None
    assert b.predicted > 0
