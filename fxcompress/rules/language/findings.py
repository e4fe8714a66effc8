"""The problems that the checks have found in a document, and the ways to add one."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from fxcompress.rules.language.diagnostics import Diagnostic, choices, suggest
from fxcompress.rules.language.document import Document, KeyPath, Placed
from fxcompress.rules.language.expressions import ExpressionError
from fxcompress.rules.language.fields import WithAttributes
from fxcompress.rules.language.globs import GlobError, expand, glob_for_regex
from fxcompress.rules.language.schema import CaseNode, GraphNode
from fxcompress.rules.language.vocabulary import ALL_OPERATORS, OPERATORS, AttributeType

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

    def entry(self, path: KeyPath) -> Placed:
        """Where a value stands, or what is around one that was left out."""
        return self.document.entries[self.document.nearest(path)]

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

    def once(
        self, name: str, path: KeyPath, first_lines: dict[str, int], code: str, what: str
    ) -> None:
        """Check that a name is given once in a file; ``first_lines`` gains its line."""
        if name in first_lines:
            message = f"{what} twice (first on line {first_lines[name]})"
            self.report(path, code, message, value=True)
        first_lines.setdefault(name, self.line(path))

    def globs(self, globs: Sequence[str] | None, path: KeyPath) -> None:
        """Check some globs."""
        for index, glob in enumerate(globs or ()):
            if (instead := glob_for_regex(glob)) is not None:
                message = f"'{glob}' is a regular expression, and a name is a glob"
                hint = f'"{instead}": * is any text, dots too, and {{a,b}} an or'
                self.report((*path, index), "bad-glob", message, hint, value=True)
                continue
            try:
                self.plain_globs += len(expand(glob))
                if self.plain_globs > _MOST_GLOBS:
                    raise GlobError(f"the globs of a file stand for more than {_MOST_GLOBS:,}")
            except GlobError as error:
                self.report((*path, index), "bad-glob", str(error), value=True)

    def operators(self, ops: Sequence[str], path: KeyPath, *, rewritable: bool) -> tuple[str, ...]:
        """The operators that exist (and have a weight, if they have to)."""
        return tuple(
            op
            for index, op in enumerate(ops)
            if self.operator(op, (*path, index), rewritable=rewritable)
        )

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
        self, node: WithAttributes, path: KeyPath, ops: Sequence[str], *, some: bool = False
    ) -> None:
        """Check the attributes of a matcher: all of some operators have them, or ``some`` do."""
        for key, value in node.attributes.items() if ops else ():
            lacking = [op for op in dict.fromkeys(ops) if key not in ALL_OPERATORS[op]]
            if lacking and not (some and len(lacking) < len({*ops})):
                known = shared_attributes(ops)
                hint = suggest(key, [*known, *node.keys()]) or choices(known or node.keys())
                message = f"{' and '.join(lacking)} has no attribute '{key}'"
                self.report((*path, key), "unknown-attribute", message, hint)
            else:
                self.literal(value, (*path, key), ops)

    def literal(self, value: Any, path: KeyPath, ops: Collection[str]) -> None:
        """Check the value of an attribute for each operator that has it."""
        attribute = str(path[-1])
        for op in dict.fromkeys(ops):
            kind = ALL_OPERATORS[op].get(attribute)
            wrong = wrong_value(value, kind) if kind is not None else ""
            if kind is not None and wrong:
                message = f"{op}'s {attribute} {wrong}"
                self.report(path, "bad-attribute-value", message, _value_hint(kind), value=True)
                return

    def one_source(self, name: str, node: GraphNode | CaseNode, path: KeyPath) -> None:
        """Check that a node has one of the two keys for what it reads."""
        if node.input is not None and node.inputs is not None:
            message = f"'{name}' takes one of 'input' and 'inputs'; it has both"
            self.report((*path, "inputs"), "both-inputs", message)

    def order(self, reads: Mapping[str, Sequence[str | None]], path: KeyPath, code: str) -> bool:
        """Check that no node reads itself, directly or through others."""
        inside = {name: [v for v in values if v in reads] for name, values in reads.items()}
        try:
            TopologicalSorter(inside).prepare()
        except CycleError as error:
            cycle: Sequence[str] = error.args[1]
            if len(set(cycle)) == 1:
                message = f"'{cycle[0]}' reads itself"
            else:
                message = f"nodes read one another in a circle: {' -> '.join(cycle)}"
            self.report((*path, next(name for name in reads if name in cycle)), code, message)
            return False
        return True

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


def shared_attributes(ops: Sequence[str]) -> list[str]:
    """Attributes that all of some operators have."""
    return [name for name in ALL_OPERATORS[ops[0]] if all(name in ALL_OPERATORS[op] for op in ops)]


_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
}


def wrong_value(value: Any, kind: AttributeType) -> str:
    """What is wrong with a value, as the end of a sentence; empty if nothing is.

    A tuple of values is an "or", except for attributes that are tuples themselves.

    >>> wrong_value((3, 3, 3), AttributeType("ints", 2))
    'has 2 numbers, not 3'
    >>> wrong_value((3, 5), AttributeType("int"))
    ''
    """
    if kind.kind in ("ints", "ints|str"):
        if isinstance(value, str) and kind.kind == "ints|str":
            return ""
        if not isinstance(value, tuple):
            return "" if _is(value, "int") else f"is a number or a list of numbers, not {value!r}"
        if value and all(isinstance(item, tuple) for item in value):
            return next((w for w in (wrong_value(item, kind) for item in value) if w), "")
        if not all(_is(item, "int") for item in value):
            return f"is a list of whole numbers, not {_thawed(value)!r}"
        if len(value) != kind.length:
            return f"has {kind.length} number{'s' * (kind.length > 1)}, not {len(value)}"
        return ""
    items = value if isinstance(value, tuple) else (value,)
    if not items:
        return "is one of nothing: the list is empty"
    wrong = [item for item in items if not _is(item, kind.kind)]
    return f"is {_WORDS[kind.kind]}, not {_thawed(wrong[0])!r}" if wrong else ""


def _thawed(value: Any) -> Any:
    """A value with lists where the file has lists."""
    return [_thawed(item) for item in value] if isinstance(value, tuple) else value


def _value_hint(kind: AttributeType) -> str:
    """An example, or where such a condition goes."""
    if kind.kind == "ints" and kind.length > 1:
        return f"for example [{', '.join(['3'] * kind.length)}]"
    return "conditions on numbers go into 'where'" if kind.kind in ("int", "float") else ""


def _is(value: Any, kind: str) -> bool:
    # A boolean is an integer to Python, and never what was meant here.
    if isinstance(value, bool):
        return kind == "bool"
    types: dict[str, tuple[type, ...]] = {"int": (int,), "float": (int, float), "str": (str,)}
    return isinstance(value, types.get(kind, ()))
