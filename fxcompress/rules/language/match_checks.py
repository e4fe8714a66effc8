"""Checks of ``match``: operators, attributes, globs, and how several operators hang together."""

from __future__ import annotations

import keyword
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any, Literal

from fxcompress.rules.language.diagnostics import suggest
from fxcompress.rules.language.document import KeyPath
from fxcompress.rules.language.findings import Findings, one_or_many
from fxcompress.rules.language.schema import MOST_NODES, MOST_OPTIONAL
from fxcompress.rules.language.vocabulary import OPERATORS

Kind = Literal["node", "nodes", "group"]

_NODE_KEYS = frozenset({"op", "as", "name"})
_GROUP_KEYS = frozenset({"op", "as", "name", "min", "max"})
_GRAPH_KEYS = frozenset({"op", "name", "input", "inputs", "optional"})
SINGLE_INPUT = "x"
"""What a template calls the value that a pattern of one operator reads."""


@dataclass(frozen=True)
class Bound:
    """An operator that a pattern binds to a name.

    Attributes:
        path: where its name stands; its mapping for a name that was left out.
        op_path: where its operator stands.
        ops: the operators that it may be, the unknown ones left out.
        reads: values that it reads, without ``$``, in order; None for one that may be anything.
        optional: True if a match may do without it.
        unreadable: True if a value that it reads is not written as one.
    """

    path: KeyPath
    op_path: KeyPath
    ops: tuple[str, ...]
    reads: tuple[str | None, ...] = ()
    optional: bool = False
    unreadable: bool = False

    @property
    def has_weight(self) -> bool:
        """Whether any of the operators that it may be has a weight to rewrite."""
        return any(op in OPERATORS for op in self.ops)


@dataclass(frozen=True)
class Bindings:
    """What one pattern binds.

    Attributes:
        kind: the key that the pattern stands under.
        path: of the pattern.
        names: bound name -> operator.
    """

    kind: Kind
    path: KeyPath
    names: Mapping[str, Bound]


def check_match(findings: Findings, match: Any, path: KeyPath) -> tuple[Bindings, ...]:
    """Report what is wrong with a pattern; what each of its alternatives binds."""
    if not isinstance(match, dict):
        return ()
    any_of = match.get("any_of")
    places = [(match, path)]
    for index, alternative in enumerate(any_of if isinstance(any_of, list) else []):
        if isinstance(alternative, dict):
            places.append((alternative, (*path, "any_of", index)))
    found = [bound for place in places for bound in _alternative(findings, *place)]
    _check_alike(findings, found)
    return tuple(found)


def _alternative(
    findings: Findings, alternative: Mapping[str, Any], path: KeyPath
) -> Iterable[Bindings]:
    findings.globs(alternative.get("scope"), (*path, "scope"))
    node, group, nodes = (alternative.get(key) for key in ("node", "group", "nodes"))
    if isinstance(node, dict):
        yield _single(findings, node, path, "node", _NODE_KEYS)
    if isinstance(group, dict):
        yield _single(findings, group, path, "group", _GROUP_KEYS)
    if isinstance(nodes, dict):
        names = {
            name: _graph_node(findings, name, node, (*path, "nodes", name))
            for name, node in nodes.items()
            if isinstance(node, dict)
        }
        if 0 < len(names) <= MOST_NODES:
            _Graph(findings, path, alternative, names).check()
        yield Bindings("nodes", path, names)


def _single(
    findings: Findings, node: Mapping[str, Any], place: KeyPath, kind: Kind, keys: Collection[str]
) -> Bindings:
    path = (*place, kind)
    ops = findings.operators(node.get("op"), (*path, "op"), rewritable=True)
    if ops:
        findings.attributes(node, path, ops, keys)
    findings.globs(node.get("name"), (*path, "name"))
    name = node.get("as")
    if isinstance(name, str):
        _check_name(findings, name, (*path, "as"))
    named = (*path, "as") if isinstance(name, str) else path
    bound = Bound(named, (*path, "op"), ops, (SINGLE_INPUT,))
    return Bindings(kind, place, {name if isinstance(name, str) else "node": bound})


