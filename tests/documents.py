"""README and ``docs/`` taken apart: blocks of code with their places, links and headings."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

ROOT = Path(__file__).parent.parent

_FENCED = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.DOTALL | re.MULTILINE)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


@dataclass(frozen=True)
class Block:
    """A fenced block.

    Attributes:
        language: the word after the fence.
        text: what is in it.
        line: that its text starts on, from 1.
    """

    language: str
    text: str
    line: int

    @property
    def file(self) -> str | None:
        """The name of the file that it shows: its first line is ``# name.yaml``."""
        first = re.match(r"# ([\w-]+\.yaml)\n", self.text)
        return first.group(1) if first else None

    @property
    def commands(self) -> list[tuple[str, str]]:
        """Commands of a ``console`` block, each with the output that is shown below it."""
        parts = re.split(r"^\$ ", self.text, flags=re.MULTILINE)
        assert not parts[0], f"line {self.line}: output without a command"
        return [(line, output) for line, _, output in (part.partition("\n") for part in parts[1:])]


@dataclass(frozen=True)
class Document:
    """A page of Markdown.

    Attributes:
        name: its path from the root of the repository.
    """

    name: str

    @property
    def path(self) -> Path:
        """Where it is."""
        return ROOT / self.name

    @cached_property
    def text(self) -> str:
        """All of it."""
        return self.path.read_text(encoding="utf-8")

    @cached_property
    def blocks(self) -> list[Block]:
        """The fenced blocks, in order."""
        return [
            Block(found[1], found[2], self.text.count("\n", 0, found.start(2)) + 1)
            for found in _FENCED.finditer(self.text)
        ]

    @cached_property
    def prose(self) -> str:
        """What is not in fenced blocks."""
        return _FENCED.sub("", self.text)

    @cached_property
    def inline(self) -> list[str]:
        """Code within lines, with line breaks as spaces."""
        return [" ".join(code.split()) for code in re.findall(r"`([^`]+)`", self.prose)]

    @cached_property
    def links(self) -> list[str]:
        """Targets of links and pictures."""
        return _LINK.findall(re.sub(r"`[^`]*`", "code", self.prose))

    @cached_property
    def anchors(self) -> set[str]:
        """Anchors of the headings, as GitHub makes them."""
        headings = re.findall(r"^#+ (.*)$", self.prose, flags=re.MULTILINE)
        return {re.sub(r"[^\w\- ]", "", each.lower()).replace(" ", "-") for each in headings}

    def of(self, language: str) -> list[Block]:
        """The blocks of a language."""
        return [block for block in self.blocks if block.language == language]


def documents(*patterns: str) -> list[Document]:
    """The documents whose paths fit globs, in order."""
    return [
        Document(path.relative_to(ROOT).as_posix())
        for pattern in patterns
        for path in sorted(ROOT.glob(pattern))
    ]
