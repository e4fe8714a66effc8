"""What a pattern matches, computed slowly and independently, by networkx.

Graph and pattern become graphs of three kinds of nodes: an operator, the value that it makes,
and a slot for every operand.  A match is a monomorphism from one to the other; what it may not
do is checked afterwards, one condition at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any

import networkx as nx
from networkx.algorithms.isomorphism import DiGraphMatcher

from fxcompress.graph.operator import Operator
from fxcompress.rules.language.schema import Alternative, GraphNode

Embedding = dict[str, int]
Fits = Callable[[GraphNode, Operator], bool]
Reads = Mapping[str, Sequence[str | None]]


def embeddings(
    alternative: Alternative, operators: Sequence[Operator], fits: Fits
) -> list[Embedding]:
    """All matches that count.

    Args:
        alternative: a pattern given by ``nodes``.
        operators: the graph.
        fits: whether an operator is what a node asks for, by itself.
    """
    nodes = alternative.nodes or {}
    optional = [name for name, node in nodes.items() if node.optional]
    found: list[Embedding] = []
    for size in range(len(optional) + 1):
        for absent in combinations(optional, size):
            found += _variant(alternative, absent, operators, fits)
    largest = [one for one in found if not any(one.items() < other.items() for other in found)]
    first: dict[frozenset[int], Embedding] = {}
    for one in sorted(largest, key=lambda one: sort_key(alternative, one)):
        first.setdefault(frozenset(one.values()), one)
    return list(first.values())


def sort_key(alternative: Alternative, embedding: Embedding) -> tuple[float, ...]:
    """Positions in the order of the pattern, absent operators last."""
    return tuple(embedding.get(name, float("inf")) for name in alternative.nodes or {})


def greedy(
    anchor: str,
    alternative: Alternative,
    found: Sequence[Embedding],
    claimed: Callable[[Embedding], set[str]],
) -> list[Embedding]:
    """The matches that are left when each wants what no earlier one has."""
    taken: set[str] = set()
    kept: list[Embedding] = []
    for one in sorted(found, key=lambda one: (one[anchor], *sort_key(alternative, one))):
        wanted = claimed(one)
        if wanted and not taken & wanted:
            taken |= wanted
            kept.append(one)
    return kept


def _variant(
    alternative: Alternative, absent: Sequence[str], operators: Sequence[Operator], fits: Fits
) -> list[Embedding]:
    """The matches without some optional operators, by every way to turn a commutative one."""
    nodes = alternative.nodes or {}
    written = {name: _references(node) for name, node in nodes.items()}

    def behind(reference: str | None) -> str | None:
        while reference in absent:
            (reference,) = [each for each in written[str(reference)] if each is not None]
        return reference

    reads = {name: [behind(r) for r in written[name]] for name in nodes if name not in absent}
    read = {reference for references in reads.values() for reference in references}
    ends = (
        set(reads) - read if alternative.outputs is None else set(map(behind, alternative.outputs))
    )
    turnable = [name for name in reads if len(reads[name]) <= 2]
    found: list[Embedding] = []
    for flips in product((False, True), repeat=len(turnable)):
        turned = {name for name, flip in zip(turnable, flips, strict=True) if flip}

        def fits_turned(name: str, position: int, turned: set[str] = turned) -> bool:
            operator = operators[position]
            operands = _operands(operator, operators)
            if name in turned and (operator.op not in ("add", "mul") or len(operands) != 2):
                return False
            return len(operands) >= len(reads[name]) and fits(nodes[name], operator)

        for one in _monomorphisms(reads, turned, operators, fits_turned):
            if one not in found and _closed(one, ends, operators) and _convex(one, operators):
                found.append(one)
    return found


def _references(node: GraphNode) -> list[str | None]:
    given = [node.input] if node.input is not None else list(node.inputs or ())
    return [None if reference is None else reference.removeprefix("$") for reference in given]


def _operands(operator: Operator, operators: Sequence[Operator]) -> list[str]:
    parameters = {each.name for each in operators if each.op == "parameter"}
    return [name for name in operator.inputs if operator.weight is None or name not in parameters]


def _monomorphisms(
    reads: Reads,
    turned: set[str],
    operators: Sequence[Operator],
    fits: Callable[[str, int], bool],
) -> Iterator[Embedding]:
    large = _as_graph({o.name: _operands(o, operators) for o in operators}, set())
    positions = {operator.name: position for position, operator in enumerate(operators)}

    def alike(there: dict[str, Any], wanted: dict[str, Any]) -> bool:
        if wanted["kind"] != "operator":
            return bool(there == wanted)
        return there["kind"] == "operator" and fits(wanted["name"], positions[there["name"]])

    outside = {r for references in reads.values() for r in references if r and r not in reads}
    # A monomorphism keeps values apart; two names may stand for one value.
    for merged in _partitions(sorted(outside)):
        named = {
            name: [merged.get(r, r) if r is not None else None for r in references]
            for name, references in reads.items()
        }
        matcher = DiGraphMatcher(large, _as_graph(named, turned), node_match=alike)
        for mapping in matcher.subgraph_monomorphisms_iter():
            back = {small: big for big, small in mapping.items()}
            yield {name: positions[back["operator", name][1]] for name in reads}


def _as_graph(reads: Reads, turned: set[str]) -> nx.DiGraph:
    graph = nx.DiGraph()
    for name, references in reads.items():
        graph.add_node(("operator", name), kind="operator", name=name)
        graph.add_node(("value", name), kind="value")
        graph.add_edge(("operator", name), ("value", name))
        for index, reference in enumerate(references):
            if reference is None:
                continue
            place = 1 - index if name in turned else index
            graph.add_node(("slot", name, place), kind="slot", place=place)
            graph.add_node(("value", reference), kind="value")
            graph.add_edge(("value", reference), ("slot", name, place))
            graph.add_edge(("slot", name, place), ("operator", name))
    return graph


def _partitions(names: Sequence[str]) -> Iterator[dict[str, str]]:
    """Every way to give several names one meaning: name -> the first of its class."""
    if not names:
        yield {}
        return
    *others, last = names
    for merged in _partitions(others):
        for representative in (*dict.fromkeys(merged.values()), last):
            yield {**merged, last: representative}


def _closed(found: Embedding, ends: set[str | None], operators: Sequence[Operator]) -> bool:
    """Whether only outputs are read by operators that are not in the match."""
    inside = {operators[position].name for position in found.values()}
    return not any(
        operators[position].name in reader.inputs
        for name, position in found.items()
        if name not in ends
        for reader in operators
        if reader.name not in inside
    )


def _convex(found: Embedding, operators: Sequence[Operator]) -> bool:
    """Whether no path leads from the match through other operators back to it."""
    inside = {operators[position].name for position in found.values()}
    flow = nx.DiGraph((source, o.name) for o in operators for source in o.inputs)
    flow.add_nodes_from(inside)
    for start, end in product(inside, inside):
        between = flow.subgraph([n for n in flow if n not in inside or n in (start, end)]).copy()
        if between.has_edge(start, end):
            between.remove_edge(start, end)
        if start != end and nx.has_path(between, start, end):
            return False
    return True