def _graph_node(findings: Findings, name: str, node: Mapping[str, Any], path: KeyPath) -> Bound:
    _check_name(findings, name, path)
    ops = findings.operators(node.get("op"), (*path, "op"), rewritable=False)
    if ops:
        findings.attributes(node, path, ops, _GRAPH_KEYS)
    findings.globs(node.get("name"), (*path, "name"))
    one, many = node.get("input"), node.get("inputs")
    if one is not None and many is not None:
        message = f"'{name}' takes one of 'input' and 'inputs'; it has both"
        findings.report((*path, "inputs"), "both-inputs", message)
    given = [one] if one is not None else many if isinstance(many, list) else [many]
    reads = tuple(_referred(item) for item in given)
    optional = node.get("optional") is True
    if optional and len([value for value in reads if value is not None]) != 1:
        message = f"'{name}' is optional, so it needs exactly one input that is named"
        hint = "where it is left out, that value takes its place; for example input: $x"
        findings.report((*path, "optional"), "optional-input", message, hint)
    unreadable = any(item is not None and _referred(item) is None for item in given)
    return Bound(path, (*path, "op"), ops, reads, optional, unreadable)


def _referred(value: Any) -> str | None:
    """The name behind a ``$``; what is no reference at all is left to the schema."""
    if isinstance(value, str) and value.startswith("$") and value[1:].isidentifier():
        return value[1:]
    return None


def _check_name(findings: Findings, name: str, path: KeyPath) -> None:
    if keyword.iskeyword(name):
        message = f"'{name}' cannot be a name: expressions could not use it"
        findings.report(path, "bad-name", message, value=path[-1] == "as")


