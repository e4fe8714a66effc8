"""Rules that matched nothing, or not what they expect: what to tell the user."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from typing import Literal

from fxcompress.rules.language.loader import LoadedRules
from fxcompress.rules.language.schema import Rule
from fxcompress.rules.language.vocabulary import ALL_OPERATORS, OPERATORS
from fxcompress.rules.matching.dead import dead_globs
from fxcompress.rules.matching.result import Problem
from fxcompress.rules.matching.run import Run, pattern_nodes
from fxcompress.rules.matching.sites import SiteIndex

_NEAREST = 3


def find_problems(
    loaded: LoadedRules, runs: Sequence[Run], index: SiteIndex
) -> tuple[Problem, ...]:
    """What is to be told of a match.

    A warning for every rule that matched nothing and for every glob that hits nothing, an error
    for every unmet ``expect``.
    """
    problems: list[Problem] = []
    dead = dead_globs(index)
    for run in runs:
        rule, kept = run.rule, run.count
        problems += [Problem("warning", rule.id, text) for text in run.warnings()]
        if kept:  # of a rule without any match that is said below
            problems += [Problem("warning", rule.id, text) for text in dead(run.loaded)]
        severity: Literal["warning", "error"]
        if rule.expect is not None:
            wanted = rule.expect.range
            if wanted.min <= kept and (wanted.max is None or kept <= wanted.max):
                continue
            severity, code, location = "error", "expect", run.loaded.at("expect")
            message = (
                f"expects {_range(wanted.min, wanted.max, run.unit)}, and matches "
                f"{_counted(kept, run.unit)}"
            )
        elif kept == 0:
            severity, code, location = "warning", "no-match", run.loaded.line
            message = "matches nothing"
        else:
            continue
        head = f"{location} {severity}[{code}]: rule '{rule.id}' {message}"
        problems.append(Problem(severity, rule.id, _text(head, run, index)))
    return tuple(problems)


def _text(head: str, run: Run, index: SiteIndex) -> str:
    funnel = run.funnel()
    lines = [head, str(funnel)]
    if funnel["op"] == 0:
        words = OPERATORS if OPERATORS.keys() >= set(funnel.ops) else ALL_OPERATORS
        there = [op for op in words if op in index.by_op]
        ops = " or ".join(funnel.ops)
        lines.append(f"the graph has no {ops}; it has {', '.join(there) or 'no weights'}")
    elif funnel["kept"] == 0:
        lost = next(step for step, count in funnel.steps if count == 0)
        step = "overlap" if lost == "kept" else lost
        unit = "operator" if funnel.anchors else "site"
        lines.append(f"the last of {_counted(funnel['op'], unit)} went at step '{step}'")
        if lost == "name":
            lines += _close_names(run.rule, index)
    lines += [
        f"near miss  {site.path or site.first.name}   {lost.reason}"
        for site, lost in run.losses().furthest(_NEAREST)
    ]
    return "\n   ".join(lines)


def _close_names(rule: Rule, index: SiteIndex) -> list[str]:
    """Advice on a glob that no path matches: its parts compared with the parts of the paths."""
    nodes = pattern_nodes(rule)
    paths = [
        operator.path
        for node in nodes
        for op in node.op
        for site in index.by_op.get(op, ())
        for operator in site.operators
    ]
    parts = {part for path in paths for part in path.split(".") if not part.isdigit()}
    lines: list[str] = []
    for glob in dict.fromkeys(g for node in nodes for g in node.name or ()):
        for word in dict.fromkeys(re.findall(r"[A-Za-z0-9_]*[A-Za-z_][A-Za-z0-9_]*", glob)):
            if any(word in part for part in parts):
                continue
            close = difflib.get_close_matches(word, sorted(parts)[:2000], n=3)
            if close:
                lines.append(f"no path has '{word}'; close: {', '.join(close)}")
    return lines


def _range(low: int, high: int | None, unit: str) -> str:
    if high is None:
        return f"at least {_counted(low, unit)}"
    return _counted(low, unit) if low == high else f"{low} to {_counted(high, unit)}"


def _counted(count: int, unit: str) -> str:
    if count == 1:
        return f"{count} {unit}"
    return f"{count} {unit}es" if unit.endswith("ch") else f"{count} {unit}s"
