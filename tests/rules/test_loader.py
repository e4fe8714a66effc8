"""Loading: presets, files, Python values, and locations."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path

import pytest
from pydantic import ValidationError

from fxcompress.rules import Budget, RuleSet, load_rules, parse_rules, preset_names
from fxcompress.rules.language.document import read_document
from tests.rules.fuzz import EVERYTHING

TEXT = """\
version: 1
budget: {keep: 0.8}
metric: {damping: {input: 1.0e-3}}

rules:
  - id: mlp
    match: {node: {op: linear, as: fc, name: "*.mlp.*"}}
    unless:
      - name: "*.0.*"
      - shares_weight_with: embedding
    where: ["fc.in_features >= 256", fc.bias]
    rewrite: {form: pivoted}
  - id: convs
    match: {node: {op: conv2d, as: c, kernel_size: [3, 3]}}
    rewrite: none
"""


def test_locations() -> None:
    loaded = parse_rules(TEXT, "dir/rules.yaml")
    assert loaded.location("mlp") == "dir/rules.yaml:6"
    assert loaded.location("convs") == "dir/rules.yaml:13"
    assert loaded.location("mlp", "where", 0) == "dir/rules.yaml:11:13"
    assert loaded.location("mlp", "where", 1) == "dir/rules.yaml:11:38"
    assert loaded.location("mlp", "unless", 1) == "dir/rules.yaml:10:9"
    assert loaded.location("mlp", "match", "node", "name") == "dir/rules.yaml:7:46"
    with pytest.raises(KeyError):
        loaded.location("nope")


def test_values() -> None:
    rules = parse_rules(TEXT, "r").rules
    mlp, convs = rules.rules
    assert (rules.budget.keep, rules.budget.of, rules.budget.unit) == (0.8, "matched", "parameters")
    assert (rules.metric.damping.input, rules.metric.damping.output) == (1e-3, None)
    assert mlp.match.node is not None
    assert mlp.match.node.name == ("*.mlp.*",)
    assert convs.match.node is not None
    assert convs.match.node.attributes == {"kernel_size": (3, 3)}
    assert convs.rewrite == "none"


def test_everything_is_frozen() -> None:
    loaded = parse_rules(TEXT, "r")
    with pytest.raises(dataclasses.FrozenInstanceError):
        loaded.filename = "x"  # type: ignore[misc]
    with pytest.raises(ValidationError):
        loaded.rules.budget.keep = 0.5  # type: ignore[misc]
    with pytest.raises(TypeError):
        loaded.entries[()] = None  # type: ignore[index]


def test_a_rule_set_made_in_python_is_checked_and_located() -> None:
    made = parse_rules(TEXT, "r").rules
    loaded = load_rules(made)
    assert loaded.rules == made
    assert loaded.location("mlp").startswith("<RuleSet>:")
    assert load_rules(made.model_copy(update={"budget": Budget(keep=0.5)})).rules.budget.keep == 0.5


def test_every_key_survives_the_way_through_python() -> None:
    made = parse_rules(EVERYTHING, "r").rules
    assert load_rules(made).rules == made


SCALARS: dict[str, object] = {
    "no": "no", "on": "on", "Yes": "Yes", "y": "y", "true": True, "False": False, "tRUE": "tRUE",
    "~": None, "": None, "Null": None, "nil": "nil",
    "12": 12, "-5": -5, "+5": 5, "017": 17, "0o17": 15, "0x1F": 31, "0b11": "0b11",
    "1_000": "1_000",
    "1e3": 1000.0, "1e-3": 1e-3, "1.5E+2": 150.0, ".5": 0.5, "5.": 5.0, "e1": "e1", ".": ".",
    "-.inf": -math.inf, ".INF": math.inf, "inf": "inf", "nan": "nan",
    "1:30": "1:30", "2020-01-01": "2020-01-01", "=": "=", "<<": "<<",
}  # fmt: skip


@pytest.mark.parametrize("raw", SCALARS)
def test_scalars_are_those_of_yaml_1_2(raw: str) -> None:
    """As of its core schema, section 10.3.2, which editors follow."""
    found = read_document(f"a: {raw}\n").data["a"]
    assert (found, type(found)) == (SCALARS[raw], type(SCALARS[raw]))


def test_strings_that_look_like_other_scalars_survive_the_way_through_python() -> None:
    words = [*filter(None, SCALARS), "1.0", "a: b", "# c", " d", "*e", "'"]
    rule = {"id": "a", "match": {"node": {"op": "linear"}}, "rewrite": "none"}
    for word in words:
        given = {"budget": {"keep": 1}, "rules": [{**rule, "description": word}]}
        made = RuleSet.model_validate(given)
        assert load_rules(made).rules == made


def test_places_of_any_value() -> None:
    loaded = parse_rules(TEXT, "r.yaml")
    assert loaded.place("budget", "keep") == "r.yaml:2:16"
    assert loaded.place("rules", 0, "unless", 1, "shares_weight_with") == "r.yaml:10:29"
    assert loaded.place("rules", 1, "where", 3) == "r.yaml:13:5"


def test_a_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + TEXT.replace("\n", "\r\n").encode())
    assert load_rules(path).location("convs") == f"{path}:13"
    assert load_rules(str(path)).rules == parse_rules(TEXT, "r").rules


@pytest.mark.parametrize("name", preset_names())
def test_presets_load(name: str) -> None:
    loaded = load_rules(name)
    # A convolution network has few multiply-accumulates that are not in its convolutions.
    assert loaded.rules.budget.keep == (0.6 if name == "convolutional" else 0.8)
    assert loaded.filename.endswith(f"{name}.yaml")
    assert loaded.text.startswith("# ")


def test_presets_that_others_rely_on() -> None:
    assert {"decoder", "encoder", "every-linear"} <= set(preset_names())
