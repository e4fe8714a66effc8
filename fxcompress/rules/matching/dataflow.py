"""The graph as the search for patterns sees it: positions, operands in order, and readers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fxcompress.graph.operator import Operator
from fxcompress.rules.language.globs import compile_globs

Value = int
"""A value, by the position of the operator that makes it; negative if the graph has none."""


@dataclass(frozen=True)
class Dataflow:
    """A recorded graph with numbers for names.

    Attributes:
        operators: in execution order; an operator's place in it is its position.
        operands: position -> the values that it computes with, in argument order. A parameter
            that an operator applies as its weight or bias is none of them.
        readers: value -> positions of all operators that read it, in graph order.
        first_readers: value -> positions of those that read it as their first operand.
        by_op: canonical operator name -> positions, in graph order.
    """

    operators: tuple[Operator, ...]
    operands: tuple[tuple[Value, ...], ...]
    readers: Mapping[Value, Sequence[int]]
    first_readers: Mapping[Value, Sequence[int]]
    by_op: Mapping[str, Sequence[int]]

    @classmethod
    def of(cls, operators: Sequence[Operator]) -> Dataflow:
        """Index a graph, in one pass over its operators."""
        numbers = {operator.name: position for position, operator in enumerate(operators)}
        operands: list[tuple[Value, ...]] = []
        readers: dict[Value, list[int]] = {}
        first_readers: dict[Value, list[int]] = {}
        by_op: dict[str, list[int]] = {}
        for position, operator in enumerate(operators):
            by_op.setdefault(operator.op, []).append(position)
            values = [numbers.setdefault(name, -1 - len(numbers)) for name in operator.inputs]
            for value in dict.fromkeys(values):
                readers.setdefault(value, []).append(position)
            if operator.weight is not None:
                values = [v for v in values if v < 0 or operators[v].op != "parameter"]
            operands.append(tuple(values))
            if values:
                first_readers.setdefault(values[0], []).append(position)
        return cls(tuple(operators), tuple(operands), readers, first_readers, by_op)

    def count(self, ops: Sequence[str]) -> int:
        """Number of operators with one of several names."""
        return sum(len(self.by_op.get(op, ())) for op in dict.fromkeys(ops))

    @cached_property
    def _named(self) -> dict[tuple[tuple[str, ...], tuple[str, ...]], int]:
        return {}

    @cached_property
    def _paths(self) -> dict[tuple[str, ...], list[str]]:
        return {}

    def count_named(self, ops: tuple[str, ...], globs: tuple[str, ...]) -> int:
        """Number of those whose path fits one of some globs; rules ask for the same ones."""
        known = self._named.get((ops, globs))
        if known is None:
            if ops not in self._paths:
                self._paths[ops] = [self.operators[p].path for p in self.positions(ops)]
            fits = filter(None, map(compile_globs(globs).match, self._paths[ops]))
            known = self._named[ops, globs] = sum(1 for _ in fits)
        return known

    def positions(self, ops: Sequence[str]) -> Sequence[int]:
        """Positions of the operators with one of several names, in graph order."""
        if len(ops) == 1:
            return self.by_op.get(ops[0], ())
        return sorted(p for op in dict.fromkeys(ops) for p in self.by_op.get(op, ()))

    def title(self, value: Value) -> str:
        """How messages name an operator: ``"layers.0.fc1"``, ``"layers.0 (add)"``."""
        if value < 0:
            return "a value from outside of the graph"
        operator = self.operators[value]
        if operator.module:
            return operator.path
        return f"{operator.path} ({operator.op})" if operator.path else operator.name
