"""Checks of ``tests``: their graphs, and the rules, operators and steps that they name."""

from __future__ import annotations

from collections.abc import Collection

from fxcompress.rules.language.diagnostics import suggest
from fxcompress.rules.language.document import KeyPath
from fxcompress.rules.language.findings import Findings
from fxcompress.rules.language.schema import Case, CaseNode, reads
from fxcompress.rules.language.vocabulary import ALL_OPERATORS, INPUT, OPERATORS, STEPS

_STEPS = ("op", *STEPS)


def check_case(
    findings: Findings,
    case: Case,
    path: KeyPath,
    first_lines: dict[str, int],
    ids: Collection[str] | None,
) -> None:
    """Report what is wrong with a test of a rule file.

    Args:
        findings: gains the problems.
        case: the test.
        path: its place.
        first_lines: names of tests and where they stand; gains this one.
        ids: of all rules; None if some of them are not known.
    """
    if case.name is not None:
        what = f"test '{case.name}' is there"
        findings.once(case.name, (*path, "name"), first_lines, "duplicate-test", what)
    paths: dict[str, None] | None = None
    if case.graph is not None:
        for name, node in case.graph.items():
            _check_node(findings, name, node, (*path, "graph", name))
        order = {name: reads(node) for name, node in case.graph.items()}
        findings.order(order, (*path, "graph"), "graph-cycle")
        paths = {
            name if node.path is None else node.path: None
            for name, node in case.graph.items()
            if node.op != INPUT
        }
    for rule_id, wanted in case.matches.items():
        here = (*path, "matches", rule_id)
        _check_rule(findings, rule_id, here, ids)
        for index, members in enumerate(wanted):
            listed = (members,) if isinstance(members, str) else members
            for number, member in enumerate(listed):
                _check_path(findings, member, (*here, index, number), paths, value=True)
    for rule_id, missed in case.misses.items():
        here = (*path, "misses", rule_id)
        _check_rule(findings, rule_id, here, ids)
        matched = {
            member
            for members in case.matches.get(rule_id, ())
            for member in ((members,) if isinstance(members, str) else members)
        }
        for name, reason in missed.items():
            _check_path(findings, name, (*here, name), paths, value=False)
            # A reason is a step, or any text of the real one; what is nearly a step is a slip.
            hint = suggest(reason, _STEPS)
            if reason.isidentifier() and reason not in _STEPS and hint:
                message = f"there is no step '{reason}'"
                findings.report((*here, name), "unknown-step", message, hint, value=True)
            if name in matched:
                message = f"'{name}' cannot be both matched and missed"
                findings.report((*here, name), "contradiction", message)


def _check_node(findings: Findings, name: str, node: CaseNode, path: KeyPath) -> None:
    if node.op == INPUT:
        for key in [*sorted(node.model_fields_set - {"op"}), *node.attributes]:
            findings.report((*path, key), "wrong-place", f"a value from outside has no '{key}'")
    elif findings.operator(node.op, (*path, "op"), rewritable=False):
        findings.attributes(node, path, (node.op,))
        for attribute, value in node.attributes.items():
            # A list is an "or" in a pattern; an operator of a graph has one value.
            kind = ALL_OPERATORS[node.op].get(attribute)
            one = value if kind is not None and kind.kind.startswith("ints") else (value,)
            if isinstance(one, tuple) and any(isinstance(item, tuple) for item in one):
                message = f"{node.op}'s {attribute} has several values; an operator has one"
                place = (*path, attribute)
                findings.report(place, "bad-attribute-value", message, value=True)
        if node.weight is not None and node.op not in OPERATORS:
            findings.report((*path, "weight"), "wrong-place", f"{node.op} reads no weight")
    findings.one_source(name, node, path)


def _check_rule(
    findings: Findings, rule_id: str, path: KeyPath, ids: Collection[str] | None
) -> None:
    if ids is not None and rule_id not in ids:
        hint = suggest(rule_id, ids)
        findings.report(path, "unknown-rule", f"there is no rule '{rule_id}'", hint)


def _check_path(
    findings: Findings, name: str, path: KeyPath, paths: Collection[str] | None, *, value: bool
) -> None:
    if paths is not None and name not in paths:
        hint = suggest(name, paths)
        findings.report(path, "unknown-path", f"the graph has no '{name}'", hint, value=value)
