"""Error messages with a place: ``file:line:column``, the source line, carets, a suggestion.

>>> print(render([Diagnostic("unknown-key", "unknown key 'mach'", Span(1, 1, 4),
...                          "did you mean 'match'?")], "r.yaml", "mach: {}"))
r.yaml:1:1 error[unknown-key]: unknown key 'mach'
   mach: {}
   ^^^^ did you mean 'match'?
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

_MOST_SHOWN = 50
_WIDEST = 120


@dataclass(frozen=True, order=True)
class Span:
    """A stretch of one line of the source; line and column count from 1."""

    line: int
    column: int
    length: int = 1


@dataclass(frozen=True)
class Diagnostic:
    """One problem in a rule file.

    Attributes:
        code: short name of the kind of problem (``"unknown-key"``).
        message: what is wrong.
        span: where; None for a file that could not be read at all.
        hint: what to do about it, printed after the carets; may be empty.
    """

    code: str
    message: str
    span: Span | None = None
    hint: str = ""


def split_lines(text: str) -> list[str]:
    """The lines of a YAML text, by YAML's line breaks (not by Python's, which has more)."""
    return re.split("\r\n|[\r\n\x85\u2028\u2029]", text)


_OTHER_WORDS = {
    **dict.fromkeys(("flops", "flop", "madds", "multiply_accumulates"), "macs"),
    **dict.fromkeys(("time", "seconds", "speed", "ms"), "latency"),
    **dict.fromkeys(("weights", "size", "numel"), "parameters"),
    **dict.fromkeys(("memory", "mib", "mb"), "bytes"),
}
"""What others call a word of ours, where the letters do not tell."""


def suggest(word: str, known: Collection[str]) -> str:
    """``"did you mean 'linear'?"`` for a word close to a known one, otherwise ``""``.

    >>> suggest("in_feature", ["in_features", "bias"])
    "did you mean 'in_features'?"
    >>> suggest("FLOPs", ["parameters", "macs"])
    "did you mean 'macs'?"
    """
    other = _OTHER_WORDS.get(word.lower())
    if other in known:
        return f"did you mean '{other}'?"
    close = difflib.get_close_matches(word[:100], list(known), n=1)
    if not close:
        # difflib is case-sensitive, and 'Linear' is what people write first.
        folded = {name.lower(): name for name in known}
        close = [folded[word.lower()]] if word.lower() in folded else []
    return f"did you mean '{close[0]}'?" if close else ""


def choices(known: Collection[str]) -> str:
    """``"one of: a, b"``: the hint where nothing comes close."""
    return "one of: " + ", ".join(known)


def render(diagnostics: Sequence[Diagnostic], filename: str, text: str) -> str:
    """All problems as one text, in the order of the file."""
    lines = split_lines(text)
    nowhere = Span(1, 1)
    ordered = sorted(diagnostics, key=lambda item: item.span or nowhere)
    blocks = [_block(item, filename, lines) for item in ordered[:_MOST_SHOWN]]
    if len(ordered) > _MOST_SHOWN:
        blocks.append(f"{filename}: and {len(ordered) - _MOST_SHOWN} more errors")
    return _printable("\n".join(blocks))


def _block(item: Diagnostic, filename: str, lines: Sequence[str]) -> str:
    span = item.span or Span(1, 1)
    head = f"{filename}:{span.line}:{span.column} error[{item.code}]: {_one_line(item.message)}"
    hint = _one_line(item.hint)
    if item.span is None or span.line > len(lines):
        return f"{head}\n   {hint}" if hint else head
    line = lines[span.line - 1]
    shown = line.lstrip()
    at = max(0, span.column - 1 - (len(line) - len(shown)))
    if len(shown) > _WIDEST:
        # Keep the offending part of a very long line in view.
        cut = max(0, at - _WIDEST // 2)
        shown = ("…" if cut else "") + shown[cut : cut + _WIDEST] + "…"
        at += (1 if cut else 0) - cut
    carets = "^" * max(1, min(span.length, len(shown) - at))
    return f"{head}\n   {_one_line(shown)}\n   {' ' * at}{carets} {hint}".rstrip()


def _one_line(text: str) -> str:
    # One character for one, so that the carets stay in place.
    return "".join(c if c.isprintable() else " " for c in text)


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode("utf-8")
