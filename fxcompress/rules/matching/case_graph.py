"""The graph of a rule test as operators, as a recording would have given them."""

from __future__ import annotations

from collections.abc import Mapping
from graphlib import TopologicalSorter
from types import MappingProxyType

from fxcompress.graph.operator import AttributeValue, Operator
from fxcompress.rules.language.schema import CaseNode, reads
from fxcompress.rules.language.vocabulary import INPUT, OPERATORS, AttributeType

_WIDTH = 64
_DEFAULTS: Mapping[str, AttributeValue] = MappingProxyType(
    {
        "bias": True,
        "dilation": 1,
        "dtype": "float32",
        "groups": 1,
        "kernel_size": 3,
        "padding": 1,
        "padding_mode": "zeros",
        "stride": 1,
    }
)
"""Attributes of operators with a weight that are no widths."""


def build_operators(graph: Mapping[str, CaseNode]) -> tuple[Operator, ...]:
    """Operators in an order in which they can run, with what they read from outside.

    A node without a reader is an output of the graph.

    >>> graph = {"fc": CaseNode(op="linear", path="layers.0.fc", input="$x")}
    >>> [(operator.name, operator.users) for operator in build_operators(graph)]
    [('x', ('fc',)), ('fc', ('output',)), ('output', ())]
    """
    graph = {name: node for name, node in graph.items() if node.op != INPUT}
    sources = {name: tuple(filter(None, reads(node))) for name, node in graph.items()}
    users: dict[str, list[str]] = {}
    for name, values in sources.items():
        for value in dict.fromkeys(values):
            users.setdefault(value, []).append(name)
    ends = [name for name in graph if name not in users]
    users.update({name: ["output"] for name in ends})
    order = TopologicalSorter({name: dict.fromkeys(values) for name, values in sources.items()})
    found = [
        _operator(name, graph[name], sources[name], tuple(users[name]))
        if name in graph
        else Operator(name, INPUT, "", "", {}, (), tuple(users[name]), None)
        for name in order.static_order()
    ]
    return (*found, Operator("output", "output", "", "", {}, tuple(ends), (), None))


def _operator(
    name: str, node: CaseNode, inputs: tuple[str, ...], users: tuple[str, ...]
) -> Operator:
    path = node.path if node.path is not None else name
    has_weight = node.op in OPERATORS
    types = OPERATORS.get(node.op, {})
    given = {key: _expanded(value, types.get(key)) for key, value in node.attributes.items()}
    defaults = {key: _expanded(_DEFAULTS.get(key, _WIDTH), kind) for key, kind in types.items()}
    return Operator(
        name=name,
        op=node.op,
        path=path,
        scope=node.scope if node.scope is not None else path.rpartition(".")[0],
        attributes={**defaults, **given},
        inputs=inputs,
        users=users,
        shape=None,
        weight=(node.weight or f"{path}.weight") if has_weight else None,
        module=has_weight,
    )


def _expanded(value: AttributeValue, kind: AttributeType | None) -> AttributeValue:
    """One number stands for itself in every dimension."""
    if kind is not None and kind.kind.startswith("ints") and isinstance(value, int):
        return (value,) * kind.length
    return value
