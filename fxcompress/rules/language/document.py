"""Reading YAML into plain data that remembers where everything stood.

The text is read event by event: nothing is constructed but strings, numbers, booleans,
nulls, lists and dicts, nothing recurses, and anchors are refused before they can expand.
YAML's own traps (an unquoted ``*.mlp`` is an alias) get messages of their own; where the
text can be mended by one character, reading goes on, so that later problems show as well.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import yaml

from fxcompress.rules.language.diagnostics import Diagnostic, Span, split_lines

KeyPath = tuple[str | int, ...]

DEEPEST = 50
_MOST_MENDS = 20
_MOST_READ = 100_000
"""Characters that are read before mending is given up: each mend reads the text once more."""


@dataclass(frozen=True)
class Placed:
    """Where one value of the document stands.

    Attributes:
        key: the key that it belongs to; None for the root and for list items.
        value: the value, or its first line.
        raw: a scalar as written, without its quotes; empty for lists and mappings.
        style: how it is written. The offset of a character in ``raw`` is one in the source
            only for ``"plain"`` and ``"quoted"``.
    """

    key: Span | None
    value: Span
    raw: str = ""
    style: Literal["plain", "quoted", "folded", "flow", "block"] = "plain"

    @property
    def best(self) -> Span:
        """The key where there is one: it is what the reader looks for."""
        return self.key or self.value

    def part(self, offset: int, length: int) -> Span:
        """The place of some characters of a scalar; all of it where they cannot be told."""
        if self.style not in ("plain", "quoted"):
            return self.value
        first = self.value.column + offset + (1 if self.style == "quoted" else 0)
        return Span(self.value.line, first, length, self.value.source)


@dataclass(frozen=True)
class Document:
    """A document that was read.

    Attributes:
        data: plain Python data.
        entries: path of keys and indices -> where that value stands.
        diagnostics: the problems found so far.
        complete: False if reading stopped at a problem, so that the rest is not known.
    """

    data: Any
    entries: Mapping[KeyPath, Placed]
    diagnostics: tuple[Diagnostic, ...]
    complete: bool = True

    def nearest(self, path: KeyPath) -> KeyPath:
        """The path itself, or that of what is around a value which the document leaves out."""
        return nearest(self.entries, path)


def nearest(entries: Mapping[KeyPath, Placed], path: KeyPath) -> KeyPath:
    """The longest part of a path that has an entry."""
    while path not in entries:
        path = path[:-1]
    return path


def read_document(text: str) -> Document:
    """Read a YAML text.

    >>> document = read_document("rules:\\n  - id: mlp\\n")
    >>> document.data, document.entries["rules", 0, "id"].value
    ({'rules': [{'id': 'mlp'}]}, Span(line=2, column=9, length=3))
    """
    diagnostics: list[Diagnostic] = []
    for _ in range(max(1, min(_MOST_MENDS, _MOST_READ // max(1, len(text))))):
        builder = _Builder(text)
        stopped: Diagnostic | None = None
        mended: str | None = None
        try:
            for event in yaml.parse(text, Loader=yaml.SafeLoader):
                builder.add(event)
        except yaml.MarkedYAMLError as error:
            stopped, mended = _explain(error, text)
        except yaml.reader.ReaderError as error:
            stopped = _unreadable_character(error, text)
        except (ValueError, OverflowError) as error:  # "\UFFFFFFFF" is no character
            stopped = Diagnostic("yaml-syntax", f"not YAML: {error}", builder.last)
        except _Stop as stop:
            stopped = stop.diagnostic
        if stopped is not None:
            diagnostics.append(stopped)
        if mended is None:
            # A line that did not parse is not worth a second opinion.
            bad = {item.span.line for item in diagnostics if item.span}
            rest = [d for d in builder.diagnostics if d.span is None or d.span.line not in bad]
            found = (*diagnostics, *rest)
            return Document(builder.root, builder.entries, found, complete=stopped is None)
        text = mended
    return Document(None, {}, tuple(diagnostics), complete=False)


class Position(Protocol):
    """Where the scanner was; its lines and columns count from 0."""

    line: int
    column: int
    index: int


class _Stop(Exception):
    def __init__(self, diagnostic: Diagnostic) -> None:
        super().__init__(diagnostic.message)
        self.diagnostic = diagnostic


@dataclass
class _Open:
    """A list or mapping whose end has not come yet."""

    data: dict[str, Any] | list[Any]
    path: KeyPath
    key: str | None = None
    key_span: Span | None = None
    lines: dict[str, int] = field(default_factory=dict)
    repeats: int = 0
    drop: bool = False


class _Builder:
    """Builds data and entries from the stream of YAML events."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.lines = split_lines(text)
        self.root: Any = None
        self.entries: dict[KeyPath, Placed] = {}
        self.diagnostics: list[Diagnostic] = []
        self.last = Span(1, 1)
        self.stack: list[_Open] = []
        self.documents = 0

    def add(self, event: yaml.Event) -> None:
        mark = _known(event.start_mark)
        self.last = Span(mark.line + 1, mark.column + 1)
        if isinstance(event, yaml.DocumentStartEvent):
            self.documents += 1
            if self.documents > 1:
                self.stop("yaml-documents", "a second document; a rule file holds one", 3)
        elif isinstance(event, yaml.CollectionEndEvent):
            self.stack.pop()
        elif isinstance(event, yaml.NodeEvent):
            self.refuse_anchors(event)
            if isinstance(event, yaml.AliasEvent):
                self.place(None, Placed(None, self.last))
            elif isinstance(event, yaml.ScalarEvent):
                self.scalar(event)
            elif isinstance(event, yaml.CollectionStartEvent):
                self.collection(event)

    def refuse_anchors(self, event: yaml.NodeEvent) -> None:
        if isinstance(event, yaml.AliasEvent):
            written = f"*{event.anchor}"
            message = f"'{written}' is an alias in YAML, and aliases are not allowed"
            self.report("yaml-alias", message, len(written), f'quote a glob: "{written}"')
        elif event.anchor is not None:
            self.report(
                "yaml-anchor", f"anchors are not allowed ('&{event.anchor}')", 1 + len(event.anchor)
            )
        if getattr(event, "tag", None) not in (None, "!"):
            self.report("yaml-tag", "tags ('!...') are not allowed", 1)

    def scalar(self, event: yaml.ScalarEvent) -> None:
        start, end = _known(event.start_mark), _known(event.end_mark)
        source = self.text[start.index : end.index]
        if event.anchor is not None or event.tag is not None:
            source = ""
        style: Literal["plain", "quoted", "folded"] = "folded"
        if event.style is None and source == event.value:
            style = "plain"
        elif event.style in ("'", '"') and source[1:-1] == event.value:
            style = "quoted"
        rest_of_line = len(self.lines[start.line]) - start.column
        one_line = end.column - start.column if end.line == start.line else rest_of_line
        span = Span(start.line + 1, start.column + 1, max(1, one_line))
        plain = event.style is None and event.implicit[0]
        top = self.stack[-1] if self.stack else None
        if top is not None and isinstance(top.data, dict) and top.key is None:
            self.key(top, event.value, span)
        else:
            value = resolve_scalar(event.value) if plain else event.value
            self.place(value, Placed(None, span, event.value, style))

    def key(self, top: _Open, raw: str, span: Span) -> None:
        top.key, top.key_span, top.drop = raw, span, raw in top.lines
        if top.drop:
            top.repeats += 1
            message = f"'{raw}' is given twice (first on line {top.lines[raw]})"
            hint = "YAML would silently keep only the last"
            self.diagnostics.append(Diagnostic("duplicate-key", message, span, hint))
        top.lines.setdefault(raw, span.line)

    def collection(self, event: yaml.CollectionStartEvent) -> None:
        if len(self.stack) >= DEEPEST:
            self.stop("yaml-depth", f"nested deeper than {DEEPEST}", 1)
        data: dict[str, Any] | list[Any] = {} if isinstance(event, yaml.MappingStartEvent) else []
        length = 1
        if not event.flow_style:
            line = self.lines[self.last.line - 1]
            length = max(1, len(line.rstrip()) - self.last.column + 1)
        span = Span(self.last.line, self.last.column, length)
        path = self.place(data, Placed(None, span, style="flow" if event.flow_style else "block"))
        self.stack.append(_Open(data, path))

    def place(self, value: Any, entry: Placed) -> KeyPath:
        """Put a value where the stream has come to; its path."""
        if not self.stack:
            self.root = value
            self.entries[()] = entry
            return ()
        top = self.stack[-1]
        if isinstance(top.data, list):
            path: KeyPath = (*top.path, len(top.data))
            top.data.append(value)
        elif top.key is None:
            self.stop(
                "invalid-key", "a list or mapping used as a key", 1, "quote text that holds { or ["
            )
        else:
            # A repeated key's value is read on, for its own problems, under a name of its own.
            path = (*top.path, f"\0{top.repeats}" if top.drop else top.key)
            if not top.drop:
                top.data[top.key] = value
            entry = Placed(top.key_span, entry.value, entry.raw, entry.style)
            top.key = None
        self.entries[path] = entry
        return path

    def report(self, code: str, message: str, length: int, hint: str = "") -> None:
        span = Span(self.last.line, self.last.column, length)
        self.diagnostics.append(Diagnostic(code, message, span, hint))

    def stop(self, code: str, message: str, length: int, hint: str = "") -> Any:
        span = Span(self.last.line, self.last.column, length)
        raise _Stop(Diagnostic(code, message, span, hint))


