"""Any saved directory is a model or a LoadError, and runs nothing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests import plan_fuzz


def run(count: int, seed: int, jobs: int = 1) -> str:
    options = {"count": count, "seed": seed, "jobs": jobs}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    command = [sys.executable, plan_fuzz.__file__, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


def test_some_plans() -> None:
    found = run(300, seed=1)
    for outcome in ("ok", "/plan.json is not a valid plan", "this Net is not what"):
        assert outcome in found


@pytest.mark.slow
def test_twenty_thousand_plans() -> None:
    assert "20,000 plans" in run(20_000, seed=0, jobs=2)


@pytest.mark.parametrize(
    "source",
    [
        "def forward(self, a=print()): return a",
        "def forward(self, x): return __import__('os')",
        "def forward(self, x): return self.a(x).b()",
        "def forward(self, x): return getattr(x, 'a')(x)",
        "import os",
        "@torch.cat\ndef forward(self): pass",
        "def forward(self, x): return [a for a in x]",
    ],
)
def test_sources_that_no_graph_has(source: str) -> None:
    assert not plan_fuzz.harmless(source)


def test_a_source_that_graphs_have() -> None:
    source = (
        'def forward(self, input):\n    a = getattr(self, "0")(input);  input = None\n    return a'
    )
    assert plan_fuzz.harmless(source)


def test_what_loading_does_is_seen() -> None:
    with plan_fuzz.watched() as events:
        exec("1")
        open(plan_fuzz.__file__).close()
    assert {event.split()[0] for event in events} == {"compile", "exec", "open"}