@dataclass(frozen=True)
class _Graph:
    """The operators of ``nodes``, and the values between them."""

    findings: Findings
    path: KeyPath
    alternative: Mapping[str, Any]
    nodes: Mapping[str, Bound]

    def check(self) -> None:
        if all(bound.optional for bound in self.nodes.values()):
            message = "every node is optional; at least one has to be there"
            self.findings.report((*self.path, "nodes"), "all-optional", message)
        self.check_optional()
        sound = self.check_values()
        self.check_inputs()
        self.check_outputs()
        if self.check_order() and sound:
            self.check_connected()

    @property
    def outside(self) -> list[tuple[str, KeyPath]]:
        return self.names("inputs")

    def names(self, key: str) -> list[tuple[str, KeyPath]]:
        """A list of names; the schema tells of a ``$`` in front of one."""
        given = one_or_many(self.alternative.get(key), (*self.path, key))
        return [(name.removeprefix("$"), place) for name, place in given]

    @property
    def read(self) -> set[str]:
        return {value for bound in self.nodes.values() for value in bound.reads if value}

    def check_optional(self) -> None:
        optional = [bound for bound in self.nodes.values() if bound.optional]
        if len(optional) > MOST_OPTIONAL:
            message = f"{len(optional)} optional nodes; at most {MOST_OPTIONAL} in one pattern"
            place = (*optional[MOST_OPTIONAL].path, "optional")
            self.findings.report(place, "too-many", message)

    @property
    def unreadable(self) -> bool:
        """Whether some node reads what is no reference, and might have been meant for one."""
        return any(bound.unreadable for bound in self.nodes.values())

    def check_values(self) -> bool:
        """Whether all values are nodes, or come from outside by their names."""
        values = {**self.nodes, **dict(self.outside)}
        sound = not self.unreadable
        for bound in self.nodes.values():
            for index, value in enumerate(bound.reads):
                if value is None or value in values:
                    continue
                sound = False
                place = (*bound.path, "inputs", index)
                if place not in self.findings.document.entries:
                    place = (*bound.path, "input")
                message = f"'${value}' is neither a node of the pattern nor one of its 'inputs'"
                hint = suggest(f"${value}", [f"${name}" for name in values])
                hint = hint or f"a value from outside is declared: inputs: [{value}]"
                self.findings.report(place, "unbound-value", message, hint, value=True)
        return sound

    def check_inputs(self) -> None:
        seen: set[str] = set()
        for name, place in self.outside:
            if name in self.nodes:
                message = f"'{name}' is a node of the pattern; a value from outside needs another"
                self.findings.report(place, "name-clash", f"{message} name", value=True)
            elif name in seen:
                self.findings.report(place, "repeated", f"'{name}' is given twice", value=True)
            elif name.isidentifier() and name not in self.read and not self.unreadable:
                message = f"no node reads '${name}'"
                self.findings.report(place, "unused-input", message, value=True)
            seen.add(name)

    def check_outputs(self) -> None:
        if self.alternative.get("outputs") is None:
            return
        outputs = self.names("outputs")
        seen: set[str] = set()
        for name, place in outputs:
            if name in seen:
                self.findings.report(place, "repeated", f"'{name}' is given twice", value=True)
            elif name not in self.nodes and name.isidentifier():
                message = f"the pattern has no node '{name}'"
                self.findings.unknown(place, "unknown-node", message, name, list(self.nodes))
            seen.add(name)
        for name, bound in self.nodes.items():
            if outputs and name not in seen and name not in self.read:
                message = f"no node reads '{name}', and it is not in 'outputs'"
                hint = "such an operator would compute for nothing: nothing could match"
                self.findings.report(bound.path, "unused-node", message, hint)

    def check_order(self) -> bool:
        """Whether no node reads itself, directly or through others."""
        reads = {
            name: [value for value in bound.reads if value in self.nodes]
            for name, bound in self.nodes.items()
        }
        try:
            TopologicalSorter(reads).prepare()
        except CycleError as error:
            cycle: Sequence[str] = error.args[1]
            if len(set(cycle)) == 1:
                message = f"'{cycle[0]}' reads itself"
            else:
                message = f"nodes read one another in a circle: {' -> '.join(cycle)}"
            first = next(name for name in self.nodes if name in cycle)
            self.findings.report(self.nodes[first].path, "pattern-cycle", message)
            return False
        return True

    def check_connected(self) -> None:
        """All nodes have to hang together, by what they read."""
        parts: list[tuple[list[str], set[str]]] = []
        for name, bound in self.nodes.items():
            names, values = [name], {name, *filter(None, bound.reads)}
            for part in [part for part in parts if part[1] & values]:
                parts.remove(part)
                names, values = part[0] + names, part[1] | values
            parts.append((names, values))
        if len(parts) < 2:
            return
        order = list(self.nodes)
        shown = [sorted(names, key=order.index) for names, _ in parts]
        shown.sort(key=lambda names: order.index(names[0]))
        message = f"the pattern falls apart: {' and '.join(', '.join(n) for n in shown)}"
        hint = "the nodes of a pattern are connected by the values that they read"
        self.findings.report(self.nodes[shown[1][0]].path, "disconnected-pattern", message, hint)


def _check_alike(findings: Findings, found: Sequence[Bindings]) -> None:
    """All alternatives have to bind the same names."""
    if len({each.path for each in found}) < len(found):
        return  # several patterns in one mapping: the schema tells of it
    for other in found[1:]:
        first = found[0]
        if other.names.keys() == first.names.keys():
            continue
        names = [", ".join(f"'{name}'" for name in each.names) for each in (first, other)]
        if len(first.names) == len(other.names) == 1:
            message = f"have to bind the same name: {', '.join(names)}"
            place = next(iter(other.names.values())).path
        else:
            message = f"have to bind the same names: {names[0]} and {names[1]}"
            place = (*other.path, "nodes") if other.kind == "nodes" else other.path
        findings.report(place, "alternatives-differ", f"alternatives of any_of {message}")
        return
