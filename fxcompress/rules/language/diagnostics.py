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
from dataclasses import dataclass, field

from fxcompress.operators.words import OPERATORS, TRANSPOSED, operators_of

CONVOLUTIONS = operators_of("convolution")

_MOST_SHOWN = 50
_WIDEST = 120


@dataclass(frozen=True, order=True)
class Span:
    """A stretch of one line of a source; line and column count from 1.

    Attributes:
        source: 0 for the file itself; from 1 on, the files that it builds on.
    """

    line: int
    column: int
    length: int = 1
    source: int = 0


@dataclass(frozen=True)
class Source:
    """A text, and the name that locations show for it."""

    filename: str
    text: str = field(repr=False)


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


def _of_images_first(operators: Collection[str]) -> tuple[str, ...]:
    return tuple(sorted(operators, key=lambda op: (OPERATORS[op].ops[op] != 2, op)))


_OTHER_WORDS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("flops", "flop", "madds", "multiply_accumulates"), ("macs",)),
    **dict.fromkeys(("time", "seconds", "speed", "ms"), ("latency",)),
    **dict.fromkeys(("weights", "size", "numel", "params"), ("parameters",)),
    **dict.fromkeys(("memory", "mib", "mb"), ("bytes",)),
    **dict.fromkeys(("conv", "convolution"), _of_images_first(CONVOLUTIONS - TRANSPOSED)),
    **dict.fromkeys(("deconv", "conv_transpose"), _of_images_first(TRANSPOSED)),
    **dict.fromkeys(("dense", "fc", "mlp", "addmm", "gemm", "attention", "attn"), ("linear",)),
    **dict.fromkeys(("svd", "lora", "lowrank", "factorized"), ("low_rank", "euclidean")),
    **dict.fromkeys(("prune", "pruning", "pruned", "structured"), ("narrow",)),
    **dict.fromkeys(("tucker", "cp"), ("tucker2",)),
    **dict.fromkeys(("fisher", "kl", "hessian", "natural"), ("kfac",)),
    **dict.fromkeys(("frobenius", "l2", "identity", "weight"), ("euclidean",)),
    **dict.fromkeys(("inputs", "wanda", "asvd", "whitening"), ("activation",)),
}
"""What others call words of ours, where the letters do not tell; those that are known count."""

_BESIDE = {
    **dict.fromkeys(("attention", "attn"), ', with name: "*attn*": attention is linear layers'),
}
"""What has to be said with such a word."""


def suggest(word: str, known: Collection[str]) -> str:
    """``"did you mean 'linear'?"`` for a word close to a known one, otherwise ``""``.

    >>> suggest("in_feature", ["in_features", "bias"])
    "did you mean 'in_features'?"
    >>> suggest("FLOPs", ["parameters", "macs"])
    "did you mean 'macs'?"
    >>> suggest("conv", ["conv2d", "linear", "conv1d"])
    "did you mean 'conv2d' or 'conv1d'?"
    """
    others = [each for each in _OTHER_WORDS.get(word.lower(), ()) if each in known]
    if others:
        *most, last = [f"'{each}'" for each in others]
        named = f"{', '.join(most)} or {last}" if most else last
        return f"did you mean {named}{_BESIDE.get(word.lower(), '')}?"
    close = difflib.get_close_matches(word[:100], list(known), n=1)
    if not close:
        # difflib is case-sensitive, and 'Linear' is what people write first.
        folded = {name.lower(): name for name in known}
        close = [folded[word.lower()]] if word.lower() in folded else []
    return f"did you mean '{close[0]}'?" if close else ""


def as_fraction(value: object) -> str:
    """``"80 % is written 0.8"`` of a percentage where a fraction is wanted, otherwise ``""``.

    >>> as_fraction("80%"), as_fraction(80), as_fraction("most")
    ('80 % is written 0.8', '80 % is written 0.8', '')
    """
    found = re.fullmatch(r"\s*(\d{1,3}(?:\.\d{1,6})?)\s*%?\s*", str(value))
    if found is None or not 1 < float(found[1]) <= 100:
        return ""
    return f"{float(found[1]):g} % is written {float(found[1]) / 100:g}"


def choices(known: Collection[str]) -> str:
    """``"one of: a, b"``: the hint where nothing comes close."""
    return "one of: " + ", ".join(known)


def render(
    diagnostics: Sequence[Diagnostic], filename: str, text: str, bases: Sequence[Source] = ()
) -> str:
    """All problems as one text, in the order of the file, and then of those that it builds on."""
    sources = [Source(filename, text), *bases]
    lines = [split_lines(source.text) for source in sources]
    nowhere = Span(1, 1)
    placed = [(item.span or nowhere, item) for item in diagnostics]
    ordered = sorted(placed, key=lambda pair: (pair[0].source, pair[0]))
    blocks = [
        _block(item, sources[span.source].filename, lines[span.source])
        for span, item in ordered[:_MOST_SHOWN]
    ]
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
