"""Units of budgets: each is known to rules, plans and reports from its class alone."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from torch import nn

from fxcompress.forms import LinearShape, find_form, fit
from fxcompress.plans.plan import ZERO, Plan, Size, total_size
from fxcompress.plans.units import COUNTED, UNITS
from fxcompress.report import diff_plan
from fxcompress.rules.language.schema import RuleSet
from fxcompress.rules.language.settings import Budget
from tests.report.plans import llama


def test_rule_files_know_the_words() -> None:
    (words,) = [
        found["enum"]
        for name, found in RuleSet.model_json_schema()["$defs"]["Budget"]["properties"].items()
        if name == "unit"
    ]
    assert words == list(UNITS)
    for word in UNITS:
        assert Budget.model_validate({"keep": 0.5, "unit": word}).unit == word
    with pytest.raises(ValidationError, match="'parameters', 'macs'"):
        Budget.model_validate({"keep": 0.5, "unit": "inches"})


def test_what_is_measured_is_so_of_matched_operators_only() -> None:
    for word in UNITS.keys() - {unit.word for unit in COUNTED}:
        with pytest.raises(ValidationError, match=f"{word} is measured for the matched operators"):
            Budget.model_validate({"keep": 0.5, "unit": word, "of": "model"})


def test_amounts() -> None:
    assert UNITS["macs"].amount(884_736) == "884,736"
    assert UNITS["macs"].named(884_736) == "884,736 MACs"
    assert UNITS["latency"].amount(0.0123) == UNITS["latency"].named(0.0123) == "12.3 ms"


@pytest.mark.parametrize("unit", COUNTED, ids=lambda unit: unit.word)
@pytest.mark.parametrize("bias", [False, True])
def test_a_form_costs_what_its_layers_do(unit: Any, bias: bool) -> None:
    """``low_rank`` is two linear layers, the bias in the second; heads of ``joint`` are one."""
    rank, rows = 3, 7
    dense, down, up = (
        LinearShape(n, m, b, rows=rows)
        for n, m, b in ((24, 16, bias), (24, rank, False), (rank, 16, bias))
    )
    ranks = np.array([rank])
    apart = unit.of_operator(down) + unit.of_operator(up)
    assert unit.of_form(fit(find_form("low_rank"), [dense]), ranks) == [apart]
    other = LinearShape(24, 8, bias, rows=rows)
    joint = fit(find_form("joint"), [dense, other])
    heads = [unit.of_operator(LinearShape(rank, m, bias, rows=rows)) for m in (16, 8)]
    assert unit.of_form(joint, ranks) == [unit.of_operator(down) + sum(heads)]
    assert unit.of_head(nn.Linear(rank, 8, bias=bias), other) == heads[1]
    assert unit.of_operator(dense) > 0


def test_sizes_are_by_unit() -> None:
    size = Size(parameters=1, macs=20, bytes=4)
    assert [size[word] for word in ("parameters", "macs", "bytes")] == [1, 20, 4]
    assert (size.parameters, size.macs, size.bytes) == (1, 20, 4)
    assert repr(size) == "Size(parameters=1, macs=20, bytes=4)"
    assert size + size - size == total_size([size]) == size
    assert total_size([]) == ZERO
    assert Size.model_validate_json(size.model_dump_json()) == size
    assert json.loads(size.model_dump_json()) == {"parameters": 1, "macs": 20, "bytes": 4}
    for wrong in ({"macs": 1}, {"parameters": 1, "inches": 2}, {"parameters": 2**63}):
        with pytest.raises(ValidationError):
            Size.model_validate(wrong)


def sizes(plain: Any) -> Iterator[dict[str, int]]:
    """All sizes of a plan."""
    yield from (plain["model_before"], plain["model_after"])
    for each in plain["sites"]:
        yield from (each["before"], each["after"])


def test_a_plan_of_before_a_unit_was_known_is_read_and_shown() -> None:
    plain = json.loads(llama(layers=2).model_dump_json())
    for size in sizes(plain):
        del size["macs"]
    old = Plan.model_validate(plain)
    assert [unit.word for unit in old.model_before.units] == ["parameters", "bytes"]
    diff = diff_plan(old)
    assert "MACs" not in str(diff) + str(old) + diff.to_html()
    assert {total["unit"] for total in diff.to_json()["totals"]} == {"parameters", "bytes"}


def test_a_plan_is_in_the_same_units_throughout() -> None:
    plain = json.loads(llama(layers=1).model_dump_json())
    del next(sizes(plain))["macs"]
    with pytest.raises(ValidationError, match="not all sizes are in the same units"):
        Plan.model_validate(plain)
    for size in sizes(plain):
        size.pop("macs", None)
    plain["budget"]["unit"] = "macs"
    with pytest.raises(ValidationError, match="no size is in the unit of a budget"):
        Plan.model_validate(plain)
