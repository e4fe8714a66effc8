"""A column is one object: it has its cell, its order and its head in whatever table it stands."""

from __future__ import annotations

import dataclasses

import pytest

from fxcompress.plans.units import UNITS
from fxcompress.report import columns, diff_plan, html, table
from fxcompress.report.columns import KEPT, MEASURED, PAGE, TERMINAL, Column
from fxcompress.report.summary import totals_lines
from tests.report.plans import llama, measured
from tests.report.test_html import Page

CALLS = Column(
    "calls of {loss}",
    alike=lambda entry: str(max(site.calls for site in entry.sites)),
    below=lambda entry: str(sum(site.calls for site in entry.sites)),
    order=lambda entry: sum(site.calls for site in entry.sites),
    width=13,
)


def test_a_new_one_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    made = llama(layers=2)
    before = str(made)
    monkeypatch.setattr(table, "TERMINAL", (CALLS, *TERMINAL))
    monkeypatch.setattr(html, "PAGE", (*PAGE, CALLS))
    lines = str(made).splitlines()
    (head,) = [line for line in lines if line.startswith("site ")]
    assert head.split()[1:4] == ["calls", "of", "KL"]
    (row,) = [line for line in lines if line.startswith("  up_proj")]
    assert row.split()[1] == "1"
    assert str(made) != before
    page = Page(diff_plan(made).to_html())
    assert "calls of KL" in page.text
    last = [str(one["data-sort"]).split(" ")[-1] for one in page.all("tr") if "data-sort" in one]
    assert float(last[0]) == 14


def test_every_column_of_a_table_has_cells_there() -> None:
    made = measured(llama(layers=2))
    entry = columns.Entry(made.rewritten, columns.measured_sites(made))
    for column in TERMINAL:
        assert column.alike(entry)
    for column in columns.shown(PAGE, made):
        assert column.below(entry)


def test_columns_that_a_plan_does_not_have_are_left_out() -> None:
    made = llama(layers=1)
    assert MEASURED not in columns.shown(PAGE, made)
    assert MEASURED in columns.shown(PAGE, measured(made))


def test_brief_heads_are_for_the_terminal() -> None:
    made = llama(layers=1)
    assert columns.head(KEPT, made) == "parameters kept"
    assert columns.head(KEPT, made, brief=True) == "kept"
    assert columns.head(dataclasses.replace(KEPT, brief=""), made, brief=True) == "parameters kept"


def test_totals_are_aligned_whatever_a_unit_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNITS["macs"], "text", "multiply-accumulates", raising=False)
    lines = totals_lines(llama(layers=2))
    assert len({line.index("%") for line in lines[1:]}) == 1
