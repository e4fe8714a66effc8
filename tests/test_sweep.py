"""A sweep: one calibration, many budgets, each as if it had been asked for alone."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

import fxcompress
from fxcompress.cli import app
from tests.small import data, net, rules

KEEPS = (0.9, 0.6, 0.45)


def counting() -> tuple[list[int], Any]:
    passes: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        passes.append(1)
        out: Tensor = model(batch)
        return out

    return passes, forward


def test_every_point_is_what_its_budget_gives_alone() -> None:
    found = fxcompress.sweep(net(), rules(), data(), keeps=KEEPS)
    assert [point.keep for point in found.points] == sorted(KEEPS, reverse=True)
    for keep in KEEPS:
        alone = fxcompress.plan(net(), rules(), data(), keep=keep)
        assert found.plans[keep].sites == alone.sites
        assert found.plans[keep].budget == alone.budget
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
        return {"size": size, "first": float(small(data()[0])[0, 0])}

    found = fxcompress.sweep(model, rules(), data(), keeps=KEEPS, evaluate=evaluate)
    assert seen[0] is model
    assert found.dense["size"] == sum(p.numel() for p in model.parameters())
    for keep, point in zip(sorted(KEEPS, reverse=True), found.points, strict=True):
        assert point.plan is not None
        assert point.values["size"] == point.plan.model_after.parameters
        alone = fxcompress.compile(net(), rules(), data(), keep=keep)
        assert point.values["first"] == float(alone(data()[0])[0, 0])
    assert "size" in str(found)


def test_a_budget_that_cannot_be_met_is_a_point_that_says_so() -> None:
    found = fxcompress.sweep(net(), rules(), data(), keeps=(0.5, 0.001))
    first, second = found.points
    assert first.plan is not None
    assert second.plan is None
    assert "cannot be met" in second.reason
    assert "cannot be met" in str(found)
    with pytest.raises(fxcompress.BudgetError, match="cannot be met"):
        fxcompress.sweep(net(), rules(), data(), keeps=(0.001, 0.002))


@pytest.mark.parametrize("keeps", [(), (0.5, 0.0), (1.5,)])
def test_keeps_that_are_none(keeps: tuple[float, ...]) -> None:
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


class Page(HTMLParser):
    """Collects tags, and what they refer to outside."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[str] = []
        self.outside: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.outside += [str(value) for key, value in attrs if key in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_page_and_the_json() -> None:
    found = fxcompress.sweep(
        net(), rules(), data(), keeps=KEEPS, evaluate=lambda m: {"a<b": 0.5, "c": 1.0}
    )
    page = Page()
    page.feed(found.to_html())
    assert not page.open
    assert not page.outside
    assert page.tags.count("svg") == 3
    assert page.tags.count("circle") == 3 * len(KEEPS)
    assert "a&lt;b" in found.to_html()
    plain = json.loads(json.dumps(found.to_json()))
    assert [point["keep"] for point in plain["points"]] == sorted(KEEPS, reverse=True)
    assert plain["points"][0]["values"] == {"a<b": 0.5, "c": 1.0}
    assert plain["points"][0]["after"]["parameters"] == found.plans[0.9].model_after.parameters


def test_places_on_the_plot() -> None:
    found = fxcompress.sweep(net(), rules(), data(), keeps=KEEPS, evaluate=lambda m: 2.0)
    predicted, value = found.curves()
    heights = [y for _, y, _ in predicted.marks]
    assert heights == sorted(heights, reverse=True)  # loss rises as less is kept
    exponents = [float(text) for _, text in predicted.rows]
    assert all(math.log10(each).is_integer() for each in exponents)
    assert value.dense == value.marks[0][1]


def test_the_command(tmp_path: Path) -> None:
    page = tmp_path / "sweep.html"
    words = ["sweep", "examples/tiny.yaml", "--model", "examples/tiny.py:model"]
    words += ["--data", "examples/tiny.py:data", "--keeps", "0.8:0.4:0.2"]
    run = CliRunner().invoke(app, [*words, "--html", str(page)])
    assert run.exit_code == 0, run.output
    shown = [line.split()[0] for line in run.output.splitlines() if line.strip()]
    assert [first for first in shown if first.startswith("0.")] == ["0.8", "0.6", "0.4"]
    assert all(len(line) <= 120 for line in run.output.splitlines())
    assert page.read_text().startswith("<!doctype html>")
    plain = CliRunner().invoke(app, [*words, "--json"])
    assert [p["keep"] for p in json.loads(plain.output)["points"]] == [0.8, 0.6, 0.4]
    wrong = CliRunner().invoke(app, [*words[:-1], "many"])
    assert wrong.exit_code == 2
    assert "neither numbers" in wrong.output


def test_random_numbers_are_left_alone() -> None:
    model, batches = net(), data()
    before = torch.get_rng_state()
    fxcompress.sweep(model, rules(), batches, keeps=(0.5,))
    assert torch.equal(torch.get_rng_state(), before)
