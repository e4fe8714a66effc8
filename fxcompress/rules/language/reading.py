"""The text of a rule file or of a preset."""

from __future__ import annotations

import os
from pathlib import Path

from fxcompress.errors import RuleError
from fxcompress.rules.language.diagnostics import Diagnostic, Source, choices, render, suggest
from fxcompress.rules.language.presets import preset_names, preset_path

MOST_BYTES = 64_000
"""What PyYAML reads in about half a second; rule files have a few thousand."""


def read_source(name: str | os.PathLike[str]) -> tuple[Source, Path]:
    """The text of a rule file or of a preset, and where it is.

    Raises:
        RuleError: it cannot be read.
    """
    given = os.fspath(name)
    preset = preset_path(given) if isinstance(name, str) else None
    path = preset or Path(given)
    try:
        size = path.stat().st_size
        if size > MOST_BYTES:
            raise unusable(given, "too-large", f"{size:,} bytes; at most {MOST_BYTES:,}")
        raw = path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        reason = getattr(error, "strerror", None) or str(error)
        presets = preset_names()
        hint = suggest(given, presets) or f"presets are {choices(presets)}"
        raise unusable(given, "unreadable", f"cannot read it: {reason}", hint) from None
    # A preset shows as "decoder.yaml": where it is installed says nothing about the rules.
    shown = path.name if preset else given
    return Source(shown, _decode(raw, shown)), path


def unusable(filename: str, code: str, message: str, hint: str = "") -> RuleError:
    """The error of a file that could not be read at all."""
    return RuleError(render([Diagnostic(code, message, hint=hint)], filename, ""))


def _decode(raw: bytes, filename: str) -> str:
    if b"\0" in raw:
        raise unusable(filename, "binary", "a binary file, not YAML text")
    try:
        return raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        before = raw[: error.start]
        line = before.count(b"\n") + 1
        column = error.start - (before.rfind(b"\n") + 1) + 1
        raise RuleError(
            f"{filename}:{line}:{column} error[not-utf-8]: byte 0x{raw[error.start]:02x} is not "
            "UTF-8\n   save the file as UTF-8"
        ) from None
