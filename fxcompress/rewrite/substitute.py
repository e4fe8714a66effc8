"""Put a body in the place of an operator.

In an ``fx.GraphModule`` the matched nodes are replaced by the nodes of the body, *in its
graph*; in any other module the leaf is replaced by a facade that runs the same body.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import fx, nn

from fxcompress.forms import Body, Form, JointForm, Rank
from fxcompress.operators.applied import operator_at
from fxcompress.operators.modules import shape_of
from fxcompress.operators.per_channel import keep_channels
from fxcompress.operators.resize import resize
from fxcompress.rewrite.facade import Factorized
from fxcompress.rewrite.joint import JointMember, Shared
from fxcompress.rewrite.node_values import value_metas
from fxcompress.rewrite.replace import Places

_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


@dataclass(frozen=True)
class Provenance:
    """Where a new node comes from; stored in ``node.meta["fxcompress"]`` as a dict."""

    rule: str
    location: str
    site: str
    form: str
    rank: Rank


@dataclass(frozen=True, eq=False)
class Substituted:
    """What is known of a model while some of its operators are replaced.

    Attributes:
        modules: where they hang.
        calls: in an fx graph, the nodes that call a module, by its path.
        order: the places of these nodes in the graph.
    """

    modules: Places
    calls: Mapping[str, Sequence[fx.Node]]
    order: Mapping[fx.Node, int]


@contextmanager
def substituting(model: nn.Module) -> Iterator[Substituted]:
    """Around all substitutions in a model: it is gone through once, and compiled once."""
    calls: dict[str, list[fx.Node]] = {}
    order: dict[fx.Node, int] = {}
    if isinstance(model, fx.GraphModule):
        for position, node in enumerate(model.graph.nodes):
            if node.op == "call_module":
                calls.setdefault(str(node.target), []).append(node)
                order[node] = position
    yield Substituted(Places(model), calls, order)
    if calls:
        assert isinstance(model, fx.GraphModule)
        model.graph.lint()
        model.recompile()


def substitute(
    model: nn.Module,
    body: Body,
    form: Form | JointForm,
    origins: Sequence[Provenance],
    places: Substituted,
    held: Collection[str] = (),
) -> None:
    """Replace the operators at ``origins`` by a body; changes ``model``.

    What they share hangs below the first operator, as ``shared``; then each head is a ``body``.
    Nodes of an fx graph keep the metadata of the node they replace (the last one also its
    value's), and all carry their :class:`Provenance`.

    Args:
        model: has the operators.
        body: one head for each of them, in their order.
        form: of the body.
        origins: what is replaced, and why.
        places: of the modules and calls of ``model``.
        held: of a hidden value, names of modules and parameters with entries of its channels.
    """
    originals = [operator_at(model, origin.site) for origin in origins]
    if body.shared is not None:
        _take_over(body.shared, originals)
    for original, head in zip(originals, body.heads, strict=True):
        _take_over(head, [original])
    calls = [places.calls.get(origin.site, ()) for origin in origins]
    if body.kept is not None:
        _narrow(model, body, origins, held, calls)
        return
    if all(calls):
        assert isinstance(model, fx.GraphModule)
        _substitute_nodes(model, body, originals, origins, calls, places)
        return
    rank = origins[0].rank
    joint = None if body.shared is None else Shared(body.shared, len(origins))
    for index, (original, head) in enumerate(zip(originals, body.heads, strict=True)):
        if joint is None:
            facade = Factorized(original, head, form, rank)
        else:
            assert isinstance(form, JointForm)
            facade = JointMember(original, head, form, rank, joint, index)
        places.modules.replace(original, facade)


def _narrow(
    model: nn.Module,
    body: Body,
    origins: Sequence[Provenance],
    held: Collection[str],
    calls: Sequence[Sequence[fx.Node]],
) -> None:
    """Leave the channels of a hidden value that are kept; every module stays in its place."""
    assert body.kept is not None
    channels = shape_of(operator_at(model, origins[-1].site)).in_features
    for head, origin, nodes in zip(body.heads, origins, calls, strict=True):
        resize(model, origin.site, head.get_submodule("layer"))
        for node in nodes:
            node.meta = {**node.meta, **_meta(node, origin)}
    for name in held:
        keep_channels(model, name, body.kept, channels)
    _forget_values([node for nodes in calls[:-1] for node in nodes], {*calls[-1]})


def _forget_values(nodes: Sequence[fx.Node], ends: Collection[fx.Node]) -> None:
    """Take sizes that are no longer true off some nodes and off all that is made of them."""
    waiting = [*nodes]
    while waiting:
        node = waiting.pop()
        for key in ("val", "tensor_meta", "example_value"):
            node.meta.pop(key, None)
        waiting += [user for user in node.users if user not in ends]


def _substitute_nodes(
    model: fx.GraphModule,
    body: Body,
    originals: Sequence[nn.Module],
    origins: Sequence[Provenance],
    calls: Sequence[Sequence[fx.Node]],
    places: Substituted,
) -> None:
    """Replace the nodes that call the operators by the nodes of the body."""
    paths = [f"{o.site}.body" if body.shared is not None else o.site for o in origins]
    for original, head in zip(originals, body.heads, strict=True):
        place: nn.Module = head
        if body.shared is not None:
            place = nn.Module()
            place.body = head
            if head is body.heads[0]:
                place.shared = body.shared
        places.modules.replace(original, place)
    owner = origins[0]
    for together in zip(*calls, strict=True):  # the first calls, the second calls, ...
        first = min(together, key=places.order.__getitem__)
        x = _value(first)
        shared: tuple[fx.Node, ...] = ()
        if body.shared is not None:
            with model.graph.inserting_before(first):
                meta = _meta(first, owner)
                shared = _copy(model.graph, body.shared, [x], f"{owner.site}.shared", meta)
        for node, head, origin, path in zip(together, body.heads, origins, paths, strict=True):
            with model.graph.inserting_before(node):
                inputs = [x, *shared]
                (value,) = _copy(model.graph, head, inputs, path, _meta(node, origin))
            _replace(model.graph, node, value, origin)


def _take_over(body: fx.GraphModule, originals: Sequence[nn.Module]) -> None:
    """Factors learn if a weight did that they stand for, biases if a bias did.

    Modes are kept, and the memory format: a weight in another one than its input is copied in every
    call.
    """
    learning = {
        name
        for original in originals
        for name, parameter in original.named_parameters()
        if parameter.requires_grad
    }
    for path, parameter in body.named_parameters():
        kind = "bias" if path.rpartition(".")[2] == "bias" else "weight"
        parameter.requires_grad_(kind in learning)
    body.train(originals[0].training)
    for original in originals:
        if (order := _channels_last(original)) is not None:
            body.to(memory_format=order)  # type: ignore[call-overload]


def _channels_last(module: nn.Module) -> torch.memory_format | None:
    """The memory format of a weight, if it is not the usual one."""
    for parameter in module.parameters():
        order = _CHANNELS_LAST.get(parameter.dim())
        if order is not None and not parameter.is_contiguous():
            return order if parameter.is_contiguous(memory_format=order) else None
    return None


def _value(node: fx.Node) -> fx.Node:
    value = node.args[0] if node.args else next(iter(node.kwargs.values()))
    assert isinstance(value, fx.Node)
    return value


def _meta(node: fx.Node, origin: Provenance) -> dict[str, Any]:
    keys = ("nn_module_stack", "stack_trace")
    kept: dict[str, Any] = {key: node.meta[key] for key in keys if key in node.meta}
    return {**kept, "fxcompress": {**asdict(origin), "node": node.name}}


def _copy(
    graph: fx.Graph,
    body: fx.GraphModule,
    inputs: Sequence[fx.Node],
    path: str,
    meta: Mapping[str, Any],
) -> tuple[fx.Node, ...]:
    """Copy the nodes of a body that hangs at ``path`` into a graph; the values it returns."""
    copies: dict[fx.Node, Any] = {}
    known = value_metas(body, inputs)
    values = iter(inputs)
    for inner in body.graph.nodes:
        if inner.op == "placeholder":
            copies[inner] = next(values)
        elif inner.op == "output":
            result = inner.args[0]
            results = result if isinstance(result, tuple) else (result,)
            return tuple(copies[one] for one in results)
        else:
            copy = graph.node_copy(inner, copies.__getitem__)
            if inner.op in ("call_module", "get_attr"):
                copy.target = f"{path}.{inner.target}"
            copy.meta = {**meta, **known.get(inner, {})}
            copies[inner] = copy
    raise AssertionError("a graph without an output")


def _replace(graph: fx.Graph, node: fx.Node, value: fx.Node, origin: Provenance) -> None:
    value.meta = {**node.meta, **_meta(node, origin)}
    node.replace_all_uses_with(value)
    graph.erase_node(node)
