"""What the schema cannot check: operators, attributes, forms, globs, expressions, ids.

The checks read the plain data, not the models, so that they still find every problem of a
rule whose shape is wrong elsewhere.  Values of the wrong type are left to the schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from fxcompress.forms.template import Template
from fxcompress.rules.language.case_checks import check_cases
from fxcompress.rules.language.diagnostics import Diagnostic
from fxcompress.rules.language.document import Document, KeyPath
from fxcompress.rules.language.expressions import Expression, ExpressionError, parse_expression
from fxcompress.rules.language.findings import EnoughError, Findings
from fxcompress.rules.language.match_checks import Bindings, check_match
from fxcompress.rules.language.rewrite_checks import check_rewrite
from fxcompress.rules.language.vocabulary import ALL_OPERATORS

_EXCLUSION_KEYS = frozenset({"name", "scope", "node", "shares_weight_with"})


@dataclass(frozen=True)
class Checked:
    """What the checks found.

    Attributes:
        diagnostics: the problems.
        expressions: rule id -> its ``where`` conditions.
        templates: rule id -> its ``graph``, for rules that have one.
    """

    diagnostics: tuple[Diagnostic, ...]
    expressions: Mapping[str, tuple[Expression, ...]]
    templates: Mapping[str, Template]


def check_rules(document: Document) -> Checked:
    """Check a document that may have any shape."""
    findings = Findings(document)
    expressions: dict[str, tuple[Expression, ...]] = {}
    templates: dict[str, Template] = {}
    with suppress(EnoughError):
        _check(findings, expressions, templates)
    return Checked(tuple(findings.diagnostics), expressions, templates)


def _check(
    findings: Findings,
    expressions: dict[str, tuple[Expression, ...]],
    templates: dict[str, Template],
) -> None:
    document = findings.document
    data = document.data if isinstance(document.data, dict) else {}
    first_lines: dict[str, int] = {}
    for rule, path in _mappings(data.get("rules"), ("rules",)):
        name = rule.get("id")
        patterns = check_match(findings, rule.get("match"), (*path, "match"))
        _check_exclusions(findings, rule.get("unless"), (*path, "unless"), patterns)
        found = _check_where(findings, rule.get("where"), (*path, "where"), patterns)
        place = (*path, "rewrite")
        template = check_rewrite(findings, rule.get("rewrite"), place, str(name), patterns)
        if not isinstance(name, str):
            continue
        line = findings.line((*path, "id"))
        if name in first_lines:
            message = f"rule id '{name}' is used twice (first on line {first_lines[name]})"
            findings.report((*path, "id"), "duplicate-id", message, value=True)
        first_lines.setdefault(name, line)
        expressions[name] = found
        if template is not None:
            templates[name] = template
    check_cases(findings, data.get("tests"), first_lines)


def _check_exclusions(
    findings: Findings, unless: Any, path: KeyPath, patterns: Sequence[Bindings]
) -> None:
    bound: dict[str, tuple[str, ...]] = {}
    for pattern in patterns:
        for name, each in pattern.names.items():
            bound[name] = (*bound.get(name, ()), *each.ops)
    for entry, here in _mappings(unless, path):
        for key in ("name", "scope"):
            findings.globs(entry.get(key), (*here, key))
        shares, node = entry.get("shares_weight_with"), entry.get("node")
        if isinstance(shares, str):
            findings.operator(shares, (*here, "shares_weight_with"), rewritable=True)
        if isinstance(node, str):
            node = node.removeprefix("$")  # the schema tells of it
        if isinstance(node, str) and bound and node not in bound:
            message = f"the pattern binds no '{node}'"
            findings.unknown((*here, "node"), "unknown-node", message, node, list(bound))
            continue
        own = bound.get(node, ()) if isinstance(node, str) else tuple(sum(bound.values(), ()))
        for key in entry.keys() - _EXCLUSION_KEYS:
            having = [op for op in own if key in ALL_OPERATORS[op]]
            if having:
                findings.literals(entry[key], (*here, key), having)
            elif own:
                findings.attributes({key: entry[key]}, here, own, _EXCLUSION_KEYS)


def _check_where(
    findings: Findings, where: Any, path: KeyPath, patterns: Sequence[Bindings]
) -> tuple[Expression, ...]:
    ops: dict[str, list[str]] = {}
    for pattern in patterns:
        for name, each in pattern.names.items():
            ops.setdefault(name, []).extend(each.ops)
    if not isinstance(where, list) or not ops or not all(ops.values()):
        return ()
    # In every match, an attribute has to be one of the operator that is bound there.
    scope = {
        name: sorted(set.intersection(*(set(ALL_OPERATORS[op]) for op in own)))
        for name, own in ops.items()
    }
    found: list[Expression] = []
    for index, text in enumerate(where):
        if not isinstance(text, str):
            continue
        try:
            found.append(parse_expression(text, scope))
        except ExpressionError as error:
            findings.expression(error, text, (*path, index), len(where))
    return tuple(found)


def _mappings(value: Any, path: KeyPath) -> Iterator[tuple[dict[str, Any], KeyPath]]:
    """The mappings among the items of a list, with their places."""
    for index, item in enumerate(value if isinstance(value, list) else []):
        if isinstance(item, dict):
            yield item, (*path, index)
