"""What the README shows is what the package does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fxcompress.cli import app
from fxcompress.rules import parse_rules

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    return [text for name, text in found if name == language]


def test_rule_files_load() -> None:
    (text,) = blocks("yaml")
    loaded = parse_rules(text, "rules.yaml")
    assert [rule.id for rule in loaded.rules.rules] == ["mlp", "attention", "values-stay"]


def test_commands_print_what_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks that start with ``$ fxcompress explain`` hold the whole output."""
    monkeypatch.chdir(ROOT)
    shown = [block for block in blocks("") if block.startswith("$ fxcompress explain")]
    assert shown
    for block in shown:
        command, _, expected = block.partition("\n")
        result = CliRunner().invoke(app, command.split()[2:])
        assert result.exit_code == 0, result.output
        assert result.stdout == expected


def test_no_figure_is_missing() -> None:
    assert "<!--" not in README
