"""``extends``: a rule file that builds on a preset or on another file.

before::

    # mine.yaml                        # decoder.yaml
    extends: decoder                   budget: {keep: 0.8, of: matched}
    budget: {keep: 0.7}                rules: [{id: stay-dense, ...}, {id: gate-and-up, ...}]
    rules: [{id: gate-and-up, ...}, {id: head, ...}]

after::

    budget: {keep: 0.7, of: matched}
    rules: [{id: stay-dense, ...}, {id: gate-and-up, ... of mine.yaml}, {id: head, ...}]

Mappings are merged key by key, and every other value replaces that of the file below.  A rule
replaces the one with its id, and others are appended.  Tests are about the file that they are in,
and stay there.  Every value remembers the file and the place where it stands.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fxcompress.errors import RuleError
from fxcompress.rules.language.diagnostics import Diagnostic, Source, Span, choices, suggest
from fxcompress.rules.language.document import Document, KeyPath, Placed, read_document
from fxcompress.rules.language.presets import preset_names, preset_path
from fxcompress.rules.language.reading import read_source

EXTENDS = "extends"
_DEEPEST = 8


def extended(
    document: Document, directory: Path, above: Sequence[Path] = ()
) -> tuple[Document, tuple[Source, ...]]:
    """A document merged with what it builds on, and the sources of that.

    Args:
        document: a mapping.
        directory: that its paths start from.
        above: the files that led here, to find circles.
    """
    name = document.data.get(EXTENDS)
    if not isinstance(name, str):  # another type is a mistake that the schema tells
        return document, ()
    place = document.entries[EXTENDS,].value
    preset = preset_path(name)
    path = preset or directory / name
    try:
        if not path.is_file():
            presets = preset_names()
            hint = suggest(name, presets) or f"a path, or {choices(presets)}"
            return _failed(document, "unreadable", f"there is no file {name!r}", place, hint)
        if path.resolve() in above or len(above) >= _DEEPEST:
            what = f"'{name}' extends itself, through others or not"
            return _failed(document, "circle", what, place, "a file builds on another one")
        source, _ = read_source(name if preset else path)
    except (RuleError, OSError, ValueError) as error:
        first = str(error).partition("\n")[0]
        return _failed(document, "unreadable", f"cannot read '{name}': {first}", place)
    base = read_document(source.text.removeprefix("\ufeff"))
    if not isinstance(base.data, dict):
        if base.diagnostics:
            return _joined(document, _moved(base, 1)), (source,)
        return _failed(document, "not-a-mapping", f"'{name}' is no rule file", place)
    base, further = extended(base, path.parent, (*above, path.resolve()))
    return _joined(_merged(_moved(base, 1), document), _moved(base, 1)), (source, *further)


def moved(entry: Placed, by: int) -> Placed:
    """A place in a source that has another number."""
    key = None if entry.key is None else replace(entry.key, source=entry.key.source + by)
    return replace(entry, key=key, value=replace(entry.value, source=entry.value.source + by))


def _failed(
    document: Document, code: str, message: str, place: Span, hint: str = ""
) -> tuple[Document, tuple[Source, ...]]:
    """A document whose base is not known, so that nothing is missed in it."""
    item = Diagnostic(code, message, place, hint)
    rest = {key: value for key, value in document.data.items() if key != EXTENDS}
    diagnostics = (*document.diagnostics, item)
    return replace(document, data=rest, diagnostics=diagnostics, complete=False), ()


def _moved(document: Document, by: int) -> Document:
    spans = [
        item if item.span is None else replace(item, span=_span(item.span, by))
        for item in document.diagnostics
    ]
    entries = {path: moved(entry, by) for path, entry in document.entries.items()}
    return replace(document, entries=entries, diagnostics=tuple(spans))


def _span(span: Span, by: int) -> Span:
    return replace(span, source=span.source + by)


def _joined(document: Document, base: Document) -> Document:
    """A document that has the problems of its base, too."""
    diagnostics = (*document.diagnostics, *base.diagnostics)
    complete = document.complete and base.complete
    return replace(document, diagnostics=diagnostics, complete=complete)


def _merged(base: Document, own: Document) -> Document:
    kept = {key: value for key, value in base.data.items() if key not in (EXTENDS, "tests")}
    entries = {
        path: entry
        for path, entry in base.entries.items()
        if not path or path[0] not in (EXTENDS, "tests")
    }
    entries[()] = own.entries[()]
    added = {key: value for key, value in own.data.items() if key != EXTENDS}
    data = _over(kept, added, (), entries, own)
    return replace(own, data=data, entries=entries)


def _over(
    below: Any, above: Any, path: KeyPath, entries: dict[KeyPath, Placed], own: Document
) -> Any:
    """A value of the file over that of its base; ``entries`` are brought up to date."""
    if isinstance(below, dict) and isinstance(above, dict):
        merged = dict(below)
        if path:
            entries[path] = own.entries[path]
        for key, value in above.items():
            here = (*path, key)
            if key in below:
                merged[key] = _over(below[key], value, here, entries, own)
            else:
                merged[key] = value
                _put(entries, here, own, here)
        return merged
    if path == ("rules",) and isinstance(below, list) and isinstance(above, list):
        entries[path] = own.entries[path]
        return _rules(below, above, entries, own)
    _put(entries, path, own, path)
    return above


def _rules(
    below: list[Any], above: list[Any], entries: dict[KeyPath, Placed], own: Document
) -> list[Any]:
    rules = list(below)
    ids = {
        rule["id"]: at
        for at, rule in enumerate(below)
        if isinstance(rule, dict) and isinstance(rule.get("id"), str)
    }
    for number, rule in enumerate(above):
        name = rule.get("id") if isinstance(rule, dict) else None
        # Each replaces one at most: a second rule of that id is a mistake, which the checks tell.
        at = ids.pop(name, None) if isinstance(name, str) else None
        if at is None:
            at = len(rules)
            rules.append(rule)
        else:
            rules[at] = rule
        _put(entries, ("rules", at), own, ("rules", number))
    return rules


def _put(entries: dict[KeyPath, Placed], path: KeyPath, own: Document, there: KeyPath) -> None:
    """Exchange the places of a value and of all that is in it."""
    for old in [each for each in entries if each[: len(path)] == path]:
        del entries[old]
    for each, entry in own.entries.items():
        if each[: len(there)] == there:
            entries[(*path, *each[len(there) :])] = entry
