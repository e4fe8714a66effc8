"""The problems that the checks have found in a document, and the ways to add one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal

from fxcompress.rules.language.attribute_values import value_hint, wrong_value
from fxcompress.rules.language.diagnostics import Diagnostic, choices, suggest
from fxcompress.rules.language.document import Document, Entry, KeyPath, misread
from fxcompress.rules.language.expressions import ExpressionError
from fxcompress.rules.language.globs import GlobError, expand
from fxcompress.rules.language.vocabulary import ALL_OPERATORS, OPERATORS

_TRAPS: Mapping[str, Literal["string", "number", "whole"]] = {
    "str": "string",
    "int": "whole",
    "float": "number",
}
_MOST_GLOBS = 4096
_MOST = 200


class EnoughError(Exception):
    """There are more problems than anybody wants to read."""


class Findings:
    """What is wrong with a document.

    Attributes:
        document: the document.
        diagnostics: the problems so far, in the order in which they were found.
    """

    def __init__(self, document: Document) -> None:
        self.document = document
        self.diagnostics: list[Diagnostic] = []
        self.plain_globs = 0

    def add(self, item: Diagnostic) -> None:
        """Add a problem.

        Raises:
            EnoughError: there are too many to look for more.
        """
        self.diagnostics.append(item)
        if len(self.diagnostics) >= _MOST:
            raise EnoughError

    def entry(self, path: KeyPath) -> Entry:
        """Where a value stands, or what is around one that was left out."""
        while path not in self.document.entries:
            path = path[:-1]
        return self.document.entries[path]

    def line(self, path: KeyPath) -> int:
        """The line of a value."""
        return self.entry(path).value.line

    def report(
        self, path: KeyPath, code: str, message: str, hint: str = "", *, value: bool = False
    ) -> None:
        """Add a problem at a key, or at its value."""
        entry = self.entry(path)
        span = entry.value if value else entry.best
        self.add(Diagnostic(code, message, span, hint))

    def unknown(
        self, path: KeyPath, code: str, message: str, word: str, known: Collection[str]
    ) -> None:
        """Add a word that is not known, with the one that was meant or all that there are."""
        hint = suggest(word, known) or (choices(known) if known else "")
        self.report(path, code, message, hint, value=True)

    def globs(self, value: Any, path: KeyPath) -> None:
        """Check one glob or a list of them."""
        for item, item_path in one_or_many(value, path):
            try:
                self.plain_globs += len(expand(item))
                if self.plain_globs > _MOST_GLOBS:
                    raise GlobError(f"the globs of a file stand for more than {_MOST_GLOBS:,}")
            except GlobError as error:
                self.report(item_path, "bad-glob", str(error), value=True)

    def operators(self, value: Any, path: KeyPath, *, rewritable: bool) -> tuple[str, ...]:
        """The operators of a value that exist (and have a weight, if they have to)."""
        given = one_or_many(value, path)
        return tuple(op for op, place in given if self.operator(op, place, rewritable=rewritable))

    def operator(self, op: str, path: KeyPath, *, rewritable: bool) -> bool:
        """Whether an operator exists (and has a weight, if it has to)."""
        if op in OPERATORS or (op in ALL_OPERATORS and not rewritable):
            return True
        if op in ALL_OPERATORS:
            hint = choices(OPERATORS)
            self.report(path, "not-rewritable", f"{op} has no weight to rewrite", hint, value=True)
        else:
            hint = suggest(op, ALL_OPERATORS) or choices(OPERATORS)
            self.report(path, "unknown-operator", f"unknown operator '{op}'", hint, value=True)
        return False

    def attributes(
        self,
        mapping: Mapping[str, Any],
        path: KeyPath,
        ops: Sequence[str],
        keys: Collection[str],
    ) -> None:
        """Check every key of a matcher but ``keys`` as an attribute that all of ``ops`` have."""
        for key, value in mapping.items():
            if key in keys:
                continue
            lacking = [op for op in dict.fromkeys(ops) if key not in ALL_OPERATORS[op]]
            if lacking:
                known = [
                    n for n in ALL_OPERATORS[ops[0]] if all(n in ALL_OPERATORS[o] for o in ops)
                ]
                hint = suggest(key, [*known, *keys]) or choices(known or sorted(keys))
                message = f"{' and '.join(lacking)} has no attribute '{key}'"
                self.report((*path, key), "unknown-attribute", message, hint)
            else:
                self.literals(value, (*path, key), ops)

    def literals(self, value: Any, path: KeyPath, ops: Collection[str]) -> None:
        """Check the value of an attribute for each operator that has it."""
        attribute = str(path[-1])
        for op in dict.fromkeys(ops):
            kind = ALL_OPERATORS[op].get(attribute)
            wrong = wrong_value(value, kind) if kind is not None else ""
            if kind is None or not wrong:
                continue
            entry = self.entry(path)
            trap = misread(entry, value, _TRAPS.get(kind.kind))
            message = f"{op}'s {attribute} {wrong}"
            self.add(
                trap or Diagnostic("bad-attribute-value", message, entry.value, value_hint(kind))
            )
            return

    def expression(
        self, error: ExpressionError, text: str, path: KeyPath, siblings: int = 1
    ) -> None:
        """Add what is wrong with an expression, at the part of it that is to blame.

        Args:
            error: what is wrong.
            text: the expression.
            path: its place.
            siblings: number of expressions in the list that it stands in.
        """
        entry = self.entry(path)
        torn = text.count("(") != text.count(")") and siblings > 1
        if torn and self.entry(path[:-1]).style == "flow" and entry.style == "plain":
            message = f"'{text}' is only a part: the commas of a [list] split the expression"
            hint = "quote the whole expression"
            self.add(Diagnostic("yaml-comma", message, entry.value, hint))
            return
        hint = suggest(error.word, error.known) if error.word else ""
        if error.word and not hint and error.known:
            hint = choices(error.known)
        span = entry.part(error.offset, error.length)
        self.add(Diagnostic(error.code, error.message, span, hint))


def one_or_many(value: Any, path: KeyPath) -> list[tuple[str, KeyPath]]:
    """The strings of a value that is one string or a list of them, with their places."""
    if isinstance(value, str):
        return [(value, path)]
    items = value if isinstance(value, list) else []
    return [(item, (*path, i)) for i, item in enumerate(items) if isinstance(item, str)]
