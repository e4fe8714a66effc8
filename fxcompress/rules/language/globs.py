"""Globs over dotted module paths.

``*`` matches any text, dots included; ``?`` one character; ``[0-9]`` and ``[!a]`` one of a
set; ``{q,k}`` either alternative, and ``{,*.}`` an optional prefix.  Case counts.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable

_MOST_ALTERNATIVES = 256
_MOST_CHARACTERS = 500
_MOST_IN_ALL = 10_000


class GlobError(ValueError):
    """A glob that cannot be read; the text says why."""


def compile_globs(patterns: Iterable[str]) -> re.Pattern[str]:
    """One regular expression that matches a path which any of the globs matches.

    >>> bool(compile_globs(["*.{q,k}_proj"]).match("layers.0.self_attn.q_proj"))
    True
    >>> bool(compile_globs(["*.mlp.*"]).match("lm_head"))
    False

    Raises:
        GlobError: an unbalanced bracket or brace, or too many alternatives.
    """
    # The standard library's translation uses atomic groups, so that no glob can backtrack
    # exponentially; braces are expanded first because it does not know them.
    return re.compile(
        "|".join(fnmatch.translate(flat) for pattern in patterns for flat in expand(pattern))
    )


def glob_for_regex(pattern: str) -> str | None:
    """What to write for a pattern that is a regular expression; None if it is a glob.

    >>> glob_for_regex(r"^model\\..*\\.(q|k)_proj$"), glob_for_regex("model.*.{q,k}_proj")
    ('model.*.{q,k}_proj', None)
    """
    if not re.search(r"^\^|\$$|\\|^\.\*|\.\+|\|", pattern):
        return None
    glob = pattern.removeprefix("^").removesuffix("$")
    glob = re.sub(r"\\d\+?|\[0-9\]\+", "*", glob)
    glob = re.sub(r"\((?:\?:)?([^()]*)\)", lambda found: f"{{{found[1].replace('|', ',')}}}", glob)
    glob = re.sub(r"(?<!\\)\.[*+]\??", "*", glob).replace("\\.", ".")
    return "*" if re.search(r"[\\()|^$+]", glob) else glob


def expand(pattern: str) -> tuple[str, ...]:
    """The globs without braces that together mean the same as ``pattern``.

    >>> expand("*.{q,k}_proj")
    ('*.q_proj', '*.k_proj')

    Raises:
        GlobError: an unbalanced bracket or brace, or too many alternatives.
    """
    if not pattern:
        raise GlobError("an empty glob matches nothing")
    if len(pattern) > _MOST_CHARACTERS:
        raise GlobError(f"a glob of {len(pattern)} characters; at most {_MOST_CHARACTERS}")
    finished: list[str] = []
    waiting = [pattern]
    while waiting:
        glob = waiting.pop(0)
        found = _first_braces(glob)
        if found is None:
            finished.append(glob)
        else:
            start, end, alternatives = found
            waiting = [glob[:start] + a + glob[end:] for a in alternatives] + waiting
        count = len(finished) + len(waiting)
        if count > _MOST_ALTERNATIVES:
            raise GlobError(f"the braces stand for more than {_MOST_ALTERNATIVES} globs")
        if count * len(glob) > _MOST_IN_ALL:
            raise GlobError(f"the braces stand for more than {_MOST_IN_ALL:,} characters")
    return tuple(finished)


def _first_braces(glob: str) -> tuple[int, int, list[str]] | None:
    """Start, end and alternatives of the first outermost ``{...}``; None if there is none."""
    depth = 0
    start = 0
    pieces: list[str] = []
    piece = 0
    index = 0
    while index < len(glob):
        character = glob[index]
        if character == "[":
            # A set may hold ']' as its first member, as in the shell.
            first = index + 2 if glob[index + 1 : index + 2] == "!" else index + 1
            close = glob.find("]", first + 1)
            if close < 0:
                raise GlobError("'[' is never closed")
            index = close
        elif character == "{":
            if depth == 0:
                start = index
                piece = index + 1
            depth += 1
        elif character == "}":
            depth -= 1
            if depth < 0:
                raise GlobError("'}' closes nothing")
            if depth == 0:
                return start, index + 1, [*pieces, glob[piece:index]]
        elif character == "," and depth == 1:
            pieces.append(glob[piece:index])
            piece = index + 1
        index += 1
    if depth:
        raise GlobError("'{' is never closed")
    return None
