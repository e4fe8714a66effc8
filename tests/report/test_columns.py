"""A column is one object: it has its cell, its order and its head in whatever table it stands."""

from __future__ import annotations

import pytest

from fxcompress.plans.units import UNITS
from fxcompress.report import columns, diff_plan, table
from fxcompress.report.columns import (
    LOST,
    MEASURED,
    MEASURED_ALONE,
    PAGE,
    TERMINAL,
    Column,
    PageColumn,
)
from fxcompress.report.summary import totals_lines
from tests.report.pages import Page
from tests.report.plans import llama, measured

CALLS = Column("calls of {loss}", lambda entry: str(max(site.calls for site in entry.sites)), 13)
CALLS_ON_PAGE = PageColumn("calls of {loss}", lambda site, plan: site.calls, "count")


def test_a_new_one_is_one_object(monkeypatch: pytest.MonkeyPatch) -> None:
    made = llama(layers=2)
    before = str(made)
    monkeypatch.setattr(table, "TERMINAL", (CALLS, *TERMINAL))
    monkeypatch.setattr(columns, "PAGE", (*PAGE, CALLS_ON_PAGE))
    lines = str(made).splitlines()
    (head,) = [line for line in lines if line.startswith("site ")]
    assert head.split()[1:4] == ["calls", "of", "KL"]
    (row,) = [line for line in lines if line.startswith("  up_proj")]
    assert row.split()[1] == "1"
    assert str(made) != before
    assert Page(diff_plan(made).to_html()).column("calls of KL") == [1] * 14


def test_every_column_of_a_table_has_cells_there() -> None:
    made = measured(llama(layers=2))
    entry = columns.Entry(made.rewritten, columns.measured_sites(made))
    for column in TERMINAL:
        assert column.alike(entry)
    for each in columns.shown_on_page(made):
        assert all(each.value(site, made) is not None for site in made.sites)


def test_columns_that_a_plan_does_not_have_are_left_out() -> None:
    made = llama(layers=1)
    assert MEASURED not in columns.shown(TERMINAL, made)
    assert MEASURED in columns.shown(TERMINAL, measured(made))
    assert MEASURED_ALONE not in columns.shown_on_page(made)
    assert {LOST, MEASURED_ALONE} <= {*columns.shown_on_page(measured(made))}


def test_totals_are_aligned_whatever_a_unit_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(UNITS["macs"], "text", "multiply-accumulates", raising=False)
    lines = totals_lines(llama(layers=2))
    assert len({line.index("%") for line in lines[1:]}) == 1
