"""What the schema cannot check: operators, attributes, forms, globs, expressions, ids.

The checks read the plain data, not the models, so that they still find every problem of a
rule whose shape is wrong elsewhere.  Values of the wrong type are left to the schema.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from fxcompress.rules.diagnostics import Diagnostic, choices, suggest
from fxcompress.rules.document import Document, KeyPath
from fxcompress.rules.expressions import Expression, ExpressionError, parse_expression
from fxcompress.rules.globs import GlobError, compile_globs
from fxcompress.rules.vocabulary import (
    FORMS,
    LATER_KEYS,
    OPERATORS,
    PLAIN_OPERATORS,
    AttributeType,
    forms_for,
)

_NODE_KEYS = frozenset({"op", "as", "name"})
_EXCLUSION_KEYS = frozenset({"name", "scope", "shares_weight_with"})


def check_rules(document: Document) -> tuple[list[Diagnostic], dict[str, tuple[Expression, ...]]]:
    """The problems found, and the expressions of each rule that has an id."""
    checker = _Checker(document)
    rules = document.data.get("rules") if isinstance(document.data, dict) else None
    expressions: dict[str, tuple[Expression, ...]] = {}
    first_lines: dict[str, int] = {}
    for index, rule in enumerate(rules if isinstance(rules, list) else []):
        if not isinstance(rule, dict):
            continue
        path: KeyPath = ("rules", index)
        found = checker.rule(rule, path)
        name = rule.get("id")
        if not isinstance(name, str):
            continue
        line = document.entries[(*path, "id")].value.line
        if name in first_lines:
            message = f"rule id '{name}' is used twice (first on line {first_lines[name]})"
            checker.report((*path, "id"), "duplicate-id", message, value=True)
        first_lines.setdefault(name, line)
        expressions[name] = found
    return checker.diagnostics, expressions


class _Checker:
    def __init__(self, document: Document) -> None:
        self.document = document
        self.diagnostics: list[Diagnostic] = []

    def report(
        self, path: KeyPath, code: str, message: str, hint: str = "", *, value: bool = False
    ) -> None:
        entry = self.document.entries[path]
        span = entry.value if value else entry.best
        self.diagnostics.append(Diagnostic(code, message, span, hint))

    def rule(self, rule: Mapping[str, Any], path: KeyPath) -> tuple[Expression, ...]:
        ops: list[str] = []
        names: dict[str, KeyPath] = {}
        for node, node_path in _nodes(rule, path):
            op = node.get("op")
            if isinstance(op, str) and self.operator(op, (*node_path, "op")):
                ops.append(op)
                self.node(node, node_path, op)
                self.forms(rule.get("rewrite"), (*path, "rewrite"), op, (*node_path, "op"))
            self.globs(node.get("name"), (*node_path, "name"))
            bound = node.get("as", "node")
            if isinstance(bound, str):
                names.setdefault(bound, (*node_path, "as") if "as" in node else node_path)
        if len(names) > 1:
            first, second, *_ = names
            message = f"alternatives of any_of have to bind the same name: '{first}', '{second}'"
            self.report(names[second], "alternatives-differ", message)
        self.exclusions(rule.get("unless"), (*path, "unless"), ops)
        return self.expressions(rule.get("where"), (*path, "where"), ops, names)

    def operator(self, op: str, path: KeyPath) -> bool:
        if op in OPERATORS:
            return True
        if op in PLAIN_OPERATORS:
            hint = choices(OPERATORS)
            self.report(path, "not-rewritable", f"{op} has no weight to rewrite", hint, value=True)
        else:
            hint = suggest(op, [*OPERATORS, *PLAIN_OPERATORS]) or choices(OPERATORS)
            self.report(path, "unknown-operator", f"unknown operator '{op}'", hint, value=True)
        return False

    def node(self, node: Mapping[str, Any], path: KeyPath, op: str) -> None:
        for key, value in node.items():
            if key in _NODE_KEYS:
                continue
            if key in LATER_KEYS["node"]:
                message = f"'{key}' is not supported by this version"
                self.report((*path, key), "not-supported", message)
            elif key not in OPERATORS[op]:
                hint = suggest(key, [*OPERATORS[op], *_NODE_KEYS])
                hint = hint or choices(OPERATORS[op])
                message = f"{op} has no attribute '{key}'"
                self.report((*path, key), "unknown-attribute", message, hint)
            else:
                self.literal(value, (*path, key), op, key)

    def literal(self, value: Any, path: KeyPath, op: str, attribute: str) -> None:
        kind = OPERATORS[op][attribute]
        wrong = _wrong_literal(value, kind)
        if wrong:
            message = f"{op}'s {attribute} {wrong}"
            self.report(path, "bad-attribute-value", message, _literal_hint(kind), value=True)

    def forms(self, rewrite: Any, path: KeyPath, op: str, op_path: KeyPath) -> None:
        if not isinstance(rewrite, dict):
            return
        form, any_of = rewrite.get("form"), rewrite.get("any_of")
        given = [form] if isinstance(form, str) else any_of if isinstance(any_of, list) else []
        known = tuple(item for item in given if isinstance(item, str) and item in FORMS)
        if known and len(known) == len(given) and not forms_for(op, known):
            key = "form" if isinstance(form, str) else "any_of"
            possible = tuple(name for name in FORMS if op in FORMS[name])
            hint = choices(possible) if possible else f"no form of this version applies to {op}"
            line = self.document.entries[op_path].value.line
            message = f"{' and '.join(known)} cannot rewrite {op} (line {line})"
            self.report((*path, key), "form-does-not-apply", message, hint, value=True)

    def globs(self, value: Any, path: KeyPath) -> None:
        items = [(value, path)]
        if isinstance(value, list):
            items = [(item, (*path, index)) for index, item in enumerate(value)]
        for item, item_path in items:
            if isinstance(item, str):
                try:
                    compile_globs([item])
                except GlobError as error:
                    self.report(item_path, "bad-glob", str(error), value=True)

    def exclusions(self, value: Any, path: KeyPath, ops: list[str]) -> None:
        for index, entry in enumerate(value if isinstance(value, list) else []):
            if not isinstance(entry, dict):
                continue
            here = (*path, index)
            for key, item in entry.items():
                if key in ("name", "scope"):
                    self.globs(item, (*here, key))
                elif key == "shares_weight_with":
                    if isinstance(item, str):
                        self.operator(item, (*here, key))
                elif key in LATER_KEYS["node"]:
                    message = f"'{key}' is not supported by this version"
                    self.report((*here, key), "not-supported", message)
                elif ops and not any(key in OPERATORS[op] for op in ops):
                    known = [*_EXCLUSION_KEYS, *(name for op in ops for name in OPERATORS[op])]
                    hint = suggest(key, known) or choices(sorted(set(known)))
                    message = f"{' and '.join(dict.fromkeys(ops))} has no attribute '{key}'"
                    self.report((*here, key), "unknown-attribute", message, hint)
                else:
                    for op in dict.fromkeys(ops):
                        if key in OPERATORS[op]:
                            self.literal(item, (*here, key), op, key)

    def expressions(
        self, value: Any, path: KeyPath, ops: list[str], names: Mapping[str, KeyPath]
    ) -> tuple[Expression, ...]:
        if not isinstance(value, list) or not ops:
            return ()
        common = set.intersection(*(set(OPERATORS[op]) for op in ops))
        scope = {name: sorted(common) for name in names}
        found: list[Expression] = []
        for index, text in enumerate(value):
            if not isinstance(text, str):
                continue
            try:
                found.append(parse_expression(text, scope))
            except ExpressionError as error:
                self.diagnostics.append(self.located(error, text, (*path, index), value))
        return tuple(found)

    def located(
        self, error: ExpressionError, text: str, path: KeyPath, siblings: list[Any]
    ) -> Diagnostic:
        entry = self.document.entries[path]
        list_entry = self.document.entries[path[:-1]]
        torn = text.count("(") != text.count(")") and len(siblings) > 1
        if torn and list_entry.style == "flow" and entry.style == "plain":
            message = f"'{text}' is only a part: the commas of a [list] split the expression"
            return Diagnostic("yaml-comma", message, entry.value, "quote the whole expression")
        hint = suggest(error.word, error.known) if error.word else ""
        if error.word and not hint and error.known:
            hint = choices(error.known)
        return Diagnostic(error.code, error.message, entry.part(error.offset, error.length), hint)


def _nodes(rule: Mapping[str, Any], path: KeyPath) -> Iterator[tuple[dict[str, Any], KeyPath]]:
    match = rule.get("match")
    if not isinstance(match, dict):
        return
    if isinstance(match.get("node"), dict):
        yield match["node"], (*path, "match", "node")
    any_of = match.get("any_of")
    for index, alternative in enumerate(any_of if isinstance(any_of, list) else []):
        if isinstance(alternative, dict) and isinstance(alternative.get("node"), dict):
            yield alternative["node"], (*path, "match", "any_of", index, "node")


def _wrong_literal(value: Any, kind: AttributeType) -> str:
    """What is wrong with a literal, as the end of a sentence; empty if nothing is."""
    if kind.kind in ("ints", "ints|str"):
        if isinstance(value, str) and kind.kind == "ints|str":
            return ""
        if not isinstance(value, list):
            return "" if _is_int(value) else f"is a number or a list of numbers, not {value!r}"
        if value and all(isinstance(item, list) for item in value):
            return next((w for w in (_wrong_literal(item, kind) for item in value) if w), "")
        if not all(_is_int(item) for item in value):
            return f"is a list of whole numbers, not {value!r}"
        if len(value) != kind.length:
            return f"has {kind.length} number{'s' * (kind.length > 1)}, not {len(value)}"
        return ""
    items = value if isinstance(value, list) else [value]
    right = {"int": _is_int, "bool": _is_bool, "str": _is_str}[kind.kind]
    wrong = [item for item in items if not right(item)]
    word = {"int": "a whole number", "bool": "true or false", "str": "a string"}[kind.kind]
    if not items:
        return "is one of nothing: the list is empty"
    return f"is {word}, not {wrong[0]!r}" if wrong else ""


def _literal_hint(kind: AttributeType) -> str:
    if kind.kind == "ints" and kind.length > 1:
        return f"for example [{', '.join(['3'] * kind.length)}]"
    return "conditions on numbers go into 'where'" if kind.kind == "int" else ""


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _is_str(value: Any) -> bool:
    return isinstance(value, str)
