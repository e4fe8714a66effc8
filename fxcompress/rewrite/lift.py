"""Function calls of an ``fx.GraphModule`` that apply a parameter, as modules.

before::

    w = get_attr[target=fc.weight]; b = get_attr[target=fc.bias]
    y = call_function[target=F.linear](x, w, b)        # or aten.linear, after torch.export

after::

    y = call_module[target=fc](x)                      # nn.Linear with the same parameters

so that what takes their place is nodes of the graph, too.  A plan is made on a copy in which all
calls are lifted (:func:`fxcompress.rewrite.prepared`); in the model itself only those are that
the plan rewrites.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import GraphAppendingTracer, TraceError

from fxcompress.operators.applied import transposes
from fxcompress.operators.calls import Application, function_name
from fxcompress.operators.modules import application
from fxcompress.operators.shape import Shape


@dataclass(frozen=True, eq=False)
class _Read:
    """A parameter, or its transpose, as a node of the graph has it."""

    parameter: nn.Parameter
    transposed: bool

    @property
    def shape(self) -> torch.Size:
        return self.parameter.mT.shape if self.transposed else self.parameter.shape

    @property
    def ndim(self) -> int:
        return self.parameter.ndim

    @property
    def dtype(self) -> torch.dtype:
        return self.parameter.dtype

    @property
    def device(self) -> torch.device:
        return self.parameter.device

    def __len__(self) -> int:
        return len(self.shape)


def lift(model: fx.GraphModule, only: Collection[str] | None = None) -> None:
    """Turn calls of functions that apply parameters into modules; changes ``model``.

    Only parameters are lifted that nothing else reads, and that are always applied in one way.  The
    module gets the path of the parameters' owner if that owns nothing else, so that names in the
    state dict stay as they are; ``<weight>_linear`` otherwise.

    Args:
        model: its parameters are only read.
        only: lift only the calls whose module gets one of these paths.
    """
    called = {node.target for node in model.graph.nodes if node.op == "call_module"}
    readers = defaultdict(list)
    for node in model.graph.nodes:
        if node.op == "get_attr":
            readers[node.target].append(node)
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for name, nodes in readers.items():
        known = name in parameters and parameters[name].ndim > 1
        weight = _applied(nodes, parameters[name]) if known else None
        if weight is not None:
            bias = _bias(weight, readers, parameters)
            path = _path(model, called, name, weight.shape.op, bias)
            if only is None or path in only:
                found.append((path, weight, [*filter(None, (name, bias))]))
    for path, weight, names in found:
        _replace(model, path, weight, names)
    if found:
        model.graph.lint()
        model.recompile()


@dataclass(frozen=True, eq=False)
class _Call:
    """A node that applies a parameter.

    Attributes:
        node: the call.
        read: the node that has the parameter.
        weight: what it has.
    """

    node: fx.Node
    read: fx.Node
    weight: _Read

    def application(self) -> Application | None:
        """What is applied to what, in proxies of nodes as they are now; None if it is not."""

        tracer = GraphAppendingTracer(self.node.graph)

        def known(value: fx.Node) -> Any:
            return self.weight if value is self.read else fx.Proxy(value, tracer)

        args, kwargs = fx.map_arg((self.node.args, self.node.kwargs), known)
        name = str(_name(self.node))
        try:
            made = application(name, args, kwargs, lambda value: value is self.weight)
        except (TraceError, TypeError):
            return None  # what it applies, or how, is a value of the graph
        if made is None or made.weight is not self.weight or not isinstance(made.data, fx.Proxy):
            return None
        return made


@dataclass(frozen=True, eq=False)
class _Applied:
    """A parameter that all its readers apply in one way.

    Attributes:
        shape: of the operator that each of them is.
        calls: they.
    """

    shape: Shape
    calls: Sequence[_Call]


def _applied(nodes: Sequence[fx.Node], parameter: nn.Parameter) -> _Applied | None:
    """What the readers of a parameter have in common; None if it is no operator.

    Args:
        nodes: that have the parameter.
        parameter: a matrix, or larger.
    """
    calls: list[_Call] = []
    shapes: set[Shape | None] = set()
    waiting = [(node, _Read(parameter, False)) for node in nodes]
    while waiting:
        read, weight = waiting.pop()
        for user in read.users:
            name = _name(user)
            swaps = None
            if name == "_assert_tensor_metadata":
                continue  # of its type, by torch.export
            if name is not None and user.args[:1] == (read,):
                swaps = transposes(name, weight, _rest(user), user.kwargs)
            if swaps is not None:
                waiting.append((user, _Read(parameter, weight.transposed != swaps)))
                continue
            calls.append(_Call(user, read, weight))
            made = calls[-1].application()
            shape = None if made is None else made.shape
            shapes.add(shape.mirrored() if shape is not None and weight.transposed else shape)
    shape = shapes.pop() if len(shapes) == 1 else None
    return None if shape is None else _Applied(shape, calls)


def _rest(node: fx.Node) -> tuple[Any, ...]:
    """What a function is given beside its first operand."""
    return () if node.target is getattr else node.args[1:]


def _name(node: fx.Node) -> str | None:
    """Name of the function that a node calls, or of the attribute; None if it calls none."""
    if node.op == "call_method":
        return str(node.target)
    if node.op != "call_function":
        return None
    return str(node.args[1]) if node.target is getattr else function_name(node.target)


def _bias(
    weight: _Applied,
    readers: Mapping[Any, Sequence[fx.Node]],
    parameters: Mapping[str, nn.Parameter],
) -> str | None:
    """The parameter that all of the calls add as a bias, and nothing else reads."""
    made = [call.application() for call in weight.calls]
    added = {each.bias.node.target for each in made if each and isinstance(each.bias, fx.Proxy)}
    name = str(added.pop()) if len(added) == 1 else ""
    if name not in parameters or weight.shape.is_mirrored:
        return None
    users = [user for node in readers[name] for user in node.users]
    whole = tuple(parameters[name].shape) == (weight.shape.out_features,)
    return name if whole and {*users} == {call.node for call in weight.calls} else None


def _replace(model: fx.GraphModule, path: str, applied: _Applied, names: Sequence[str]) -> None:
    """Put a module in the place of calls of functions on a weight and perhaps a bias."""
    weight, *bias = (model.get_parameter(name) for name in names)
    shape: Any = applied.shape
    module: Any = (replace(shape, bias=True) if bias else shape).applying(weight)
    if bias:
        (module.bias,) = bias
    module.train(model.training)
    for name in names:
        owner, _, last = name.rpartition(".")
        delattr(model.get_submodule(owner), last)
    model.add_submodule(path, module)
    for call in applied.calls:
        node = call.node
        with model.graph.inserting_before(node):
            found: Any = call.application()
            data = found.before(found.data)
            made: Any = fx.Proxy(model.graph.call_module(path, (data.node,)), data.tracer)
            out = made if bias else found.after(made)
        made.node.meta = dict(node.meta)
        out.node.meta = dict(node.meta)
        node.replace_all_uses_with(out.node)
        model.graph.erase_node(node)
    for name in names:
        _erase([node for node in model.graph.nodes if (node.op, node.target) == ("get_attr", name)])


def _erase(nodes: Sequence[fx.Node]) -> None:
    """Take nodes out of their graph with all that reads them: views of a weight."""
    for node in nodes:
        _erase([*node.users])
        node.graph.erase_node(node)


def _path(
    model: fx.GraphModule, called: Collection[Any], weight: str, op: str, bias: str | None
) -> str:
    """Where the module for a call goes, whether or not other calls are lifted before it."""
    owner, _, name = weight.rpartition(".")
    if owner and name == "weight" and bias in (None, f"{owner}.bias"):
        held = {key for key, _ in model.get_submodule(owner).state_dict().items()}
        alone = owner not in called and not model.get_submodule(owner)._modules
        if alone and held == {"weight"} | ({"bias"} if bias else set()):
            return owner
    path = f"{weight}_{op}".replace(".", "_")
    while hasattr(model, path):
        path += "_"
    return path
