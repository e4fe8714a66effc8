"""Several budgets at once, and budgets of single rules, through the whole compiler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.metric import METRICS
from tests.made_up_times import made_up_times


class Net(nn.Module):
    """Early layers have the multiply-accumulates, late ones the parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.early = nn.Conv2d(4, 16, 3, padding=1)
        self.middle = nn.Conv2d(16, 32, 3, stride=2, padding=1)
        self.late = nn.Conv2d(32, 96, 3, stride=2, padding=1)
        self.head = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        h = torch.relu(self.late(torch.relu(self.middle(torch.relu(self.early(x))))))
        return self.head(h.mean((2, 3)))


def setting() -> tuple[Net, list[Tensor]]:
    torch.manual_seed(0)
    return Net().eval(), [torch.randn(8, 4, 16, 16) for _ in range(3)]


def rules(tmp_path: Path, budget: str, early: str = "") -> Path:
    path = tmp_path / "rules.yaml"
    path.write_text(
        f"""
version: 1
budget: {budget}
rules:
  - id: early
    match: {{node: {{op: conv2d, name: "{{early,middle}}"}}}}
    rewrite: {{any_of: [channel, channel_input, spatial, tucker2, pivoted]{early}}}
  - id: rest
    match: {{node: {{op: [conv2d, linear]}}}}
    rewrite: {{any_of: [channel_input, spatial, pivoted]}}
"""
    )
    return path


def total(plan: fxcompress.Plan, unit: str, rule: str | None = None) -> tuple[int, int]:
    sites = [site for site in plan.sites if rule in (None, site.rule)]
    return (
        sum(site.before[unit] for site in sites),
        sum(site.after[unit] for site in sites),
    )


def test_parameters_and_macs_at_once(tmp_path: Path) -> None:
    model, batches = setting()
    both = rules(tmp_path, "[{keep: 0.6}, {keep: 0.5, unit: macs}]")
    small = fxcompress.compile(model, both, batches)
    plan = fxcompress.plan_of(small)
    for unit, keep in (("parameters", 0.6), ("macs", 0.5)):
        before, after = total(plan, unit)
        assert after <= keep * before
    (macs,) = plan.limits
    assert (plan.budget.unit, macs.unit) == ("parameters", "macs")
    assert plan.budget.cost == total(plan, "parameters")[1]
    assert macs.cost == total(plan, "macs")[1]
    assert plan.budget.bound is not None
    assert plan.budget.bound <= plan.budget.fitted
    # Each alone exceeds the other's, or both would not be needed here.
    alone = fxcompress.plan(model, rules(tmp_path, "{keep: 0.6}"), batches)
    before, after = total(alone, "macs")
    assert after > 0.5 * before
    assert alone.budget.predicted <= plan.budget.predicted
    text = str(fxcompress.diff(model, small))
    assert "budget: keep 0.6 of the matched operators' parameters" in text
    assert "and: keep 0.5 of the matched operators' MACs" in text
    torch.testing.assert_close(small(batches[0]).shape, model(batches[0]).shape)


def test_a_budget_of_one_rule(tmp_path: Path) -> None:
    model, batches = setting()
    free = fxcompress.plan(model, rules(tmp_path, "{keep: 0.7}"), batches)
    bound = fxcompress.plan(model, rules(tmp_path, "{keep: 0.7}", ", keep: 0.4"), batches)
    before, after = total(free, "parameters", "early")
    assert after > 0.4 * before
    before, after = total(bound, "parameters", "early")
    assert after <= 0.4 * before
    (limit,) = bound.limits
    assert (limit.rule, limit.keep, limit.dense) == ("early", 0.4, before)
    assert limit.cost == after
    whole, kept = total(bound, "parameters")
    assert kept <= 0.7 * whole
    assert "keep 0.4 of the operators' of rule early parameters" in str(bound)


def test_what_cannot_be_met_together(tmp_path: Path) -> None:
    model, batches = setting()
    path = rules(tmp_path, "[{keep: 0.9}, {keep: 0.001, unit: macs}]")
    with pytest.raises(fxcompress.BudgetError, match=r"keep 0.001 of .* MACs"):
        fxcompress.plan(model, path, batches)
    path = rules(tmp_path, "{keep: 0.9}", ", keep: 0.001")
    with pytest.raises(fxcompress.BudgetError, match="rule early cannot be met"):
        fxcompress.plan(model, path, batches)


