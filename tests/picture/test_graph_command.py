"""``fxcompress graph`` on models, on saved directories and on plans."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import fxcompress
from fxcompress.cli import app
from fxcompress.errors import LoadError
from tests.picture.graphs import compressed

ROOT = Path(__file__).parent.parent.parent
TINY = [f"{ROOT}/examples/tiny.py:model", "--data", f"{ROOT}/examples/tiny.py:data"]


def run(*arguments: str, fails: bool = False) -> str:
    done = CliRunner().invoke(app, ["graph", *arguments], env={"COLUMNS": "200"})
    if done.exception is not None and not isinstance(done.exception, SystemExit):
        raise done.exception
    assert (done.exit_code != 0) == fails, done.output
    return done.output


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A directory with nothing but a plan."""
    (tmp_path / "plan.json").write_text(compressed("joint").model_dump_json(), encoding="utf-8")
    return tmp_path


def test_a_model_is_recorded_and_shown() -> None:
    lines = run(*TINY).splitlines()
    assert lines[0] == "Sequential: 32 nodes"
    assert lines[3] == "1 … 4   4 alike"
    assert "  gate  linear 64→160, bias   32×160" in lines
    assert run(*TINY, "--depth", "1").splitlines()[3].startswith("1 … 4   4 alike, 7 operators: ")


def test_a_saved_plan_is_shown_before_and_after(saved: Path) -> None:
    expected = f"{fxcompress.draw(compressed('joint'))}\n"
    assert run(str(saved)) == run(str(saved / "plan.json")) == expected
    assert "→ joint, r " in expected


def test_neighbours_of_operators(saved: Path) -> None:
    assert run(str(saved), "--node", "1.down").splitlines()[:3] == [
        "1.down  linear  16×16",
        "  reads    1.mul  mul  16×40",
        "  read by  1.add  add  16×16",
    ]
    assert "no operator has such a path" in run(str(saved), "--node", "nowhere", fails=True)
    assert "--node {a" in run(str(saved), "--node", "{a", fails=True)


def test_files_for_other_programs(saved: Path) -> None:
    dot, folder = saved / "g.dot", saved / "explorer"
    told = run(str(saved), "--dot", str(dot), "--model-explorer", str(folder))
    written = (dot, folder / "graphs.json", folder / "losses.json")
    for line, path in zip(told.splitlines(), written, strict=True):
        assert line.startswith(f"written to {path} in ")
    assert dot.read_text(encoding="utf-8") == fxcompress.draw(compressed("joint")).to_dot()
    assert json.loads(run(str(saved), "--json")) == fxcompress.draw(compressed("joint")).to_json()


def test_what_cannot_be_drawn_is_told(tmp_path: Path) -> None:
    assert "graph runs the model once: give --data" in run(TINY[0], fails=True)
    (tmp_path / "plan.json").write_text("{", encoding="utf-8")
    with pytest.raises(LoadError, match=r"plan\.json"):
        run(str(tmp_path))
