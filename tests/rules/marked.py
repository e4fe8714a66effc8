"""Errors by example: the text of a rule file with the part to blame between « and »."""

from __future__ import annotations

import re
from typing import NamedTuple

import pytest

from fxcompress.errors import RuleError
from fxcompress.rules import parse_rules


class Mistake(NamedTuple):
    """A rule file with one mistake, and what is said of it.

    Attributes:
        text: the file, with the part under the carets marked.
        code: of the error.
        message: in full.
        hint: in full; empty for none.
    """

    text: str
    code: str
    message: str
    hint: str = ""

    @property
    def plain(self) -> str:
        """The file without the marks."""
        return re.sub("[«»]", "", self.text)

    @property
    def report(self) -> str:
        """The whole error text."""
        lines = self.text.splitlines()
        number = next(index for index, line in enumerate(lines) if "«" in line)
        before, part, after = re.split("[«»]", lines[number])
        where = f"r.yaml:{number + 1}:{len(before) + 1}"
        shown = before.lstrip()
        return (
            f"{where} error[{self.code}]: {self.message}\n"
            f"   {shown}{part}{after}\n"
            f"   {' ' * len(shown)}{'^' * len(part)} {self.hint}"
        ).rstrip()


def errors(text: str) -> str:
    """What is wrong with a rule file."""
    with pytest.raises(RuleError) as caught:
        parse_rules(text, "r.yaml")
    return str(caught.value)
