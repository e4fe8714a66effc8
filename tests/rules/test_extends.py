"""A rule file that builds on another one: what holds, where it stands, and mistakes."""

from __future__ import annotations

from pathlib import Path

import pytest

import fxcompress
from fxcompress.errors import BudgetError, RuleError
from fxcompress.rules import RuleSet, load_rules, parse_rules, read_rules
from tests.small import data, net

BASE = """\
budget: {keep: 0.8, unit: macs}
metric: {kind: activation, damping: {input: 0.5}}
rules:
  - {id: first, match: {node: {op: linear, as: fc, name: "*up"}}, where: [fc.bias], rewrite: none}
  - {id: second, match: {node: {op: linear, name: "*down"}}, rewrite: {form: pivoted}}
tests:
  - {name: one, graph: {up: {op: linear, input: $x}}, matches: {first: [up]}}
"""
OWN = """\
extends: base.yaml
budget: {keep: 0.5}
metric: {damping: {output: 0.25}}
rules:
  - {id: third, match: {node: {op: linear, name: head}}, rewrite: {form: low_rank}}
  - {id: first, match: {node: {op: linear, as: up}}, where: [up.in_features > 3], rewrite: none}
"""


def write(place: Path, **texts: str) -> Path:
    for name, text in texts.items():
        (place / f"{name}.yaml").write_text(text)
    return place / f"{[*texts][-1]}.yaml"


def test_keys_are_merged_and_rules_replaced_or_appended(tmp_path: Path) -> None:
    path = write(tmp_path, base=BASE, own=OWN)
    loaded = load_rules(path)
    rules = loaded.rules
    assert (rules.budgets[0].keep, rules.budgets[0].unit) == (0.5, "macs")
    assert (rules.metric.kind, rules.metric.damping.input) == ("activation", 0.5)
    assert rules.metric.damping.output == 0.25
    assert [rule.id for rule in rules.rules] == ["first", "second", "third"]
    assert rules.tests == ()  # those of the base are about the base
    base = tmp_path / "base.yaml"
    assert loaded.location("first") == f"{path}:6"
    assert loaded.location("second") == f"{base}:5"
    assert loaded.place("budget", "keep") == f"{path}:2:16"
    assert loaded.place("budget", "unit") == f"{base}:1:27"
    assert loaded.place("rules", 0, "where", 0) == f"{path}:6:62"


def test_it_is_the_file_that_says_all_of_it(tmp_path: Path) -> None:
    """Merging and writing it out by hand give one rule set."""
    by_hand = """\
budget: {keep: 0.5, unit: macs}
metric: {kind: activation, damping: {input: 0.5, output: 0.25}}
rules:
  - {id: first, match: {node: {op: linear, as: up}}, where: [up.in_features > 3], rewrite: none}
  - {id: second, match: {node: {op: linear, name: "*down"}}, rewrite: {form: pivoted}}
  - {id: third, match: {node: {op: linear, name: head}}, rewrite: {form: low_rank}}
"""
    loaded = load_rules(write(tmp_path, base=BASE, own=OWN))
    assert loaded.rules == parse_rules(by_hand, "r").rules
    assert loaded.expressions.keys() == {"first", "second", "third"}


