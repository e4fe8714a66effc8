"""Checks of ``match``: operators, attributes, globs, and how several operators hang together."""

from __future__ import annotations

import keyword
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from fxcompress.rules.language.diagnostics import suggest
from fxcompress.rules.language.document import KeyPath
from fxcompress.rules.language.findings import Findings
from fxcompress.rules.language.schema import MOST_OPTIONAL, Alternative, GraphNode, Pattern, reads
from fxcompress.rules.language.vocabulary import OPERATORS

SINGLE_INPUT = "x"
"""What a template calls the value that a pattern of one operator reads."""


@dataclass(frozen=True)
class Bound:
    """An operator that a pattern binds to a name.

    Attributes:
        path: where its name stands.
        op_path: where its operator stands.
        ops: the operators that it may be, the unknown ones left out.
        reads: values that it reads, without ``$``, in order; None for one that may be anything.
        optional: True if a match may do without it.
    """

    path: KeyPath
    op_path: KeyPath
    ops: tuple[str, ...]
    reads: tuple[str | None, ...] = ()
    optional: bool = False

    @property
    def has_weight(self) -> bool:
        """Whether any of the operators that it may be has a weight to rewrite."""
        return any(op in OPERATORS for op in self.ops)


@dataclass(frozen=True)
class Bindings:
    """What one pattern binds.

    Attributes:
        kind: the key that the pattern stands under: ``node``, ``nodes`` or ``group``.
        path: of the pattern.
        names: bound name -> operator.
    """

    kind: str
    path: KeyPath
    names: Mapping[str, Bound]


def check_match(findings: Findings, match: Pattern, path: KeyPath) -> tuple[Bindings, ...]:
    """Report what is wrong with a pattern; what each of its alternatives binds.

    Args:
        findings: gains the problems.
        match: the pattern.
        path: of its rule.
    """
    findings.globs(match.scope, (*path, "match", "scope"))
    found = tuple(_alternative(findings, one, (*path, *keys)) for keys, one in match.keyed)
    _check_alike(findings, found)
    return found


def _alternative(findings: Findings, one: Alternative, path: KeyPath) -> Bindings:
    if path[-1] != "match":
        findings.globs(one.scope, (*path, "scope"))
    if one.nodes is not None:
        names = {
            name: _graph_node(findings, name, node, (*path, "nodes", name))
            for name, node in one.nodes.items()
        }
        _Graph(findings, path, one, names).check()
        return Bindings("nodes", path, names)
    kind, node = ("group", one.group) if one.group is not None else ("node", one.node)
    assert node is not None
    here = (*path, kind)
    ops = findings.operators(node.op, (*here, "op"), rewritable=True)
    findings.attributes(node, here, ops)
    findings.globs(node.name, (*here, "name"))
    _check_name(findings, node.bound_name, (*here, "as"))
    bound = Bound((*here, "as"), (*here, "op"), ops, (SINGLE_INPUT,))
    return Bindings(kind, path, {node.bound_name: bound})


def _graph_node(findings: Findings, name: str, node: GraphNode, path: KeyPath) -> Bound:
    _check_name(findings, name, path)
    ops = findings.operators(node.op, (*path, "op"), rewritable=False)
    findings.attributes(node, path, ops)
    findings.globs(node.name, (*path, "name"))
    findings.one_source(name, node, path)
    values = reads(node)
    if node.optional and sum(value is not None for value in values) != 1:
        message = f"'{name}' is optional, so it needs exactly one input that is named"
        hint = "where it is left out, that value takes its place; for example input: $x"
        findings.report((*path, "optional"), "optional-input", message, hint)
    return Bound(path, (*path, "op"), ops, values, node.optional)


def _check_name(findings: Findings, name: str, path: KeyPath) -> None:
    if keyword.iskeyword(name):
        message = f"'{name}' cannot be a name: expressions could not use it"
        findings.report(path, "bad-name", message, value=path[-1] == "as")


@dataclass(frozen=True)
class _Graph:
    """The operators of ``nodes``, and the values between them."""

    findings: Findings
    path: KeyPath
    alternative: Alternative
    nodes: Mapping[str, Bound]

    def check(self) -> None:
        optional = [bound for bound in self.nodes.values() if bound.optional]
        if len(optional) == len(self.nodes):
            message = "every node is optional; at least one has to be there"
            self.findings.report((*self.path, "nodes"), "all-optional", message)
        if len(optional) > MOST_OPTIONAL:
            message = f"{len(optional)} optional nodes; at most {MOST_OPTIONAL} in one pattern"
            place = (*optional[MOST_OPTIONAL].path, "optional")
            self.findings.report(place, "too-many", message)
        sound = self.check_values()
        self.check_inputs()
        self.check_outputs()
        order = {name: bound.reads for name, bound in self.nodes.items()}
        if self.findings.order(order, (*self.path, "nodes"), "pattern-cycle") and sound:
            self.check_connected()

    def names(self, key: str) -> Iterator[tuple[str, KeyPath]]:
        """The names of a list, with their places; one that is there twice is a problem."""
        seen: set[str] = set()
        for index, name in enumerate(getattr(self.alternative, key) or ()):
            place = (*self.path, key, index)
            if name in seen:
                self.findings.report(place, "repeated", f"'{name}' is given twice", value=True)
            else:
                yield name, place
            seen.add(name)

    @property
    def read(self) -> set[str]:
        return {value for bound in self.nodes.values() for value in bound.reads if value}

    def check_values(self) -> bool:
        """Whether all values are nodes, or come from outside by their names."""
        values = dict.fromkeys((*self.nodes, *(self.alternative.inputs or ())))
        sound = True
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
        for name, place in self.names("inputs"):
            if name in self.nodes:
                message = f"'{name}' is a node of the pattern; a value from outside needs another"
                self.findings.report(place, "name-clash", f"{message} name", value=True)
            elif name not in self.read:
                message = f"no node reads '${name}'"
                self.findings.report(place, "unused-input", message, value=True)

    def check_outputs(self) -> None:
        for name, place in self.names("outputs"):
            if name not in self.nodes:
                message = f"the pattern has no node '{name}'"
                self.findings.unknown(place, "unknown-node", message, name, list(self.nodes))
        outputs = self.alternative.outputs
        for name, bound in self.nodes.items() if outputs is not None else ():
            if name not in (outputs or ()) and name not in self.read:
                message = f"no node reads '{name}', and it is not in 'outputs'"
                hint = "such an operator would compute for nothing: nothing could match"
                self.findings.report(bound.path, "unused-node", message, hint)

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
        shown = sorted(sorted(map(order.index, names)) for names, _ in parts)
        words = [", ".join(order[index] for index in part) for part in shown]
        message = f"the pattern falls apart: {' and '.join(words)}"
        hint = "the nodes of a pattern are connected by the values that they read"
        second = self.nodes[order[shown[1][0]]]
        self.findings.report(second.path, "disconnected-pattern", message, hint)


def _check_alike(findings: Findings, found: Sequence[Bindings]) -> None:
    """All alternatives have to bind the same names."""
    first = found[0]
    other = next((each for each in found if each.names.keys() != first.names.keys()), None)
    if other is None:
        return
    names = [", ".join(f"'{name}'" for name in each.names) for each in (first, other)]
    if len(first.names) == len(other.names) == 1:
        message = f"have to bind the same name: {', '.join(names)}"
        place = next(iter(other.names.values())).path
    else:
        message = f"have to bind the same names: {names[0]} and {names[1]}"
        place = (*other.path, "nodes") if other.kind == "nodes" else other.path
    findings.report(place, "alternatives-differ", f"alternatives of any_of {message}")
