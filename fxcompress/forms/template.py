"""Templates: a form that a rule file spells out, checked before anything runs.

::

    rewrite:
      graph:
        down: {op: linear, input: $x, weight: fc.right}             # right is (r x n)
        up: {op: linear, input: $down, weight: fc.left, bias: fc.bias}  # left is (m x r)
      outputs: {fc: up}

A weight comes from the decomposition of a matched operator at the rank r that the solver
finds: ``fc.right`` (r x n) and ``fc.left`` (m x r), whose product approximates its weight.
Several operators are decomposed together, as one matrix stacked from theirs: ``joint.right``
(r x n) belongs to all of them, and ``q.left`` (m_q x r) are the rows of ``q``.

The width of every value is a sum of whole multiples of 1, r and the widths of the matched
operators (:mod:`fxcompress.forms.widths`).  Two widths that cannot be equal, whatever these are,
are an error of the rule file; two that are not equal for one match are a reason to leave it
alone.  This file does without torch; :mod:`fxcompress.forms.graph` makes the form.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Annotated, Any, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fxcompress.forms.reserved import is_reserved
from fxcompress.forms.widths import (
    Width,
    never_equal,
    size_of,
    source_shape,
    substituted,
    sum_of,
    text_of,
)

UNARY = ("relu", "gelu", "silu", "tanh", "sigmoid")
"""Operators of templates that keep the width."""

BINARY = ("add", "sub", "mul")
"""Operators of templates that join two values of one width."""

OPERATORS = ("linear", *UNARY, *BINARY, "cat")
"""All operators that a template may use."""

_ARITY = {"cat": (2, 64), **dict.fromkeys(BINARY, (2, 2))}

JOINT = "joint"
"""Owner of the right factor of several operators that are decomposed as one."""

MOST_STEPS = 64
"""Nodes of one template, and values that ``cat`` joins."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FORM = re.compile(r"graph:[A-Za-z0-9_][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class Fault:
    """What is wrong with a template.

    Attributes:
        path: where, below ``rewrite``: ``("graph", "down", "weight")``.
        code: short name of the kind of problem.
        message: what is wrong.
        hint: what to do about it; may be empty.
        word: the unknown word to find a suggestion for, if there is one.
        known: the words that would have been right.
    """

    path: tuple[str | int, ...]
    code: str
    message: str
    hint: str = ""
    word: str = ""
    known: tuple[str, ...] = ()


class TemplateErrors(ValueError):
    """A template that cannot be used, with all of its problems."""

    def __init__(self, problems: Sequence[Fault]) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = tuple(problems)


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class TemplateStep(_Frozen):
    """One operator of a template.

    Attributes:
        name: of the node.
        op: one of :data:`OPERATORS`.
        inputs: names of the values it reads, other steps or :attr:`Template.input`.
        weight: source of a linear operator's weight, ``"fc.right"``; empty for others.
        bias: source of its bias, ``"fc.bias"``; empty for none.
    """

    name: str
    op: str
    inputs: Annotated[tuple[str, ...], Field(max_length=MOST_STEPS)]
    weight: str = ""
    bias: str = ""


class Template(_Frozen):
    """A checked template; it has a JSON form, so that saved models can be rebuilt.

    It is checked whenever one is made, wherever its parts come from: the names of its nodes
    become names of modules, which torch.fx writes into source code as they are.

    Attributes:
        name: of the form, ``"graph:my-bottleneck"``.
        input: name of the one value that comes from outside.
        steps: in an order in which they can run.
        outputs: (matched operator, step that takes its place), in the order of the pattern.
    """

    name: str
    input: str
    steps: Annotated[tuple[TemplateStep, ...], Field(max_length=MOST_STEPS)]
    outputs: Annotated[tuple[tuple[str, str], ...], Field(max_length=MOST_STEPS)]

    @model_validator(mode="after")
    def _sound(self) -> Self:
        if problems := _made_problems(self):
            raise ValueError("; ".join(_placed(problem) for problem in problems[:5]))
        return self

    @property
    def roles(self) -> tuple[str, ...]:
        """Names of the matched operators that are replaced."""
        return tuple(role for role, _ in self.outputs)

    def parameters(self, sizes: Mapping[str, int]) -> int:
        """Weight entries of the whole template, biases left out.

        Args:
            sizes: of ``r`` and of the symbols of all roles (``"fc.in_features"``).
        """
        weights = (source_shape(step.weight) for step in self.steps if step.weight)
        return sum(
            size_of(rows, sizes) * size_of(columns, sizes)
            for rows, columns in (self._named(shape) for shape in weights)
        )

    @property
    def cost(self) -> str:
        """:meth:`parameters` in symbols: ``"r * fc.in_features + r * fc.out_features"``."""
        weights = (source_shape(step.weight) for step in self.steps if step.weight)
        products = (self._named(shape) for shape in weights)
        factors = (sorted(map(text_of, shape), key=lambda text: text != "r") for shape in products)
        return " + ".join(" * ".join(pair) for pair in factors)

    def _named(self, shape: tuple[Width, Width]) -> tuple[Width, Width]:
        """``joint.in_features`` is what every role has."""
        own = {f"{JOINT}.in_features": f"{self.roles[0]}.in_features"}
        rows, columns = ({own.get(s, s): count for s, count in width.items()} for width in shape)
        return rows, columns

    def misfit(self, attributes: Mapping[str, Mapping[str, Any]]) -> str | None:
        """Why the template does not fit matched operators, or None.

        Args:
            attributes: of every matched operator, by role.
        """
        sizes = {
            f"{role}.{key}": int(attributes[role][key])
            for role in self.roles
            for key in ("in_features", "out_features")
        }
        if len({sizes[f"{role}.in_features"] for role in self.roles}) > 1:
            return f"{', '.join(self.roles)} read values of different widths"
        named = {step.bias for step in self.steps}
        for role in self.roles:
            if attributes[role].get("bias") and f"{role}.bias" not in named:
                return f"{role} has a bias, and the template leaves it out (bias: {role}.bias)"
        sizes[f"{JOINT}.in_features"] = sizes[f"{self.roles[0]}.in_features"]
        problems: list[Fault] = []
        widths = _widths(
            self.steps,
            {self.input: {"": sizes[f"{JOINT}.in_features"]}},
            problems,
            lambda width: substituted(width, sizes),
        )
        for role, name in self.outputs:
            wanted = {"": sizes[f"{role}.out_features"]}
            if widths[name] != wanted:
                return (
                    f"template node '{name}' has {text_of(widths[name])} features, and {role} has "
                    f"{text_of(wanted)}"
                )
        return problems[0].message if problems else None


def build_template(
    name: str,
    graph: Mapping[str, Mapping[str, Any]],
    outputs: Mapping[str, str] | None,
    readers: Mapping[str, str],
) -> Template:
    """Check a template as written against the pattern that it belongs to.

    Args:
        name: of the form.
        graph: node -> its keys (op, input or inputs, weight, bias).
        outputs: matched operator -> node that takes its place; may be left out if one operator
            is matched, and one node is read by no other.
        readers: matched linear operator -> name of the value that it reads.

    Raises:
        TemplateErrors: with every problem found.
    """
    problems: list[Fault] = []
    if not graph:
        raise TemplateErrors([Fault(("graph",), "empty-graph", "graph has no node")])
    if not readers:
        message = "the pattern has no linear operator that a graph could replace"
        raise TemplateErrors([Fault(("graph",), "form-does-not-apply", message)])
    for clash in graph.keys() & set(readers.values()):
        message = f"'{clash}' is what the match reads; the node needs another name"
        raise TemplateErrors([Fault(("graph", clash), "name-clash", message)])
    problems += [
        Fault(("graph", node), "reserved-name", message, "give the node another name")
        for node in graph
        if (message := _misnamed(node))
    ]
    steps = _ordered(_steps(graph, problems), problems)
    if outputs is None:
        for step in steps:
            _check_references(step, graph, tuple(readers.values()), problems)
        if problems:
            raise TemplateErrors(problems)
        outputs = _only_output(steps, readers)
    for role, node in outputs.items():
        if role not in readers:
            message = f"'{role}' is no linear operator of the pattern"
            problems.append(
                Fault(("outputs", role), "bad-outputs", message, word=role, known=tuple(readers))
            )
        if node not in graph:
            message = f"graph has no node '{node}'"
            problems.append(
                Fault(("outputs", role), "bad-outputs", message, word=node, known=tuple(graph))
            )
    roles = tuple(role for role in readers if role in outputs)
    if not roles:
        raise TemplateErrors(problems)  # what the nodes may read depends on the roles
    values = tuple(dict.fromkeys(readers[role] for role in roles))
    if len(values) > 1:
        message = f"{', '.join(roles)} read different values ({', '.join(f'${v}' for v in values)})"
        hint = (
            "a template replaces operators that read the same value; what makes a value and what "
            "reads it get smaller together with 'form: narrow'"
        )
        problems.append(Fault(("outputs",), "bad-outputs", message, hint))
    for step in steps:
        _check_references(step, graph, values, problems)
        _check_sources(step, roles, problems)
    if set(outputs.values()) <= graph.keys():
        _check_use(steps, outputs, problems)
    if not problems:
        made = Template.model_construct(
            name=name,
            input=values[0],
            steps=tuple(steps),
            outputs=tuple((role, outputs[role]) for role in roles),
        )
        problems += _made_problems(made)
        if not problems:
            return Template(
                name=made.name, input=made.input, steps=made.steps, outputs=made.outputs
            )
    raise TemplateErrors(problems)


def _misnamed(node: str) -> str:
    """Why a node cannot have a name; empty if it can."""
    if not _IDENTIFIER.fullmatch(node):
        return f"'{node}' is no name: letters, digits and underscores"
    if is_reserved(node):
        return f"'{node}' means something else to Python or to a torch module"
    return ""


def _placed(problem: Fault) -> str:
    place = ".".join(map(str, problem.path))
    return f"{place}: {problem.message}"


def _made_problems(made: Template) -> list[Fault]:
    """What is wrong with a template that is made already: what :func:`build_template` looks for.

    Each step is compared with what comes of it as a node of a rule file, so that nothing is in a
    template that could not have been written in one.
    """
    problems: list[Fault] = []
    names = [step.name for step in made.steps]
    words = [made.input, *made.roles]
    if not _FORM.fullmatch(made.name):
        problems.append(Fault(("name",), "bad-name", f"'{made.name}' is no name of a template"))
    if len({*names}) < len(names) or len({*made.roles}) < len(made.roles):
        problems.append(Fault(("steps",), "duplicate-key", "a name is given twice"))
    problems += [
        Fault(("outputs",), "bad-name", f"'{word}' is no name")
        for word in words
        if not _IDENTIFIER.fullmatch(word)
    ]
    if not made.steps or not made.outputs:
        problems.append(Fault(("steps",), "empty-graph", "it has no node, or no output"))
    known = {made.input}
    for step in made.steps:
        if message := _misnamed(step.name):
            problems.append(Fault(("graph", step.name), "reserved-name", message))
        if not step.inputs or not known.issuperset(step.inputs) or step.name in known:
            message = f"'{step.name}' reads nothing, or what comes after it"
            problems.append(Fault(("graph", step.name), "unbound-value", message))
        known.add(step.name)
    if problems:
        return problems
    graph = {
        step.name: {
            "op": step.op, "inputs": list(step.inputs), "weight": step.weight, "bias": step.bias
        }
        for step in made.steps
    }  # fmt: skip
    if _steps(graph, problems) != list(made.steps):
        problems.append(Fault(("graph",), "bad-name", "its nodes are not as a rule has them"))
    for role, node in made.outputs:
        if node not in graph:
            problems.append(Fault(("outputs", role), "bad-outputs", f"graph has no '{node}'"))
    for step in made.steps:
        _check_sources(step, made.roles, problems)
    _check_use(made.steps, dict(made.outputs), problems)
    return problems or _shape_problems(made) or _factor_problems(made)


def _only_output(steps: Sequence[TemplateStep], readers: Mapping[str, str]) -> dict[str, str]:
    """The outputs where there can be no doubt about them."""
    read = {source for step in steps for source in step.inputs}
    ends = [step.name for step in steps if step.name not in read]
    if len(readers) == 1 and len(ends) == 1:
        return {next(iter(readers)): ends[0]}
    example = f"for example outputs: {{{next(iter(readers))}: {ends[-1]}}}"
    message = "graph needs 'outputs': which operator becomes which node"
    raise TemplateErrors([Fault(("graph",), "missing-outputs", message, example)])


def _steps(graph: Mapping[str, Mapping[str, Any]], problems: list[Fault]) -> list[TemplateStep]:
    steps = []
    for name, node in graph.items():
        op, here = str(node.get("op", "")), ("graph", name)
        if op not in OPERATORS:
            message = f"a template has no operator '{op}'"
            problems.append(
                Fault((*here, "op"), "unknown-operator", message, word=op, known=OPERATORS)
            )
        one, many = node.get("input"), node.get("inputs")
        if (one is None) == (many is None):
            found = "neither" if one is None else "both"
            message = f"'{name}' takes one of 'input' and 'inputs'; it has {found}"
            problems.append(Fault(here, "missing-input", message, "for example input: $x"))
        given = tuple(many or ()) if one is None else (one,)
        inputs = tuple(str(reference).removeprefix("$") for reference in given)
        least, most = _ARITY.get(op, (1, 1))
        if inputs and op in OPERATORS and not least <= len(inputs) <= most:
            count = "two or more inputs" if op == "cat" else ("one input", "two inputs")[least - 1]
            message = f"{op} takes {count}, not {len(inputs)}"
            problems.append(Fault(here, "wrong-inputs", message))
        weight, bias = str(node.get("weight") or ""), str(node.get("bias") or "")
        if op == "linear" and not weight:
            hint = "for example weight: fc.right"
            problems.append(Fault(here, "missing-key", "linear needs 'weight'", hint))
        for key, value in (("weight", weight), ("bias", bias)):
            if value and op in OPERATORS and op != "linear":
                message = f"{op} takes no {key}"
                problems.append(Fault((*here, key), "wrong-place", message))
        steps.append(TemplateStep(name=name, op=op, inputs=inputs, weight=weight, bias=bias))
    return steps


def _ordered(steps: list[TemplateStep], problems: list[Fault]) -> list[TemplateStep]:
    by_name = {step.name: step for step in steps}
    order = TopologicalSorter(
        {step.name: [name for name in step.inputs if name in by_name] for step in steps}
    )
    try:
        return [by_name[name] for name in order.static_order()]
    except CycleError as error:
        cycle = error.args[1]
        message = f"nodes read one another in a circle: {' <- '.join(cycle)}"
        problems.append(Fault(("graph", cycle[0]), "template-cycle", message))
        return steps


def _check_references(
    step: TemplateStep,
    graph: Mapping[str, Mapping[str, Any]],
    values: Sequence[str],
    problems: list[Fault],
) -> None:
    for index, name in enumerate(step.inputs):
        if name not in graph and name not in values:
            message = f"'${name}' is neither a node of the graph nor what the match reads"
            known = tuple(f"${each}" for each in (*values, *graph))
            place: tuple[str | int, ...] = ("graph", step.name, "input")
            if graph[step.name].get("input") is None:
                place = ("graph", step.name, "inputs", index)
            problems.append(Fault(place, "unbound-value", message, word=f"${name}", known=known))


def _check_sources(step: TemplateStep, roles: Sequence[str], problems: list[Fault]) -> None:
    right = f"{JOINT}.right" if len(roles) > 1 else f"{roles[0]}.right" if roles else ""
    weights = (right, *(f"{role}.left" for role in roles))
    for key, source, known in (
        ("weight", step.weight, weights),
        ("bias", step.bias, tuple(f"{role}.bias" for role in roles)),
    ):
        if source and source not in known:
            message = f"there is no {key} '{source}'"
            path = ("graph", step.name, key)
            problems.append(Fault(path, "unknown-source", message, word=source, known=known))


def _check_use(
    steps: Sequence[TemplateStep], outputs: Mapping[str, str], problems: list[Fault]
) -> None:
    """Every node has to serve an output."""
    needed = set(outputs.values())
    for step in reversed(steps):
        if step.name in needed:
            needed.update(step.inputs)
        else:
            message = f"nothing reads '{step.name}', and it is no output"
            problems.append(Fault(("graph", step.name), "unused-node", message))


def _factor_problems(made: Template) -> list[Fault]:
    """Every operator has a node of its own, and its left factor is in use."""
    problems: list[Fault] = []
    owners: dict[str, str] = {}
    used = {step.weight for step in made.steps}
    for role, node in made.outputs:
        if node in owners:
            message = f"'{node}' takes the place of '{owners[node]}' already"
            problems.append(Fault(("outputs", role), "bad-outputs", message))
        elif f"{role}.left" not in used:
            message = f"no node has the weight '{role}.left', without which '{role}' is lost"
            problems.append(Fault(("outputs", role), "unused-source", message))
        owners.setdefault(node, role)
    return problems


def _shape_problems(made: Template) -> list[Fault]:
    problems: list[Fault] = []
    first = made.roles[0]
    inputs = {made.input: {f"{first}.in_features": 1}}
    # The operators read one value, so their inputs are equally wide.
    alike = {f"{role}.in_features": f"{first}.in_features" for role in (*made.roles, JOINT)}

    def named_alike(width: Width) -> Width:
        return sum_of([{alike.get(symbol, symbol): count} for symbol, count in width.items()])

    widths = _widths(made.steps, inputs, problems, named_alike)
    if problems:
        return problems
    for role, node in made.outputs:
        wanted = {f"{role}.out_features": 1}
        if never_equal(widths[node], wanted):
            message = (
                f"'{node}' has {text_of(widths[node])} features, and {role} has {text_of(wanted)}"
            )
            problems.append(Fault(("outputs", role), "shape-mismatch", message))
    return problems


def _widths(
    steps: Sequence[TemplateStep],
    known: Mapping[str, Width],
    problems: list[Fault],
    simplify: Callable[[Width], Width],
) -> dict[str, Width]:
    """Width of every value, with symbols as ``simplify`` has them; misfits go to ``problems``."""
    widths = dict(known)
    for step in steps:
        inputs = [widths[name] for name in step.inputs if name in widths]
        if len(inputs) < len(step.inputs):
            continue
        if step.op == "linear":
            rows, columns = (simplify(width) for width in source_shape(step.weight))
            if never_equal(inputs[0], columns):
                message = (
                    f"'{step.name}' reads {text_of(inputs[0])} features, and {step.weight} takes "
                    f"{text_of(columns)}"
                )
                path = ("graph", step.name, "weight")
                problems.append(Fault(path, "shape-mismatch", message))
            if step.bias:
                length = simplify({f"{step.bias.partition('.')[0]}.out_features": 1})
                if never_equal(rows, length):
                    message = (
                        f"'{step.name}' has {text_of(rows)} features, and {step.bias} has "
                        f"{text_of(length)}"
                    )
                    path = ("graph", step.name, "bias")
                    problems.append(Fault(path, "shape-mismatch", message))
            widths[step.name] = rows
        elif step.op == "cat":
            widths[step.name] = sum_of(inputs)
        else:
            if never_equal(inputs[0], inputs[-1]):
                message = (
                    f"'{step.name}' joins values of {text_of(inputs[0])} and {text_of(inputs[-1])} "
                    "features"
                )
                problems.append(Fault(("graph", step.name), "shape-mismatch", message))
            widths[step.name] = inputs[0]
    return widths
