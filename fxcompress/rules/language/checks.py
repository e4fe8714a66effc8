"""What the schema cannot check: operators, attributes, forms, globs, expressions, ids.

The checks see validated rules only; in a file whose shape is wrong somewhere, what is right of it
key by key, so that all problems show at once.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field

from fxcompress.forms.template import Template
from fxcompress.rules.language.case_checks import check_case
from fxcompress.rules.language.diagnostics import Diagnostic
from fxcompress.rules.language.document import Document, KeyPath
from fxcompress.rules.language.expressions import Expression, ExpressionError, parse_expression
from fxcompress.rules.language.findings import EnoughError, Findings, shared_attributes
from fxcompress.rules.language.match_checks import check_match
from fxcompress.rules.language.rewrite_checks import check_protection, check_rewrite
from fxcompress.rules.language.schema import Exclusion, Rewrite, Rule
from fxcompress.rules.language.validation import Valid


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


def check_rules(document: Document, valid: Valid) -> Checked:
    """Check the rules and tests of a document."""
    checks = _Checks(Findings(document))
    with suppress(EnoughError):
        for index, rule in enumerate(valid.rules):
            checks.rule(rule, ("rules", index))
        ids = None if any(rule.id is None for rule in valid.rules) else [*checks.first_lines]
        first_lines: dict[str, int] = {}
        for index, case in enumerate(valid.tests):
            check_case(checks.findings, case, ("tests", index), first_lines, ids)
    return Checked(tuple(checks.findings.diagnostics), checks.expressions, checks.templates)


@dataclass
class _Checks:
    """Checks rule by rule."""

    findings: Findings
    expressions: dict[str, tuple[Expression, ...]] = field(default_factory=dict)
    templates: dict[str, Template] = field(default_factory=dict)
    first_lines: dict[str, int] = field(default_factory=dict)

    def rule(self, rule: Rule, path: KeyPath) -> None:
        findings = self.findings
        patterns = check_match(findings, rule.match, path) if rule.match is not None else ()
        bound: dict[str, tuple[str, ...]] = {}
        for pattern in patterns:
            for name, each in pattern.names.items():
                bound[name] = (*bound.get(name, ()), *each.ops)
        for index, entry in enumerate(rule.unless):
            self.exclusion(entry, (*path, "unless", index), bound)
        expressions = self.where(rule.where, (*path, "where"), bound)
        template: Template | None = None
        if isinstance(rule.rewrite, Rewrite):
            place = (*path, "rewrite")
            template = check_rewrite(findings, rule.rewrite, place, str(rule.id), patterns)
        elif rule.rewrite is not None:
            check_protection(findings, patterns)
        if rule.id is None:
            return
        what = f"rule id '{rule.id}' is used"
        findings.once(rule.id, (*path, "id"), self.first_lines, "duplicate-id", what)
        self.expressions[rule.id] = expressions
        if template is not None:
            self.templates[rule.id] = template

    def exclusion(
        self, entry: Exclusion, path: KeyPath, bound: Mapping[str, tuple[str, ...]]
    ) -> None:
        """One entry of ``unless``; its attributes are of the operators that it is about."""
        findings, node = self.findings, entry.node
        findings.globs(entry.name, (*path, "name"))
        findings.globs(entry.scope, (*path, "scope"))
        if entry.shares_weight_with is not None:
            place = (*path, "shares_weight_with")
            findings.operator(entry.shares_weight_with, place, rewritable=True)
        if node is not None and bound and node not in bound:
            message = f"the pattern binds no '{node}'"
            findings.unknown((*path, "node"), "unknown-node", message, node, list(bound))
            return
        ops = sum(bound.values(), ()) if node is None else bound.get(node, ())
        findings.attributes(entry, path, ops, some=True)

    def where(
        self, where: Sequence[str], path: KeyPath, bound: Mapping[str, tuple[str, ...]]
    ) -> tuple[Expression, ...]:
        if not bound or not all(bound.values()):
            return ()
        # In every match, an attribute has to be one of the operator that is bound there.
        scope = {name: sorted(shared_attributes(ops)) for name, ops in bound.items()}
        found: list[Expression] = []
        for index, text in enumerate(where):
            try:
                found.append(parse_expression(text, scope))
            except ExpressionError as error:
                self.findings.expression(error, text, (*path, index), len(where))
        return tuple(found)