def _known(mark: Position | None) -> Position:
    if mark is None:
        raise ValueError("an event without a position")
    return mark


class Core(yaml.resolver.BaseResolver):
    """What a scalar without quotes is, by the core schema of YAML 1.2, section 10.3.2."""


_FLOAT = r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
_CORE_SCHEMA = {
    # tag -> what it looks like, and its first characters
    "null": (r"~|null|Null|NULL|", [*"~nN", ""]),
    "bool": (r"true|True|TRUE|false|False|FALSE", [*"tTfF"]),
    "int": (r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", [*"-+0123456789"]),
    "float": (
        rf"{_FLOAT}|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        [*"-+.0123456789"],
    ),
}
for _tag, (_pattern, _firsts) in _CORE_SCHEMA.items():
    Core.add_implicit_resolver(
        f"tag:yaml.org,2002:{_tag}", re.compile(rf"(?:{_pattern})\Z"), _firsts
    )
_CORE = Core()


def resolve_scalar(raw: str) -> bool | int | float | str | None:
    """The value of a scalar without quotes by the core schema of YAML 1.2.

    >>> resolve_scalar("1e-3"), resolve_scalar("no"), resolve_scalar("0o17"), resolve_scalar("1:30")
    (0.001, 'no', 15, '1:30')
    """
    tag: str = _CORE.resolve(yaml.ScalarNode, raw, (True, False))  # type: ignore[no-untyped-call]
    match tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return raw.lower() == "true"
        case "int":
            # Nothing in a rule file is larger; Python cannot even print integers of some size.
            return int(raw, 0 if raw[:2] in ("0o", "0x") else 10) if len(raw) < 20 else raw
        case "float":
            return float(raw.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return raw


def _explain(error: yaml.MarkedYAMLError, text: str) -> tuple[Diagnostic, str | None]:
    """The problem in words, and the text with the offending character replaced (or None)."""
    context, problem = error.context or "", error.problem or "not YAML"
    mark = error.problem_mark or error.context_mark
    if mark is None:
        return Diagnostic("yaml-syntax", problem), None
    word_mark = error.context_mark if error.context_mark is not None else mark
    line = split_lines(text)[word_mark.line]
    word = re.match(r"[^,\[\]{}]*", line[word_mark.column :])
    written = (word.group() if word else "").split(" #")[0].rstrip()
    span = Span(word_mark.line + 1, word_mark.column + 1, max(1, len(written)))
    first = text[word_mark.index : word_mark.index + 1]
    if "scanning an alias" in context:
        message = f"'{written}' starts an alias in YAML"
        return Diagnostic("yaml-alias", message, span, f'quote it: "{written}"'), _mend(
            text, word_mark.index, "x"
        )
    if "scanning an anchor" in context:
        message = f"'{written}' starts an anchor in YAML"
        return Diagnostic("yaml-anchor", message, span, f'quote it: "{written}"'), _mend(
            text, word_mark.index, "x"
        )
    if "block scalar" in context or (first in ("|", ">") and "cannot start" in problem):
        message = f"'{first}' starts a block of text in YAML"
        hint = f'quote it: "{written}"'
        if re.match(r">=?\s*[-0-9.]", written):
            hint = f"a condition goes into 'where', in full: \"fc.in_features {written}\""
        mended = _mend(text, word_mark.index, "x")
        return Diagnostic("yaml-block-scalar", message, span, hint), mended
    if first == "\t":
        message = "a tab; YAML indents with spaces only"
        one = Span(span.line, span.column)
        return Diagnostic("yaml-tab", message, one, "use spaces"), _mend(text, mark.index, " ")
    here = Span(mark.line + 1, mark.column + 1)
    if "mapping values are not allowed" in problem:
        hint = "quote text that holds ': '"
        return Diagnostic("yaml-syntax", "a second ':' in one entry", here, hint), None
    if "cannot start any token" in problem:
        return Diagnostic("yaml-syntax", problem, here, "quote it"), None
    return Diagnostic("yaml-syntax", f"{context}: {problem}" if context else problem, here), None


def _mend(text: str, index: int, character: str) -> str | None:
    # One character for one keeps every position; a change that changes nothing must end it.
    mended = text[:index] + character + text[index + 1 :]
    return mended if mended != text else None


def _unreadable_character(error: yaml.reader.ReaderError, text: str) -> Diagnostic:
    position = min(int(error.position), len(text))
    lines = split_lines(text[:position])
    span = Span(len(lines), len(lines[-1]) + 1)
    code = error.character if isinstance(error.character, int) else ord(error.character)
    return Diagnostic("yaml-character", f"a character that YAML forbids (U+{code:04X})", span)
