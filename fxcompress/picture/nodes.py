"""What is drawn of one node of a recorded graph, whether it comes from a recording or a plan."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from fxcompress.graph.operator import AttributeValue, Operator
from fxcompress.operators.words import OPERATORS
from fxcompress.plans.plan import NodeSummary


@dataclass(frozen=True)
class Node:
    """One node of a recorded graph.

    Attributes:
        name: unique in its graph.
        op: canonical operator.
        path: of the leaf module, or of the module in whose ``forward`` a function was called.
        inputs: names of the nodes that it reads.
        shape: of its value; None if it has no single one.
        attributes: that rules can name; none if the node comes from a plan, which keeps none.
    """

    name: str
    op: str
    path: str
    inputs: tuple[str, ...]
    shape: tuple[int, ...] | None
    attributes: Mapping[str, AttributeValue] = field(default_factory=dict)

    @property
    def text(self) -> str:
        """The operator in words: ``"linear 64→160, bias"``, ``"softmax dim=-1"``."""
        attributes = dict(self.attributes)
        text = self.op
        if self.op in OPERATORS and len(attributes) > 1:
            n, m, *_ = OPERATORS[self.op].attributes
            text += f" {attributes.pop(n)}→{attributes.pop(m)}"
            for name, usual in _USUAL.items():
                value = attributes.get(name, usual)
                if value == usual or (isinstance(value, tuple) and {*value} == {usual}):
                    attributes.pop(name, None)
            if attributes.pop("bias", False):
                text += ", bias"
        return " ".join([text, *(f"{name}={_written(attributes[name])}" for name in attributes)])


_USUAL: Mapping[str, AttributeValue] = {
    "stride": 1,
    "padding": 0,
    "dilation": 1,
    "groups": 1,
    "padding_mode": "zeros",
    "dtype": "float32",
}
"""Attributes of operators with a weight that are told only where they are something else."""


def _written(value: AttributeValue) -> str:
    return "×".join(map(str, value)) if isinstance(value, tuple) else f"{value}"


def shape_text(shape: tuple[int | str, ...] | None) -> str:
    """``"2×16×64"``; empty for a value that has no single shape.

    >>> shape_text((2, 16, "r")), shape_text(())
    ('2×16×r', 'scalar')
    """
    if shape is None:
        return ""
    return "×".join(map(str, shape)) or "scalar"


def of_operators(operators: Iterable[Operator]) -> tuple[Node, ...]:
    """The nodes of a recording."""
    return tuple(Node(o.name, o.op, o.path, o.inputs, o.shape, o.attributes) for o in operators)


def of_summaries(summaries: Iterable[NodeSummary]) -> tuple[Node, ...]:
    """The nodes that a plan keeps."""
    return tuple(Node(s.name, s.op, s.path, s.inputs, s.shape) for s in summaries)