def test_three_files_and_a_preset(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep", lowest="extends: decoder\nmetric: {seed: 7}\n")
    middle = "extends: deep/lowest.yaml\nsolver: {allocation: uniform}\n"
    loaded = load_rules(write(tmp_path, middle=middle, top="extends: middle.yaml\nmemory: 1GB\n"))
    preset = load_rules("decoder")
    assert loaded.rules.rules == preset.rules.rules
    assert (loaded.rules.metric.seed, loaded.rules.memory) == (7, 10**9)
    assert loaded.rules.solver.allocation == "uniform"
    assert loaded.location("stay-dense") == preset.location("stay-dense")


def test_a_rule_set_in_python_builds_on_a_preset() -> None:
    rule = {"id": "mine", "match": {"node": {"op": "linear", "name": "x"}}, "rewrite": "none"}
    made = RuleSet.model_validate({"extends": "encoder", "budget": {"keep": 0.25}, "rules": [rule]})
    loaded = load_rules(made)
    assert loaded.rules.rules[:-1] == load_rules("encoder").rules.rules
    assert loaded.rules.budgets[0].keep == 0.25


@pytest.mark.parametrize(
    ("base", "own", "words"),
    [
        (BASE, "extends: bas.yaml\n", "own.yaml:1:10 error[unreadable]: there is no file"),
        (BASE, "extends: decodr\n", "did you mean 'decoder'?"),
        (BASE, "extends: 3\n", "own.yaml:1:10 error[wrong-type]: extends is a string, not 3"),
        (BASE, "extends: own.yaml\n", "extends itself"),
        (
            "extends: own.yaml\n",
            "extends: base.yaml\n",
            "error[circle]: 'base.yaml' extends itself",
        ),
        ("- a\n", "extends: base.yaml\n", "own.yaml:1:10 error[not-a-mapping]"),
        ("budget: {keep: 2}\nrules: 3\n", "extends: base.yaml\n", "base.yaml:1:16 error[bad-num"),
        ("a: [\n", "extends: base.yaml\n", "base.yaml:2:1 error[yaml-syntax]"),
        (BASE, OWN.replace("0.5", "5"), "own.yaml:2:16 error[bad-number]: keep is 5"),
        (BASE, OWN.replace("up.in_f", "up.on_f"), "own.yaml:6:65 error[unknown-attribute]"),
        (BASE.replace("fc.bias", "fc.bas"), OWN[:19], "base.yaml:4:78 error[unknown-attribute]"),
        (BASE, OWN.replace("third", "first"), "error[duplicate-id]"),
        ("budget: {keep: 0.5}\n", "extends: base.yaml\n", "a rule file needs 'rules'"),
    ],
)
def test_mistakes_say_file_and_line(tmp_path: Path, base: str, own: str, words: str) -> None:
    path = write(tmp_path, base=base, own=own)
    with pytest.raises(RuleError) as caught:
        load_rules(path)
    assert words in str(caught.value)


def test_a_base_may_be_no_device(tmp_path: Path) -> None:
    with pytest.raises(RuleError, match="there is no file"):
        parse_rules("extends: /dev/zero\n", "r.yaml", tmp_path)


# ---- what a caller says instead -------------------------------------------------------


def test_what_is_excluded_stays_dense() -> None:
    plan = fxcompress.plan(net(), "every-linear", data(), exclude=["up", "he*"], progress=False)
    assert [site.name for site in plan.sites] == ["down"]
    reasons = {one.name: one.reason for one in plan.unmatched}
    assert reasons["up"] == reasons["head"] == "kept dense by rule excluded (exclude:3)"


def test_what_is_excluded_wins_over_every_priority() -> None:
    rules = parse_rules(
        "budget: {keep: 0.5}\nrules:\n  - {id: excluded, priority: 9, match: {node: {op: linear}},"
        " rewrite: {form: pivoted}}\n",
        "r.yaml",
    )
    plan = fxcompress.plan(net(), rules, data(), exclude="up", progress=False)
    assert [site.name for site in plan.sites] == ["down", "head"]
    assert plan.unmatched[0].reason == "kept dense by rule excluded-0 (exclude:3)"


def test_an_exclusion_that_hits_nothing_is_told() -> None:
    plan = fxcompress.plan(net(), "every-linear", data(), exclude="hed", progress=False)
    assert [note for note in plan.warnings if "'excluded' matches nothing" in note]


def test_metric_and_seed() -> None:
    plan = fxcompress.plan(
        net(), "every-linear", data(), metric="activation", seed=5, progress=False
    )
    assert (plan.metric, plan.calibration["seed"]) == ("activation", 5)
    assert read_rules("decoder") == load_rules("decoder")


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({"metric": "fisher"}, RuleError, "unknown metric 'fisher'; did you mean 'kfac'?"),
        ({"seed": 1.5}, RuleError, "seed is a whole number, not 1.5"),
        ({"exclude": []}, RuleError, "exclude is a glob"),
        ({"exclude": "{a"}, RuleError, "exclude:5:.* error.bad-glob.*'{' is never closed"),
        ({"keep": "80%"}, BudgetError, "keep must be a number above 0"),
        ({"unit": "flops"}, BudgetError, "did you mean 'macs'"),
    ],
)
def test_wrong_words(given: dict[str, object], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        read_rules("decoder", **given)  # type: ignore[arg-type]
