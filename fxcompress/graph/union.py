"""One operator graph of several recordings of a model."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from fxcompress.graph.operator import Operator


@dataclass(frozen=True)
class Union:
    """The operators that any of several runs has.

    Attributes:
        operators: in an order that all runs agree with as far as there is one.
        names: for each run, what an operator of it is called in the whole.
    """

    operators: tuple[Operator, ...]
    names: tuple[Mapping[str, str], ...]


def union(runs: Sequence[Sequence[Operator]]) -> Union:
    """Join runs: what is the same in two of them is there once.

    The same are the first calls of a weight, the second ones, and so on; of other operators, those
    of one kind at one place that read the same values.  An operator keeps the operands of the
    first run that has it, and is known to be read by all that read it in any run: so it counts as
    read by nothing else only if that holds in all of them.
    """
    first, *more = runs
    behind: dict[str, list[Operator]] = defaultdict(list)  # what comes after one of the first run
    place = {operator.name: operator.name for operator in first}
    known: dict[object, list[str]] = defaultdict(list)
    for operator in first:
        known[_key(operator, operator.inputs)].append(operator.name)
    users: dict[str, dict[str, None]] = {o.name: dict.fromkeys(o.users) for o in first}
    names: list[Mapping[str, str]] = [{operator.name: operator.name for operator in first}]
    for number, run in enumerate(more, start=2):
        called: dict[str, str] = {}
        met: Counter[object] = Counter()
        last = ""
        for operator in run:
            inputs = tuple(called[name] for name in operator.inputs)
            key = _key(operator, inputs)
            if met[key] < len(known[key]):
                name = known[key][met[key]]
            else:
                name = f"{operator.name}@{number}"
                known[key].append(name)
                behind[last].append(replace(operator, name=name, inputs=inputs))
                place[name] = last
                users[name] = {}
            met[key] += 1
            called[operator.name] = name
            last = place[name]
            for read in inputs:
                users[read][name] = None
        names.append(called)
    ordered = [*behind[""]]
    for operator in first:
        ordered += [operator, *behind[operator.name]]
    whole = tuple(replace(each, users=tuple(users[each.name])) for each in ordered)
    return Union(whole, tuple(names))


def _key(operator: Operator, inputs: tuple[str, ...]) -> object:
    if operator.weight is not None:
        return operator.weight, operator.op, operator.path
    if operator.op in ("input", "output", "parameter"):
        return operator.op, operator.path
    attributes = tuple(sorted((key, repr(value)) for key, value in operator.attributes.items()))
    return operator.op, operator.path, operator.scope, attributes, inputs
