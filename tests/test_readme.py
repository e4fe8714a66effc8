"""What the README shows is what the package does."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxcompress import cli
from fxcompress.errors import RuleError
from fxcompress.rules import parse_rules

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGE = (ROOT / "examples" / "your_own_form.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)
    return [body for name, body in found if name == language]


def named(language: str) -> Iterator[tuple[str, str]]:
    """The blocks that begin with the name of a file."""
    for block in blocks(language):
        name = re.match(r"# ([\w-]+\.yaml)\n", block)
        if name is not None:
            yield name.group(1), block


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the examples and the rule files of the tutorial, as a reader has them."""
    path = tmp_path_factory.mktemp("tutorial")
    shutil.copytree(ROOT / "examples", path / "examples", ignore=shutil.ignore_patterns("data"))
    for name, text in named("yaml"):
        (path / name).write_text(text, encoding="utf-8")
    return path


COMMANDS = [
    block.partition("\n")[::2] for block in blocks("") if block.startswith("$ fxcompress ")
] + [(line, "") for block in blocks("", PAGE) for line in block.splitlines()]


@pytest.mark.parametrize(
    ("command", "expected"), COMMANDS, ids=[command.split()[2] for command, _ in COMMANDS]
)
def test_commands_print_what_is_shown(
    command: str, expected: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where output is shown it is the whole; where none is, the command works."""
    monkeypatch.chdir(place)
    arguments = command.split()[2:]
    if "--import" in arguments:
        # In a process of its own: what a module registers stays registered.
        run = [sys.executable, "-m", "fxcompress.cli", *arguments]
        done = subprocess.run(run, cwd=place, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return
    result = CliRunner().invoke(cli.app, arguments)
    shown = result.stdout
    if isinstance(result.exception, RuleError):  # main() prints it in this way
        shown = f"error: {result.exception}\n"
        assert expected.startswith("error: ")
    else:
        assert result.exit_code == 0, result.output
    if expected:
        assert shown == expected


def test_the_tutorial_has_all_its_steps() -> None:
    assert [name for name, _ in named("yaml")] == [
        "one-rule.yaml",
        "wrong.yaml",
        "pattern.yaml",
        "template.yaml",
        "tested.yaml",
    ]
    assert len(COMMANDS) == 11


def test_the_error_of_a_template_is_the_one_shown() -> None:
    text = dict(named("yaml"))["template.yaml"]
    broken = text.replace("$small, weight: fc.left", "$small, weight: fc.right")
    (shown,) = (block for block in blocks("") if block.startswith("template.yaml:"))
    with pytest.raises(RuleError) as caught:
        parse_rules(broken, "template.yaml")
    assert str(caught.value).startswith(shown)


def test_no_figure_is_missing() -> None:
    assert "<!--" not in README
