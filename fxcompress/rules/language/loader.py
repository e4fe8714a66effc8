"""From a rule file to checked rules that remember where they stand.

>>> loaded = parse_rules('''
... budget: {keep: 0.8}
... rules:
...   - id: mlp
...     match: {node: {op: linear, as: fc, name: "*.mlp.*"}}
...     where: [fc.in_features >= 256]
...     rewrite: {form: pivoted}
... ''', "rules.yaml")
>>> loaded.location("mlp"), loaded.location("mlp", "where", 0)
('rules.yaml:4', 'rules.yaml:6:13')
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType

import yaml

from fxcompress.errors import RuleError
from fxcompress.forms.template import Template
from fxcompress.rules.language.checks import check_rules
from fxcompress.rules.language.diagnostics import Diagnostic, Source, Span, render
from fxcompress.rules.language.document import (
    Core,
    Document,
    KeyPath,
    Placed,
    nearest,
    read_document,
)
from fxcompress.rules.language.expressions import Expression, ExpressionError
from fxcompress.rules.language.extending import extended
from fxcompress.rules.language.reading import MOST_BYTES, read_source, unusable
from fxcompress.rules.language.schema import Rule, RuleSet
from fxcompress.rules.language.validation import validate


class _Dumper(yaml.SafeDumper):
    """Quotes what YAML 1.2 would not read as a string, and nothing else."""

    yaml_implicit_resolvers = Core.yaml_implicit_resolvers


@dataclass(frozen=True)
class LoadedRules:
    """Rules together with the text that they came from.

    Attributes:
        rules: the checked rule set.
        filename: as it appears in locations.
        text: the source.
        entries: path of keys (``("rules", 0, "where", 1)``) -> where that value stands.
        expressions: rule id -> its ``where`` conditions.
        templates: rule id -> its ``graph``, for rules that have one.
        bases: the files that it builds on, in the order of ``Span.source``.
    """

    rules: RuleSet
    filename: str
    text: str = field(repr=False)
    entries: Mapping[KeyPath, Placed] = field(repr=False)
    expressions: Mapping[str, tuple[Expression, ...]] = field(repr=False)
    templates: Mapping[str, Template] = field(repr=False, default_factory=dict)
    bases: tuple[Source, ...] = field(repr=False, default=())

    def location(self, rule_id: str, *keys: str | int) -> str:
        """``"file:line"`` of a rule, or ``"file:line:column"`` of a value inside it.

        A key that the file leaves out gives the nearest thing around it.

        Raises:
            KeyError: no rule has that id.
        """
        path = self._path(rule_id)
        if not keys:
            span = self.entries[path].value
            return f"{self._file(span)}:{span.line}"
        return self.place(*path, *keys)

    def place(self, *keys: str | int) -> str:
        """``"file:line:column"`` of any value, or of the nearest thing around it.

        >>> parse_rules("budget: {keep: 1}\\nrules: [{id: a, match: {node: {op: linear}}, "
        ...             "rewrite: none}]", "r.yaml").place("budget", "keep")
        'r.yaml:1:16'
        """
        span = self.entries[nearest(self.entries, keys)].value
        return f"{self._file(span)}:{span.line}:{span.column}"

    @property
    def each(self) -> tuple[LoadedRule, ...]:
        """The rules one by one, in file order."""
        return tuple(LoadedRule(rule, number, self) for number, rule in enumerate(self.rules.rules))

    def named(self, rename: Callable[[str], str]) -> LoadedRules:
        """The rules with other names of the files in locations."""
        bases = tuple(replace(base, filename=rename(base.filename)) for base in self.bases)
        return replace(self, filename=rename(self.filename), bases=bases)

    def _file(self, span: Span) -> str:
        return self.bases[span.source - 1].filename if span.source else self.filename

    def _path(self, rule_id: str) -> KeyPath:
        for index, rule in enumerate(self.rules.rules):
            if rule.id == rule_id:
                return ("rules", index)
        raise KeyError(rule_id)


@dataclass(frozen=True)
class LoadedRule:
    """One rule with its place in the file.

    Attributes:
        rule: the checked rule.
        number: its place among the rules.
        file: all of them.
    """

    rule: Rule
    number: int
    file: LoadedRules

    @property
    def line(self) -> str:
        """``"file:line"`` of the rule."""
        return self.file.location(self.rule.id)

    @property
    def source(self) -> Source:
        """The file that it stands in."""
        file = self.file
        at = file.entries["rules", self.number].value.source
        return file.bases[at - 1] if at else Source(file.filename, file.text)

    @property
    def expressions(self) -> tuple[Expression, ...]:
        """The ``where`` conditions of the rule."""
        return self.file.expressions[self.rule.id]

    @property
    def template(self) -> Template | None:
        """The ``graph`` of the rule, if it has one."""
        return self.file.templates.get(self.rule.id)

    def at(self, *keys: str | int) -> str:
        """``"file:line:column"`` of a value inside the rule, or of the nearest thing around it."""
        return self.file.place("rules", self.number, *keys)

    def failed(self, index: int, error: ExpressionError, operator: str) -> RuleError:
        """The located error for a ``where`` condition that failed on an operator."""
        entry = self.file.entries[("rules", self.number, "where", index)]
        message = f"on operator '{operator}': {error.message}"
        item = Diagnostic(error.code, message, entry.part(error.offset, error.length))
        return RuleError(render([item], self.file.filename, self.file.text, self.file.bases))


def load_rules(source: str | os.PathLike[str] | RuleSet) -> LoadedRules:
    """Rules from a file, from a preset ("decoder", "encoder", "every-linear"), or from Python.

    A :class:`RuleSet` made in Python is written as YAML and read back, so that it passes
    the same checks and its rules have locations too.

    >>> load_rules("decoder").rules.budget.keep
    0.8

    Raises:
        RuleError: every problem of the file, or why it cannot be read.
    """
    if isinstance(source, RuleSet):
        plain = source.model_dump(mode="json", by_alias=True, exclude_defaults=True)
        text = yaml.dump(
            plain, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=MOST_BYTES
        )
        return parse_rules(text, "<RuleSet>")
    read, path = read_source(source)
    return parse_rules(read.text, read.filename, path.parent)


def parse_rules(text: str, filename: str, directory: Path | None = None) -> LoadedRules:
    """Rules from YAML text.

    Args:
        text: the YAML.
        filename: what locations show.
        directory: that the path after ``extends`` starts from; the current one if left out.

    Raises:
        RuleError: every problem found in the text.
    """
    if len(text) > MOST_BYTES:
        raise unusable(filename, "too-large", f"more than {MOST_BYTES:,} characters")
    text = text.removeprefix("\ufeff")
    document = read_document(text)
    if not isinstance(document.data, dict):
        raise _not_a_mapping(document, filename, text)
    document, bases = extended(document, directory or Path())
    valid, shape = validate(document)
    checked = check_rules(document, valid)
    # A line that YAML itself misread, and characters that the reader has complained about, are
    # not worth a second complaint.
    told = {item.span for item in document.diagnostics}
    misread = {
        (item.span.source, item.span.line)
        for item in document.diagnostics
        if item.span and item.code.startswith("yaml-")
    }
    new = [
        item
        for item in dict.fromkeys((*shape, *checked.diagnostics))
        if item.span is None
        or not (item.span in told or (item.span.source, item.span.line) in misread)
    ]
    diagnostics = [*document.diagnostics, *new]
    if diagnostics or valid.whole is None:
        raise RuleError(render(diagnostics, filename, text, bases))
    return LoadedRules(
        valid.whole,
        filename,
        text,
        MappingProxyType(dict(document.entries)),
        MappingProxyType(dict(checked.expressions)),
        MappingProxyType(dict(checked.templates)),
        bases,
    )


def _not_a_mapping(document: Document, filename: str, text: str) -> RuleError:
    problems = list(document.diagnostics)
    if not problems and document.data is None:
        problems.append(
            Diagnostic("empty", "an empty rule file", hint="it needs at least 'budget' and 'rules'")
        )
    elif not problems:
        what = "a list" if isinstance(document.data, list) else "plain text"
        hint = "rules go under the key 'rules'" if what == "a list" else ""
        message = f"a rule file is a mapping, not {what}"
        problems.append(Diagnostic("not-a-mapping", message, document.entries[()].value, hint))
    return RuleError(render(problems, filename, text))