@pytest.mark.parametrize(
    ("budget", "words", "message"),
    [
        ("[{keep: 0.6}, {keep: 0.5, unit: macs}]", {"keep": 0.5}, "keep= stands for one budget"),
        ("[{keep: 0.6}, {keep: 0.5, unit: macs}]", {"uniform": True}, "choose allocation: global"),
        (
            "[{keep: 0.6}, {keep: 0.5, unit: macs}]",
            {"unit": "bytes"},
            "unit= stands for one budget, and the rules have several: parameters and macs; change",
        ),
        (
            "[{keep: 0.6}, {keep: 0.5, unit: macs}]",
            {"unit": "bytes", "keep": 0.5},
            "keep= and unit= stand for one budget",
        ),
    ],
)
def test_what_is_for_one_budget_only(
    budget: str, words: dict[str, Any], message: str, tmp_path: Path
) -> None:
    model, batches = setting()
    path = rules(tmp_path, budget)
    if words.pop("uniform", False):
        path.write_text(path.read_text() + "solver: {allocation: uniform}\n")
    with pytest.raises(fxcompress.BudgetError, match=message):
        fxcompress.plan(model, path, batches, **words)


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_on_convolutions_and_an_embedding(metric: str, tmp_path: Path) -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(60, 24)
            self.conv = nn.Conv1d(24, 32, 3, padding=1, groups=2)
            self.head = nn.Linear(32, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.conv(self.words(x).transpose(1, 2)))
            return self.head(h.mean(2))

    torch.manual_seed(0)
    model, batches = Mixed().eval(), [torch.randint(60, (16, 9)) for _ in range(4)]
    path = tmp_path / "rules.yaml"
    path.write_text(
        f"""
version: 1
budget: {{keep: 0.5}}
metric: {{kind: {metric}, fisher: exact}}
rules:
  - {{id: words, match: {{node: {{op: embedding}}}}, rewrite: {{form: embedding}}}}
  - id: rest
    match: {{node: {{op: [conv1d, linear]}}}}
    rewrite: {{any_of: [channel, channel_input, tucker2, low_rank, pivoted]}}
"""
    )
    small = fxcompress.compile(model, path, batches)
    plan = fxcompress.plan_of(small)
    before, after = total(plan, "parameters")
    assert after <= 0.5 * before
    assert sum(p.numel() for p in small.parameters()) == plan.model_after.parameters
    assert {site.op for site in plan.rewritten} >= {"embedding"}
    assert small.words.weight.shape == (60, 24)
    assert bool(small(batches[0]).isfinite().all())


# ---- another unit than that of the rules ----------------------------------------------


def test_another_unit_is_what_the_rules_would_say(tmp_path: Path) -> None:
    model, batches = setting()
    path = rules(tmp_path, "{keep: 0.6}")
    written = rules(tmp_path, "{keep: 0.6, unit: macs}").read_text()
    rules(tmp_path, "{keep: 0.6}")
    asked = fxcompress.plan(model, path, batches, unit="macs")
    path.write_text(written)
    assert asked.sites == fxcompress.plan(model, path, batches).sites
    assert (asked.budget.unit, asked.budget.of, asked.budget.keep) == ("macs", "matched", 0.6)
    both = fxcompress.plan(model, path, batches, unit="bytes", keep=0.7)
    assert (both.budget.unit, both.budget.keep) == ("bytes", 0.7)
    whole, kept = total(both, "bytes")
    assert kept <= 0.7 * whole


def test_everything_that_takes_rules_takes_a_unit(tmp_path: Path) -> None:
    model, batches = setting()
    path = rules(tmp_path, "{keep: 0.7}")
    small = fxcompress.compile(model, path, batches, unit="macs")
    assert fxcompress.plan_of(small).budget.unit == "macs"
    swept = fxcompress.sweep(model, path, batches, keeps=(0.8,), unit="macs")
    assert swept.plans[0.8].budget.unit == "macs"
    trained = fxcompress.ISVT(model, path, batches, steps=1, unit="macs", keep=0.8)
    assert fxcompress.plan_of(trained.finalize()).budget.unit == "macs"
    few = fxcompress.explain(model, path, calibration=batches, unit="macs", keep=0.99)
    many = fxcompress.explain(model, path, calibration=batches, unit="macs", keep=0.5)
    assert str(few) != str(many)


def test_time_is_of_the_matched_operators_whatever_the_rules_say(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made_up_times(monkeypatch, tmp_path)
    model, batches = setting()
    path = rules(tmp_path, "{keep: 0.9, of: model, unit: macs}")
    budget = fxcompress.plan(model, path, batches, unit="latency").budget
    assert (budget.unit, budget.of, budget.keep) == ("latency", "matched", 0.9)
    assert fxcompress.plan(model, path, batches, unit="parameters").budget.of == "model"


@pytest.mark.parametrize(
    ("word", "hint"),
    [
        ("flops", "; did you mean 'macs'?"),
        ("FLOPs", "; did you mean 'macs'?"),
        ("mac", "; did you mean 'macs'?"),
        ("params", "; did you mean 'parameters'?"),
        ("seconds", "; did you mean 'latency'?"),
        ("Bytes", "; did you mean 'bytes'?"),
        ("inches", ""),
        (3, ""),
    ],
)
def test_a_unit_that_is_none(word: Any, hint: str, tmp_path: Path) -> None:
    path = rules(tmp_path, "{keep: 0.9}")
    with pytest.raises(fxcompress.BudgetError) as raised:
        fxcompress.plan(setting()[0], path, setting()[1], unit=word)
    known = "(units: parameters, macs, bytes, latency)"
    assert str(raised.value) == f"unknown unit {word!r}{hint} {known}"


def test_a_budget_that_cannot_be_met_says_what_its_amounts_are_of(tmp_path: Path) -> None:
    model, batches = setting()
    for unit, said in (("macs", True), ("parameters", False)):
        with pytest.raises(fxcompress.BudgetError, match="cannot be met") as raised:
            fxcompress.plan(model, rules(tmp_path, "{keep: 0.001}"), batches, unit=unit)
        assert ("(all MACs are of the recorded batch)" in str(raised.value)) is said
