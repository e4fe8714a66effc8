"""Rules that narrow, by one operator or by a pattern; ``check`` and ``explain`` on them."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress import RuleError
from fxcompress.rules import LoadedRules, parse_rules
from tests.test_narrow import HIDDEN, Gated, N, data, network

HEAD = "budget: {keep: 0.7}\nmetric: {output: gaussian, held_back: 0.0}\nrules:\n"

PATTERN = """
  - id: block
    match:
      inputs: [x]
      nodes:
        gate: {op: linear, input: $x}
        act: {op: silu, input: $gate}
        up: {op: linear, input: $x}
        product: {op: mul, inputs: [$act, $up]}
        down: {op: linear, input: $product}
      outputs: [down]
    where: ["gate.out_features >= WHERE"]
    rewrite: {form: narrow}
"""

READER = """
  - id: reader
    match: {node: {op: linear, name: "*.down"}}
    rewrite: {form: narrow}
"""


def rules(text: str) -> LoadedRules:
    return parse_rules(HEAD + text, "r.yaml")


def pattern(where: int = HIDDEN, rewrite: str = "{form: narrow}") -> LoadedRules:
    return rules(PATTERN.replace("WHERE", str(where)).replace("{form: narrow}", rewrite))


def told(given: LoadedRules, model: nn.Module | None = None) -> str:
    return str(fxcompress.explain(model or network(), given, data()[0]))


@pytest.mark.parametrize("nodes", ["", ", nodes: [gate, up, down]", ", nodes: [down]"])
def test_a_pattern_does_what_the_reader_alone_does(nodes: str) -> None:
    """What is rewritten, to how many channels, and to which weights."""
    by_pattern = fxcompress.compile(network(), pattern(rewrite=f"{{form: narrow{nodes}}}"), data())
    by_reader = fxcompress.compile(network(), rules(READER), data())
    found = [
        [(site.name, site.form, site.rank) for site in fxcompress.plan_of(small).sites]
        for small in (by_pattern, by_reader)
    ]
    assert found[0] == found[1]
    assert {form for _, form, _ in found[0]} == {"narrow"}
    x = data(1)[0]
    assert torch.equal(by_pattern(x), by_reader(x))


def test_a_condition_on_what_makes_the_value() -> None:
    text = told(pattern(where=HIDDEN + 1))
    assert "where: gate.out_features >= 25 is False (gate.out_features = 24)" in text
    assert "together" not in text


def test_with_other_forms_for_the_same_pattern() -> None:
    lost = [
        fxcompress.plan(network(), pattern(rewrite=rewrite), data()).budget.predicted
        for rewrite in ("{form: narrow}", "{form: pivoted}", "{any_of: [narrow, pivoted]}")
    ]
    assert lost[2] <= min(lost[:2]) * (1 + 1e-9)


def test_explain_says_what_changes_together() -> None:
    assert told(rules(READER)).splitlines() == [
        "rule reader (r.yaml:5)",
        "7 linear → 2 name → 2 unless → 2 where → 2 legal → 2 kept",
        "together   {0..1}.down (2)  narrow: with gate and up      r.yaml:5",
        'rejected   2                name does not match "*.down"  r.yaml:6:38',
    ]
    text = told(pattern())
    assert "near miss" not in text
    assert "together   {0..1}.down (2)  narrow: with gate and up" in text


def test_explain_tells_a_form_that_is_left_out_from_a_near_miss() -> None:
    every = "  - {id: a, match: {node: {op: linear}}, rewrite: {any_of: [narrow, pivoted]}}\n"
    found = fxcompress.explain(network(), rules(every), data()[0])
    (funnel,) = (line for line in str(found).splitlines() if "→" in line)
    assert funnel.endswith("7 legal → 7 kept")
    assert "left out   2" in str(found)
    assert "near miss" not in str(found)
    (rule,) = found.to_json()["rules"]
    assert [one["paths"] for one in rule["left_out"]] == [["2"]]
    assert [one["paths"] for one in rule["together"]] == [["{0..1}.down"]]
    only = every.replace("any_of: [narrow, pivoted]", "form: narrow")
    text = told(rules(only))
    assert "7 where → 6 legal → 6 kept" in text
    assert "near miss  2" in text


class Leaking(Gated):
    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h) + h.sum(-1, keepdim=True)


def test_a_pattern_that_nothing_can_rewrite_is_not_counted() -> None:
    model = nn.Sequential(Leaking(), nn.Linear(N, N)).double().eval()
    text = told(
        rules(PATTERN.replace("WHERE", "1").replace("outputs: [down]", "outputs: [product, down]")),
        model,
    )
    assert "1 where → 0 legal → 0 kept" in text
    assert "reads the value of" in text


@pytest.mark.parametrize("forms", ["{form: narrow}", "{any_of: [joint, narrow]}"])
def test_check_refuses_a_group(forms: str) -> None:
    with pytest.raises(RuleError) as caught:
        rules(f"  - {{id: a, match: {{group: {{op: linear}}}}, rewrite: {forms}}}\n")
    assert "narrow is for a value that one operator reads; a group shares its value" in str(
        caught.value
    )
    assert 'match what reads the value: node: {op: linear, name: "*.down_proj"}' in str(
        caught.value
    )


def test_check_refuses_a_template_of_what_makes_a_value_and_what_reads_it() -> None:
    text = """
  - id: a
    match:
      inputs: [x]
      nodes:
        up: {op: linear, input: $x}
        act: {op: gelu, input: $up}
        down: {op: linear, input: $act}
    rewrite:
      graph:
        small: {op: linear, input: $x, weight: joint.right}
        large: {op: linear, input: $small, weight: up.left}
        out: {op: linear, input: $small, weight: down.left}
      outputs: {up: large, down: out}
"""
    with pytest.raises(RuleError) as caught:
        rules(text)
    assert "up, down read different values ($x, $act)" in str(caught.value)
    assert "get smaller together with 'form: narrow'" in str(caught.value)
