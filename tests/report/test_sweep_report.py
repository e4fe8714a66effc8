"""A sweep as text, page and JSON, from plans made up for it."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import pytest

from fxcompress.plans.plan import Plan
from fxcompress.report.plot import Plot
from fxcompress.report.sweep import HEIGHT, WIDTH, Point, Sweep
from tests.report.pages import Page
from tests.report.plans import llama

REASON = "the budget cannot be met: these rules need at least 9,999 (keep: 0.0369); raise keep"


def planned(keep: float, predicted: float, **changed: Any) -> Plan:
    made = llama(layers=2, rewritten=True)
    budget = made.budget.model_copy(update={"keep": keep, "predicted": predicted})
    return made.model_copy(update={"budget": budget, **changed})


def made(
    values: Mapping[float, Mapping[str, float]], dense: Mapping[str, float], complete: bool = True
) -> Sweep:
    """Predicted losses are 1e-3, 1e-2, ... by falling keep; below 0.1 it is impossible."""
    points = [
        Point(keep, planned(keep, 10.0 ** (at - 3)), values[keep])
        if keep >= 0.1
        else Point(keep, None, reason=REASON)
        for at, keep in enumerate(values)
    ]
    return Sweep(tuple(points), dense, complete)


TWO = {
    0.9: {"a<b": 0.5, "perplexity": 20.0},
    0.6: {"a<b": 0.25, "perplexity": 2e4},
    0.3: {"a<b": 0.0, "perplexity": math.inf},
    0.05: {},
}
DENSE = {"a<b": 0.75, "perplexity": 10.0}


@pytest.fixture(scope="module")
def swept() -> Sweep:
    return made(TWO, DENSE)


def plot(values: Mapping[float, float], dense: float) -> Plot:
    """Of a measured value alone."""
    return made({keep: {"x": value} for keep, value in values.items()}, {"x": dense}).plots()[1]


def texts(ticks: tuple[tuple[float, str], ...]) -> list[str]:
    return [text for _, text in ticks]


def test_a_row_for_every_budget(swept: Sweep) -> None:
    lines = str(swept).splitlines()
    assert all(len(line) <= 100 for line in lines)
    head, dense, *rows = lines[4:9]
    assert head.split()[-2:] == ["a<b", "perplexity"]
    assert dense.split()[0] == "dense"
    assert dense.split()[-2:] == ["0.75", "10"]
    assert [row.split()[0] for row in rows] == ["0.9", "0.6", "0.3"]
    assert [row.split()[-3:] for row in rows] == [
        ["0.0010", "0.5", "20"],
        ["0.0100", "0.25", "20000"],
        ["0.1000", "0", "inf"],
    ]
    size = swept.plans[0.9].model_after.parameters
    assert f"{size:,}" in rows[0]
    ends = {len(line) for line in (head, dense, *rows)}
    assert len(ends) == 1  # columns are aligned to the right


def test_what_is_impossible_says_what_is_possible(swept: Sweep) -> None:
    assert re.search(r"^ *0\.05  +impossible$", str(swept), flags=re.MULTILINE)
    assert f"keep 0.05: {REASON}" in " ".join(str(swept).split())


def test_times_are_shown_where_they_are_the_budget() -> None:
    plan = planned(0.5, 0.1)
    budget = {"unit": "latency", "cost": 0.0123, "dense": 0.02}
    plan = plan.model_copy(update={"budget": plan.budget.model_copy(update=budget)})
    lines = str(Sweep((Point(0.5, plan),), {})).splitlines()
    assert lines[1].startswith("keep is of the measured time of")
    assert [re.findall(r"\d\S* ms", line) for line in lines[5:7]] == [["20 ms"], ["12.3 ms"]]
    assert " time " not in str(made({0.5: {}}, {}))


def test_warnings_are_told_once() -> None:
    plans = [planned(keep, 0.1, warnings=("beware", f"of {keep}")) for keep in (0.9, 0.8)]
    found = Sweep(tuple(Point(plan.budget.keep, plan) for plan in plans), {})
    assert found.warnings == ("beware", "of 0.9", "of 0.8")
    assert str(found).count("beware") == 1


def test_json(swept: Sweep) -> None:
    plain = swept.to_json()
    assert json.loads(json.dumps(plain, allow_nan=False)) == plain
    first, _, third, last = plain["points"]
    assert first["values"] == TWO[0.9]
    assert third["values"] == {"a<b": 0.0, "perplexity": None}
    assert last == {"keep": 0.05, "reason": REASON}
    plan = swept.plans[0.9]
    assert first["rewritten"] == len(plan.rewritten)
    totals = {(one["unit"], one["of"]): one["after"] for one in first["totals"]}
    assert totals["bytes", "model"] == plan.model_after.bytes
    assert totals["macs", "matched"] == sum(site.after.macs for site in plan.sites)


def test_the_page_needs_nothing_else(swept: Sweep) -> None:
    source = swept.to_html()
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)|url\(|@import", source)
    page = Page(source)
    assert not any("src" in one or "href" in one for _, one in page.elements)
    data = page.data
    assert [len(plot["marks"]) for plot in data["plots"]] == [3, 3, 2]
    assert data["plots"][1]["title"] == "a<b"
    assert "<b" not in source.replace("<body", "")
    assert data["plots"][2]["note"] == "not finite at keep 0.3"
    assert data["plots"][0]["x"]["title"].startswith("keep, of the parameters")


def test_the_table_of_the_page_is_that_of_the_text(swept: Sweep) -> None:
    data = Page(swept.to_html()).data
    lines = str(swept).splitlines()
    assert " ".join(data["heads"]).split() == lines[4].split()
    assert [" ".join(row).split() for row in data["rows"]] == [
        line.split() for line in lines[5 : 5 + len(data["rows"])]
    ]
    first = swept.plans[0.9].sites[0]
    assert data["ranks"]["names"][0] == first.name
    assert data["ranks"]["ranks"][0][0] == f"pivoted {first.rank} of {first.full_rank}"
    assert any(note.startswith(f"keep 0.05: {REASON}") for note in data["notes"])


def test_losses_are_drawn_by_decades(swept: Sweep) -> None:
    predicted = swept.plots()[0]
    ticks = ["0.001", "0.002", "0.005", "0.01", "0.02", "0.05", "0.1"]
    assert texts(predicted.y.ticks) == ticks
    assert dict(predicted.y.ticks)[HEIGHT / 2] == "0.01"
    places = [(predicted.x.place(mark.x), predicted.down(mark.y)) for mark in predicted.marks]
    assert places == [(480.0, HEIGHT), (240.0, HEIGHT / 2), (0.0, 0.0)]
    assert predicted.x.ticks[0] == (0.0, "30%")
    assert predicted.x.ticks[-1] == (float(WIDTH), "100%")
    assert predicted.lines == ()


def test_measured_values_are_drawn_evenly_unless_they_explode(swept: Sweep) -> None:
    _, even, wide = swept.plots()
    assert texts(even.y.ticks) == ["0", "0.2", "0.4", "0.6", "0.8"]
    (level,) = even.lines
    assert level.y == (0.75, 0.75)
    assert even.down(0.75) == round(HEIGHT * (1 - 0.75 / 0.8), 1)
    assert texts(wide.y.ticks) == ["10", "100", "1000", "10000", "100000"]
    assert wide.down(wide.lines[0].y[0]) == HEIGHT
    assert [mark.text for mark in wide.marks] == ["keep 0.9: 20", "keep 0.6: 20000"]
    assert wide.note == "not finite at keep 0.3"


@pytest.mark.parametrize("value", [0.0, 2.0, -3.0, 1e17, 1e-300])
def test_values_that_are_all_alike(value: float) -> None:
    found = plot({0.9: value, 0.5: value}, value)
    heights = {found.down(mark.y) for mark in found.marks}
    assert heights == {found.down(found.lines[0].y[0])}
    assert all(0 <= y <= HEIGHT for y in heights)
    assert len(found.y.ticks) == len({*texts(found.y.ticks)}) >= 2


def test_what_cannot_be_drawn_is_left_out() -> None:
    nothing = made({0.9: {"x": math.nan}}, {"x": math.nan})
    assert [each.title for each in nothing.plots()] == ["predicted KL"]
    assert "nan" in str(nothing)
    dense = plot({0.9: 1.0, 0.5: 2.0}, math.nan)
    assert dense.lines == ()
    assert len(dense.marks) == 2
    lossless = Sweep((Point(1.0, planned(1.0, 0.0)),), {})
    assert lossless.plots() == ()
    assert Page(lossless.to_html()).data["plots"] == []


def test_a_loss_of_zero_stands_at_the_lower_end() -> None:
    points = (Point(1.0, planned(1.0, 0.0)), Point(0.5, planned(0.5, 0.01)))
    (predicted,) = Sweep(points, {}).plots()
    first = predicted.marks[0]
    assert (predicted.x.place(first.x), predicted.down(first.y)) == (WIDTH, HEIGHT)
    assert first.text == "keep 1: 0"
