"""Any text is a rule set or a RuleError, never anything else."""

from __future__ import annotations

import copy
import random
import subprocess
import sys
import time

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.rules import fuzz
from tests.rules.fuzz import EVERYTHING, KEYS, LEAVES, TOKENS, as_yaml, check


def run(count: int, seed: int, jobs: int = 1) -> str:
    # In a process of its own: the limit on memory is one of the whole process.
    options = {"count": count, "seed": seed, "jobs": jobs}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, fuzz.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def test_two_thousand_files() -> None:
    found = run(2_000, seed=2)
    # Files of all kinds: some are right, others fail late, and many are no YAML.
    for code in ("ok", "yaml-syntax", "unknown-key", "unknown-attribute", "unbound-value"):
        assert f"  {code}\n" in found


@pytest.mark.slow
def test_a_hundred_thousand_files() -> None:
    assert "100,000 files" in run(100_000, seed=0, jobs=2)


def test_the_file_with_every_key_is_right() -> None:
    assert check(EVERYTHING) == "ok"


def test_every_maker_makes_files() -> None:
    for maker, _ in fuzz.MAKERS:
        assert len({maker(random.Random(seed)) for seed in range(5)}) > 1


@pytest.mark.parametrize("size", [100, 3000])
def test_many_mistakes_are_told_in_time(size: int) -> None:
    """Suggestions are dear; only the first mistakes get them."""
    words = ", ".join(f"{{op: linaer{i}}}" for i in range(size))
    text = f"budget: {{keep: 1}}\nrules: [{{id: a, rewrite: none, match: {{any_of: [{words}]}}}}]"
    start = time.process_time()
    check(text)
    assert time.process_time() - start < 2


def test_globs_of_a_file_are_bounded() -> None:
    globs = ", ".join(f'"{i}{"{a,b}" * 8}"' for i in range(100))
    rule = f"{{id: a, rewrite: none, match: {{node: {{op: linear, name: [{globs}]}}}}}}"
    assert check(f"budget: {{keep: 1}}\nrules: [{rule}]") == "bad-glob"


def test_what_reading_does_is_seen() -> None:
    """The audit hook sees what it is there for."""
    with fuzz.watched() as events:
        open(fuzz.__file__).close()
        exec("1")
    assert [event.split()[0] for event in events] == ["open", "exec"]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.sampled_from(TOKENS), max_size=30).map("".join))
@example('a: "\\U0011FFFF"')
@example('budget: {keep: "\\ud800"}\nrules: [{id: "\\ud800"}]')
@example('"": 1\n"": 2')
@example("? [a]\n: b")
@example("a: 0x_\nb: 0b_\nc: 1:30")
@example(f"budget: {{keep: 0x{'f' * 5000}}}\nrules: []")
@example(f"priority: {'9' * 5000}")
def test_random_tokens(text: str) -> None:
    check(text)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=60))
def test_random_text(text: str) -> None:
    check(text)


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from([*KEYS, *LEAVES]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner, max_size=3)
    ),
    max_leaves=8,
)
whole = yaml.safe_load(EVERYTHING)
BASE = {
    "budget": {"keep": 0.8},
    "rules": [whole["rules"][0], whole["rules"][3]],
    "tests": whole["tests"][:1],
}
PLACES = [
    *(("rules", 0, key) for key in ("match", "unless", "where", "rewrite", "expect", "id")),
    *(("rules", 0, "match", key) for key in ("nodes", "inputs", "outputs", "scope", "group")),
    *(("rules", 0, "match", "nodes", "q", key) for key in ("op", "name", "input", "optional")),
    *(("rules", 0, "match", "nodes", key) for key in ("q", "s")),
    *(("rules", 1, "rewrite", key) for key in ("graph", "outputs", "cost")),
    *(("rules", 1, "rewrite", "graph", "up", key) for key in ("op", "inputs", "weight", "bias")),
    *(("tests",), ("tests", 0), ("tests", 0, "graph"), ("tests", 0, "graph", "q")),
    *(("tests", 0, key) for key in ("matches", "misses", "model", "name")),
]


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(PLACES), plain)
def test_any_shape_anywhere(place: tuple[str | int, ...], value: object) -> None:
    data = copy.deepcopy(BASE)
    inner = data
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    check(as_yaml(data))
