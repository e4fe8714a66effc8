"""Checks of ``tests``: their graphs, and the rules, operators and steps that they name."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from graphlib import CycleError, TopologicalSorter
from typing import Any

from fxcompress.rules.language.diagnostics import suggest
from fxcompress.rules.language.document import KeyPath
from fxcompress.rules.language.findings import Findings, one_or_many
from fxcompress.rules.language.vocabulary import ALL_OPERATORS, INPUT, OPERATORS, STEPS

_KEYS = frozenset({"op", "path", "scope", "input", "inputs", "weight"})
_STEPS = ("op", *STEPS)


def check_cases(findings: Findings, tests: Any, rule_ids: Collection[str]) -> None:
    """Report what is wrong with the tests of a rule file."""
    names: dict[str, int] = {}
    for index, case in enumerate(tests if isinstance(tests, list) else []):
        if not isinstance(case, dict):
            continue
        path: KeyPath = ("tests", index)
        name = case.get("name")
        if isinstance(name, str):
            place = (*path, "name")
            if name in names:
                message = f"test '{name}' is there twice (first on line {names[name]})"
                findings.report(place, "duplicate-test", message, value=True)
            names.setdefault(name, findings.line(place))
        paths = _check_graph(findings, case.get("graph"), (*path, "graph"))
        _check_expected(findings, case, path, rule_ids, paths)
        _check_contradictions(findings, case, path)


def _check_graph(findings: Findings, graph: Any, path: KeyPath) -> dict[str, None] | None:
    """The module paths in a graph; None if it is none."""
    if not isinstance(graph, dict):
        return None
    nodes = {name: node for name, node in graph.items() if isinstance(node, dict)}
    reads: dict[str, list[str]] = {}
    for name, node in nodes.items():
        here = (*path, name)
        op = node.get("op")
        if op == INPUT:
            for key in node.keys() - {"op"}:
                message = f"a value from outside has no '{key}'"
                findings.report((*here, key), "wrong-place", message)
        elif isinstance(op, str) and findings.operator(op, (*here, "op"), rewritable=False):
            findings.attributes(node, here, (op,), _KEYS)
            _check_values(findings, node, here, op)
            if node.get("weight") is not None and op not in OPERATORS:
                findings.report((*here, "weight"), "wrong-place", f"{op} reads no weight")
        if node.get("input") is not None and node.get("inputs") is not None:
            message = f"'{name}' takes one of 'input' and 'inputs'; it has both"
            findings.report((*here, "inputs"), "both-inputs", message)
        given = one_or_many(node.get("input"), here) + one_or_many(node.get("inputs"), here)
        reads[name] = [value[1:] for value, _ in given if value[1:] in nodes]
    try:
        TopologicalSorter(reads).prepare()
    except CycleError as error:
        cycle: Sequence[str] = error.args[1]
        message = f"nodes read one another in a circle: {' -> '.join(cycle)}"
        first = next(name for name in nodes if name in cycle)
        findings.report((*path, first), "graph-cycle", message)
    found = [(n.get("path"), name) for name, n in nodes.items() if n.get("op") != INPUT]
    return {given if isinstance(given, str) else name: None for given, name in found}


def _check_values(findings: Findings, node: Mapping[str, Any], path: KeyPath, op: str) -> None:
    """A list is an "or" in a pattern; an operator of a graph has one value for an attribute."""
    for attribute, kind in ALL_OPERATORS[op].items():
        value = node.get(attribute)
        items = value if isinstance(value, list) and kind.kind.startswith("ints") else [value]
        if any(isinstance(item, list) for item in items):
            message = f"{op}'s {attribute} has several values; an operator has one"
            findings.report((*path, attribute), "bad-attribute-value", message, value=True)


def _check_expected(
    findings: Findings,
    case: Mapping[str, Any],
    path: KeyPath,
    rule_ids: Collection[str],
    paths: Collection[str] | None,
) -> None:
    for key in ("matches", "misses"):
        expected = case.get(key)
        for rule_id, wanted in (expected if isinstance(expected, dict) else {}).items():
            here = (*path, key, rule_id)
            if rule_id not in rule_ids:
                hint = suggest(rule_id, rule_ids)
                findings.report(here, "unknown-rule", f"there is no rule '{rule_id}'", hint)
            if key == "misses" and isinstance(wanted, dict):
                for missed, reason in wanted.items():
                    _check_path(findings, missed, (*here, missed), paths, value=False)
                    if isinstance(reason, str):
                        _check_reason(findings, reason, (*here, missed))
            for place, item in _listed(wanted, here):
                for member, at in one_or_many(item, place):
                    _check_path(findings, member, at, paths, value=True)


def _check_contradictions(findings: Findings, case: Mapping[str, Any], path: KeyPath) -> None:
    """No rule both matches and misses a path."""
    matches, misses = case.get("matches"), case.get("misses")
    for rule_id, wanted in (misses if isinstance(misses, dict) else {}).items():
        listed = _listed(matches.get(rule_id) if isinstance(matches, dict) else None, path)
        matched = {member for place, item in listed for member, _ in one_or_many(item, place)}
        for missed in wanted if isinstance(wanted, dict) else ():
            if missed in matched:
                message = f"'{missed}' cannot be both matched and missed"
                findings.report((*path, "misses", rule_id, missed), "contradiction", message)


def _listed(wanted: Any, path: KeyPath) -> list[tuple[KeyPath, Any]]:
    items = wanted if isinstance(wanted, list) else []
    return [((*path, index), item) for index, item in enumerate(items)]


def _check_path(
    findings: Findings, name: str, place: KeyPath, paths: Collection[str] | None, *, value: bool
) -> None:
    if paths is not None and name not in paths:
        hint = suggest(name, paths)
        findings.report(place, "unknown-path", f"the graph has no '{name}'", hint, value=value)


def _check_reason(findings: Findings, reason: str, place: KeyPath) -> None:
    # A reason is a step, or any text of the real one; a word that is nearly a step is a slip.
    hint = suggest(reason, _STEPS)
    if reason.isidentifier() and reason not in _STEPS and hint:
        findings.report(place, "unknown-step", f"there is no step '{reason}'", hint, value=True)
