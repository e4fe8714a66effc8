"""Rules that matched nothing, or not what they expect: what to tell the user."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Literal

from fxcompress.rules.loader import LoadedRules
from fxcompress.rules.result import Funnel, Losses, Problem
from fxcompress.rules.schema import Rule
from fxcompress.rules.sites import SiteIndex
from fxcompress.rules.vocabulary import OPERATORS

_NEAREST = 3


def find_problems(
    loaded: LoadedRules,
    funnels: Mapping[str, Funnel],
    lost: Mapping[str, Losses],
    index: SiteIndex,
) -> tuple[Problem, ...]:
    """A warning for every rule that matched nothing, an error for every unmet ``expect``."""
    problems: list[Problem] = []
    for rule in loaded.rules.rules:
        funnel = funnels[rule.id]
        kept = funnel["kept"]
        severity: Literal["warning", "error"]
        if rule.expect is not None:
            wanted = rule.expect.range
            if wanted.min <= kept and (wanted.max is None or kept <= wanted.max):
                continue
            severity, code, location = "error", "expect", loaded.location(rule.id, "expect")
            message = f"expects {_range(wanted.min, wanted.max)}, and matches {_sites(kept)}"
        elif kept == 0:
            severity, code, location = "warning", "no-match", loaded.location(rule.id)
            message = "matches nothing"
        else:
            continue
        head = f"{location} {severity}[{code}]: rule '{rule.id}' {message}"
        text = _text(head, rule, funnel, lost[rule.id], index)
        problems.append(Problem(severity, rule.id, text))
    return tuple(problems)


def _text(head: str, rule: Rule, funnel: Funnel, losses: Losses, index: SiteIndex) -> str:
    lines = [head, str(funnel)]
    if funnel["op"] == 0:
        there = [op for op in OPERATORS if op in index.by_op]
        ops = " or ".join(funnel.ops)
        lines.append(f"the graph has no {ops}; it has {', '.join(there) or 'no weights'}")
    elif funnel["kept"] == 0:
        lost = next(step for step, count in funnel.steps if count == 0)
        lines.append(f"the last of {_sites(funnel['op'])} went at step '{_LOST[lost]}'")
        if lost == "name":
            lines += _close_names(rule, index)
    lines += [
        f"near miss  {site.path or site.first.name}   {lost.reason}"
        for site, lost in losses.furthest(_NEAREST)
    ]
    return "\n   ".join(lines)


_LOST = {step: step for step in ("name", "attribute", "unless", "where", "legal")} | {
    "kept": "overlap"
}


def _close_names(rule: Rule, index: SiteIndex) -> list[str]:
    """Advice on a glob that no path matches: its parts compared with the parts of the paths."""
    paths = [
        operator.path
        for node in rule.match.alternatives
        for site in index.by_op.get(node.op, ())
        for operator in site.operators
    ]
    parts = {part for path in paths for part in path.split(".") if not part.isdigit()}
    lines: list[str] = []
    for glob in dict.fromkeys(g for node in rule.match.alternatives for g in node.name or ()):
        for word in dict.fromkeys(re.findall(r"[A-Za-z0-9_]*[A-Za-z_][A-Za-z0-9_]*", glob)):
            if any(word in part for part in parts):
                continue
            close = difflib.get_close_matches(word, sorted(parts)[:2000], n=3)
            if close:
                lines.append(f"no path has '{word}'; close: {', '.join(close)}")
    return lines


def _range(low: int, high: int | None) -> str:
    if high is None:
        return f"at least {_sites(low)}"
    return _sites(low) if low == high else f"{low} to {high} sites"


def _sites(count: int) -> str:
    return f"{count} site" if count == 1 else f"{count} sites"
