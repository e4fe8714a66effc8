"""A sweep: one calibration, many budgets, each as if it had been asked for alone."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fxcompress
from fxcompress.cli import app
from fxcompress.cli.sweeping import parse_keeps
from tests.small import data, net, rules

KEEPS = (0.9, 0.6, 0.45)


def counting() -> tuple[list[int], Any]:
    passes: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        passes.append(1)
        out: Tensor = model(batch)
        return out

    return passes, forward


def untimed(plan: fxcompress.Plan) -> fxcompress.Plan:
    return plan.model_copy(update={"seconds": {}})


def test_every_point_is_what_its_budget_gives_alone() -> None:
    found = fxcompress.sweep(net(), rules(), data(), keeps=KEEPS)
    assert [point.keep for point in found.points] == sorted(KEEPS, reverse=True)
    for keep in KEEPS:
        alone = fxcompress.plan(net(), rules(), data(), keep=keep)
        assert untimed(found.plans[keep]) == untimed(alone)
        assert found.plans[keep].seconds.keys() == alone.seconds.keys()
    predicted = [point.plan.budget.predicted for point in found.points if point.plan]
    assert predicted == sorted(predicted)
    assert predicted[0] < predicted[-1]


def test_the_data_is_gone_through_once() -> None:
    passes, forward = counting()
    fxcompress.plan(net(), rules(), data(), forward=forward)
    once = len(passes)
    passes.clear()
    fxcompress.sweep(net(), rules(), data(), keeps=KEEPS, forward=forward)
    assert len(passes) == once


def test_evaluation_of_the_rewritten_models() -> None:
    model, seen = net(), []

    def evaluate(small: nn.Module) -> dict[str, float]:
        seen.append(small)
        size = float(sum(p.numel() for p in small.parameters()))
        first = float(small(data()[0])[0, 0].detach())
        with torch.no_grad():  # what becomes of one model is nothing to the next
            for parameter in small.parameters() if small is not model else ():
                parameter.zero_()
        return {"size": size, "first": first}

    found = fxcompress.sweep(model, rules(), data(), keeps=KEEPS, evaluate=evaluate)
    assert seen[0] is model
    assert found.dense["size"] == sum(p.numel() for p in model.parameters())
    for keep, point in zip(sorted(KEEPS, reverse=True), found.points, strict=True):
        assert point.plan is not None
        assert point.values["size"] == point.plan.model_after.parameters
        alone = fxcompress.compile(net(), rules(), data(), keep=keep)
        assert point.values["first"] == float(alone(data()[0])[0, 0].detach())
        assert untimed(point.plan) == untimed(fxcompress.plan_of(alone))
    for point, small in zip(found.points, seen[1:], strict=True):
        assert fxcompress.plan_of(small) is point.plan


def test_a_budget_that_cannot_be_met_is_a_point_that_says_so() -> None:
    found = fxcompress.sweep(net(), rules(), data(), keeps=(0.5, 0.001))
    first, second = found.points
    assert first.plan is not None
    assert second.plan is None
    with pytest.raises(fxcompress.BudgetError) as alone:
        fxcompress.plan(net(), rules(), data(), keep=0.001)
    assert second.reason == str(alone.value)
    assert "at least" in second.reason
    with pytest.raises(fxcompress.BudgetError, match="cannot be met"):
        fxcompress.sweep(net(), rules(), data(), keeps=(0.001, 0.002))


def test_an_error_of_the_evaluation_is_no_budget_that_cannot_be_met() -> None:
    def evaluate(small: nn.Module) -> float:
        raise fxcompress.BudgetError("of the user's own")

    with pytest.raises(fxcompress.BudgetError, match="of the user's own"):
        fxcompress.sweep(net(), rules(), data(), keeps=(0.5,), evaluate=evaluate)


def test_what_is_evaluated_must_be_numbers_and_the_same_ones() -> None:
    with pytest.raises(TypeError, match="number, or numbers by name, not 'good'"):
        fxcompress.sweep(net(), rules(), data(), keeps=(0.5,), evaluate=lambda m: "good")  # type: ignore[arg-type,return-value]
    names = iter(["a", "b"])
    with pytest.raises(ValueError, match=r"\['a'\] for the dense one, \['b'\] at keep 0.5"):
        fxcompress.sweep(net(), rules(), data(), keeps=(0.5,), evaluate=lambda m: {next(names): 1})


def test_notes_reach_every_plan() -> None:
    found = fxcompress.sweep(
        net(), rules(metric="euclidean"), data(), keeps=(0.8, 0.5), loss=lambda out, batch: out
    )
    for plan in found.plans.values():
        assert ["makes no use of it" in note for note in plan.warnings] == [True]
    assert str(found).count("makes no use of it") == 1


@pytest.mark.parametrize("keeps", [(), (0.5, 0.0), (1.5,), 0.5, (0.5, "0.3"), (float("nan"),)])
def test_keeps_that_are_none(keeps: Any) -> None:
    with pytest.raises(fxcompress.BudgetError, match="keep"):
        fxcompress.sweep(net(), rules(), data(), keeps=keeps)


def test_interrupted_it_returns_what_is_done() -> None:
    calls: list[int] = []

    def evaluate(small: nn.Module) -> float:
        calls.append(1)
        if len(calls) == 3:  # the dense model, the first point, then
            raise KeyboardInterrupt
        return 1.0

    found = fxcompress.sweep(net(), rules(), data(), keeps=KEEPS, evaluate=evaluate)
    assert [point.keep for point in found.points] == [0.9]
    assert not found.complete
    assert "interrupted" in str(found)
    calls[:] = [1]  # now before the first point, when there is nothing to return
    with pytest.raises(KeyboardInterrupt):
        fxcompress.sweep(net(), rules(), data(), keeps=KEEPS, evaluate=evaluate)


def test_progress_counts_the_budgets(capsys: pytest.CaptureFixture[str]) -> None:
    fxcompress.sweep(net(), rules(), data(), keeps=KEEPS, evaluate=lambda m: 1.0, progress=True)
    stages = [line.split()[:2] for line in capsys.readouterr().err.splitlines()]
    assert [name for name, _ in stages][-3:] == ["decompose", "evaluate", "sweep"]
    assert stages[-1] == ["sweep", "3/3"]


def test_the_command(tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    words = ["sweep", "examples/tiny.yaml", "--model", "examples/tiny.py:model"]
    words += ["--data", "examples/tiny.py:data", "--keeps", "0.8:0.4:0.2"]
    run = CliRunner().invoke(app, [*words, "--html", str(page)])
    assert run.exit_code == 0, run.output
    shown = [line.split()[0] for line in run.output.splitlines() if line.strip()]
    assert [first for first in shown if first.startswith("0.")] == ["0.8", "0.6", "0.4"]
    assert all(len(line) <= 100 for line in run.output.splitlines())
    assert page.read_text().startswith("<!doctype html>")
    plain = CliRunner().invoke(app, [*words, "--json"])
    assert [p["keep"] for p in json.loads(plain.output)["points"]] == [0.8, 0.6, 0.4]


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("--keeps", "many", "neither numbers"),
        ("--keeps", "0.9:0.3:0", "neither numbers"),
        ("--keeps", "0.9:nan:0.1", "neither numbers"),
        ("--keeps", "inf:0.3:0.1", "more than 1000 budgets"),
        ("--keeps", "0.9:0.3:1e-9", "more than 1000 budgets"),
        ("--html", "nowhere/page.html", "is not a directory"),
        ("--evaluate", "examples/tiny.py:torch", "no function"),
        ("--evaluate", "examples/tiny.py:nothing", "nothing"),
    ],
)
def test_what_the_command_refuses_before_any_work(option: str, value: str, message: str) -> None:
    words = ["sweep", "examples/tiny.yaml", "--model", "examples/tiny.py:missing"]
    run = CliRunner().invoke(app, [*words, option, value])
    assert run.exit_code == 2
    assert message in " ".join(run.output.replace("│", " ").split())


@pytest.mark.parametrize(
    ("text", "keeps"),
    [
        ("0.9,0.5", [0.9, 0.5]),
        ("0.9:0.6:0.1", [0.9, 0.8, 0.7, 0.6]),
        ("0.6:0.9:0.1", [0.6, 0.7, 0.8, 0.9]),
        ("0.9:0.6:-0.1", [0.9, 0.8, 0.7, 0.6]),
        ("0.9:0.65:0.1", [0.9, 0.8, 0.7]),
        ("0.5:0.5:0.1", [0.5]),
    ],
)
def test_steps(text: str, keeps: list[float]) -> None:
    assert parse_keeps(text) == keeps


def test_the_command_interrupted(tmp_path: Path) -> None:
    (tmp_path / "judge.py").write_text(
        "calls = []\ndef judge(model):\n    calls.append(model)\n"
        "    if len(calls) == 3: raise KeyboardInterrupt\n    return 1.0\n"
    )
    page = tmp_path / "sweep.html"
    words = ["sweep", "examples/tiny.yaml", "--model", "examples/tiny.py:model"]
    words += ["--data", "examples/tiny.py:data", "--evaluate", f"{tmp_path}/judge.py:judge"]
    run = CliRunner().invoke(app, [*words, "--keeps", "0.8,0.6", "--html", str(page)])
    assert run.exit_code == 130
    assert "interrupted" in run.output
    assert "interrupted" in page.read_text()


def test_random_numbers_are_left_alone() -> None:
    model, batches = net(), data()
    before = torch.get_rng_state()
    fxcompress.sweep(model, rules(), batches, keeps=(0.5,))
    assert torch.equal(torch.get_rng_state(), before)
