"""The JSON Schema: shipped, complete, and of one mind with the loader."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from fxcompress.forms.words import FormWord, add_word, form_words
from fxcompress.metric.words import metric_words
from fxcompress.rules import RuleSet, json_schema, parse_rules
from fxcompress.rules.language.completion import SHIPPED
from fxcompress.rules.language.vocabulary import ALL_OPERATORS, OPERATORS
from tests.rules.fuzz import EVERYTHING, ROOT

FILES = sorted([*ROOT.glob("rules/*.yaml"), *ROOT.glob("examples/*.yaml")])
MODELS = json_schema()["$defs"]


VALIDATOR = jsonschema.Draft202012Validator(json_schema())


def test_the_shipped_file_is_what_the_code_gives() -> None:
    # In a process of its own: other tests may have registered forms.
    code = "import fxcompress.cli as c; c.rule_files.schema()"
    made = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert SHIPPED.read_text(encoding="utf-8") == made.stdout, "run: fxcompress schema > " + str(
        SHIPPED.relative_to(ROOT)
    )


def test_it_is_a_schema() -> None:
    VALIDATOR.check_schema(json_schema())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_rule_files_are_valid(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.forms.words._WORDS", dict(form_words()))
    for name in ("monarch4", "blocks16"):  # examples/monarch.py and blocks.py register them
        add_word(FormWord(name, frozenset({"linear"})))
    words = dict.fromkeys((*metric_words(), "factored"))  # examples/factored_fisher.py
    monkeypatch.setattr("fxcompress.metric.words._WORDS", words)
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert jsonschema.Draft202012Validator(json_schema()).is_valid(data)


def test_every_key_is_valid() -> None:
    parse_rules(EVERYTHING, "r.yaml")
    assert VALIDATOR.is_valid(yaml.safe_load(EVERYTHING))


def everything_but(*keys: str | int, value: Any = None) -> Any:
    """The file with every key, and one value in the place of another."""
    data = yaml.safe_load(EVERYTHING)
    place = data
    for key in keys[:-1]:
        place = place[key]
    place[keys[-1]] = value
    return data


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (("budget", "keep"), 1.5),
        (("budget", "kep"), 0.5),
        (("rules",), []),
        (("rules", 0, "match", "node"), {"op": "linear"}),
        (("rules", 0, "match", "nodes", "q", "op"), "linaer"),
        (("rules", 0, "match", "nodes", "q", "input"), "x"),
        (("rules", 0, "match", "nodes", "q", "in_feature"), 3),
        (("rules", 0, "match", "nodes", "n", "eps"), "small"),
        (("rules", 0, "rewrite", "any_of"), ["pivotd"]),
        (("rules", 0, "rewrite", "form"), "pivoted"),
        (("rules", 0, "unless", 1, "shares_weight_with"), "relu"),
        (("rules", 1, "match", "group", "op"), "relu"),
        (("rules", 1, "match", "group", "min"), 0),
        (("rules", 3, "rewrite", "graph", "gate", "op"), "softmax"),
        (("rules", 3, "rewrite", "graph", "gate", "dim"), 1),
        (("rules", 0, "match", "nodes", "q", "op"), "input"),
        (("tests", 0, "graph", "q", "in_features"), [64, 32]),
        (("tests", 0, "model"), "m.py:net"),
        (("tests", 0, "graph", "s", "op"), ["add"]),
        (("tests", 0, "matches", "own"), "fc"),
    ],
)
def test_mistakes_are_not_valid(keys: tuple[str | int, ...], value: Any) -> None:
    assert not VALIDATOR.is_valid(everything_but(*keys, value=value))


def test_editors_are_offered_all_words() -> None:
    node, graph = MODELS["NodePattern"]["properties"], MODELS["GraphNode"]["properties"]
    assert {"op", "as", "name", "in_features", "kernel_size"} <= set(node)
    assert node["op"]["anyOf"][0]["enum"] == list(OPERATORS)
    assert graph["op"]["anyOf"][0]["enum"] == list(ALL_OPERATORS)
    assert {"input", "inputs", "optional", "eps", "dim"} <= set(graph)
    assert MODELS["Rewrite"]["properties"]["form"]["anyOf"][0]["enum"] == list(form_words())
    assert RuleSet.model_fields.keys() == set(json_schema()["properties"])


def test_every_key_says_what_it_is() -> None:
    schema = json_schema()
    for name, model in {"": schema, **schema["$defs"]}.items():
        silent = [
            key
            for key, value in model["properties"].items()
            if not {"description", "$ref"} & value.keys()
        ]
        assert not silent, name


def test_forms_of_others_are_offered_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.forms.words._WORDS", dict(form_words()))
    add_word(FormWord("mine", frozenset({"linear"})))
    schema = json_schema()
    assert "mine" in schema["$defs"]["Rewrite"]["properties"]["form"]["anyOf"][0]["enum"]
    json.dumps(schema)
