"""The form that a template of a rule file stands for: see :mod:`fxcompress.forms.template`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxcompress.errors import RewriteError
from fxcompress.forms.body import Body
from fxcompress.forms.form import (
    Counts,
    Form,
    JointForm,
    Shapes,
    assign,
    balanced,
    balanced_parts,
    bare_linear,
    linear,
)
from fxcompress.forms.target import Ranks
from fxcompress.forms.template import Template, TemplateStep
from fxcompress.forms.widths import size_of, source_shape
from fxcompress.operators.linear import LinearShape

_FUNCTIONS: Mapping[str, Callable[..., Any]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "add": torch.add,
    "sub": torch.sub,
    "mul": torch.mul,
}


class GraphForm(Form):
    """A template for one operator."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.name = template.name

    def parameters(self, shape: LinearShape, ranks: Ranks) -> Counts:
        return _parameters(self.template, (shape,), ranks)

    def empty(self, shape: LinearShape, rank: int) -> fx.GraphModule:
        (role,), steps = self.template.roles, self.template.steps
        root, graph = nn.Module(), fx.Graph()
        values = {self.template.input: graph.placeholder("input")}
        sizes = _sizes(self.template, (shape,), rank)
        _add(steps, root, graph, values, sizes, {role: shape})
        graph.output(values[dict(self.template.outputs)[role]])
        return fx.GraphModule(root, graph, class_name="Template")

    def fill(self, body: fx.GraphModule, factors: Sequence[Tensor], bias: Tensor | None) -> None:
        (role,) = self.template.roles
        left, right = balanced(*factors)
        _fill(self.template.steps, body, {role: left}, right, {role: bias})


class GraphJointForm(JointForm):
    """A template for several operators: steps that several outputs need are shared."""

    def __init__(self, template: Template) -> None:
        self.template = template
        self.name = template.name

    def parameters(self, shapes: Shapes, ranks: Ranks) -> Counts:
        return _parameters(self.template, shapes, ranks)

    def empty(self, shapes: Shapes, rank: int) -> Body:
        made = self.template
        sizes = _sizes(made, shapes, rank)
        by_role = dict(zip(made.roles, shapes, strict=True))
        shared, own = _parts(made)
        # What is handed on: shared values that a head reads, or is.
        ends = dict(made.outputs)
        read = {name for steps in own for step in steps for name in step.inputs} | {*ends.values()}
        handed = [step.name for step in shared if step.name in read]
        root, graph = nn.Module(), fx.Graph()
        values = {made.input: graph.placeholder("input")}
        _add(shared, root, graph, values, sizes, by_role)
        graph.output(tuple(values[name] for name in handed))
        common = fx.GraphModule(root, graph, class_name="Shared")
        heads = []
        for role, steps in zip(made.roles, own, strict=True):
            root, graph = nn.Module(), fx.Graph()
            values = {made.input: graph.placeholder("input")}
            values |= {name: graph.placeholder(f"shared_{name}") for name in handed}
            _add(steps, root, graph, values, sizes, by_role)
            graph.output(values[ends[role]])
            heads.append(fx.GraphModule(root, graph, class_name="Head"))
        return Body(common, tuple(heads))

    def fill(
        self,
        body: Body,
        lefts: Sequence[Tensor],
        right: Tensor,
        biases: Sequence[Tensor | None],
    ) -> None:
        balanced_lefts, right = balanced_parts(lefts, right)
        parts = dict(zip(self.template.roles, balanced_lefts, strict=True))
        named = dict(zip(self.template.roles, biases, strict=True))
        shared, own = _parts(self.template)
        for steps, part in zip([shared, *own], body.parts, strict=True):
            _fill(steps, part, parts, right, named)


def template_form(template: Template) -> Form | JointForm:
    """The form of a template: a joint one if it is about several operators."""
    return GraphForm(template) if len(template.roles) == 1 else GraphJointForm(template)


def _parts(made: Template) -> tuple[list[TemplateStep], list[list[TemplateStep]]]:
    """Steps that several outputs need, and those that one does, by output."""
    needed: list[set[str]] = []
    for _, end in made.outputs:
        names = {end}
        for step in reversed(made.steps):
            if step.name in names:
                names.update(step.inputs)
        needed.append(names)
    uses = {step.name: sum(step.name in names for names in needed) for step in made.steps}
    shared = [step for step in made.steps if uses[step.name] > 1]
    own = [[s for s in made.steps if uses[s.name] == 1 and s.name in names] for names in needed]
    return shared, own


def _sizes(made: Template, shapes: Shapes, rank: int) -> dict[str, int]:
    sizes = {"r": rank, "joint.in_features": shapes[0].in_features}
    for role, shape in zip(made.roles, shapes, strict=True):
        sizes[f"{role}.in_features"] = shape.in_features
        sizes[f"{role}.out_features"] = shape.out_features
    return sizes


def _parameters(made: Template, shapes: Shapes, ranks: Ranks) -> Counts:
    counts = [made.parameters(_sizes(made, shapes, int(rank))) for rank in ranks]
    return np.array(counts, dtype=np.int64)


def _add(
    steps: Sequence[TemplateStep],
    root: nn.Module,
    graph: fx.Graph,
    values: dict[str, fx.Node],
    sizes: Mapping[str, int],
    shapes: Mapping[str, LinearShape],
) -> None:
    """Append steps to a graph; ``values`` gains what they return."""
    like = next(iter(shapes.values()))
    for step in steps:
        inputs = [values[name] for name in step.inputs]
        if step.op == "linear":
            rows, columns = (size_of(width, sizes) for width in source_shape(step.weight))
            # A bias that the template names may be missing in a match.
            bias = bool(step.bias) and shapes[step.bias.partition(".")[0]].bias
            if hasattr(fx.GraphModule, step.name):  # of a torch newer than forms/reserved.py
                raise RewriteError(
                    f"'{step.name}' names something of torch's modules: give that node of the "
                    "template another name"
                )
            root.add_module(step.name, bare_linear(columns, rows, bias, like))
            values[step.name] = graph.call_module(step.name, tuple(inputs))
        elif step.op == "cat":
            values[step.name] = graph.call_function(torch.cat, (inputs, -1))
        else:
            values[step.name] = graph.call_function(_FUNCTIONS[step.op], tuple(inputs))


def _fill(
    steps: Sequence[TemplateStep],
    body: fx.GraphModule,
    lefts: Mapping[str, Tensor],
    right: Tensor,
    biases: Mapping[str, Tensor | None],
) -> None:
    for step in steps:
        if step.op != "linear":
            continue
        owner, _, part = step.weight.partition(".")
        layer = linear(body, step.name)
        assign(layer.weight, lefts[owner] if part == "left" else right)
        bias = biases[step.bias.partition(".")[0]] if step.bias else None
        if bias is not None:
            assign(layer.bias, bias)
