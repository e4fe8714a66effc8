"""Linear function calls of an ``fx.GraphModule``, as modules.

before::

    w = get_attr[target=fc.weight]; b = get_attr[target=fc.bias]
    y = call_function[target=F.linear](x, w, b)        # or aten.linear, after torch.export

after::

    y = call_module[target=fc](x)                      # nn.Linear with the same parameters

so that everything downstream deals with modules only.  A plan is made on a copy in which all
calls are lifted (:func:`fxcompress.rewrite.prepared`); in the model itself only those are that
the plan rewrites.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

from fxcompress.operators.linear import linear_arguments

_LINEAR = {F.linear, torch.ops.aten.linear.default}


def lift(model: fx.GraphModule, only: Collection[str] | None = None) -> None:
    """Turn calls of linear functions on parameters into modules; changes ``model``.

    Only parameters that no other node reads are lifted.  The module gets the path of the
    parameters' owner if that owns nothing else, so that names in the state dict stay as they
    are; ``<weight>_linear`` otherwise.

    Args:
        model: its parameters are only read.
        only: lift only the calls whose module gets one of these paths.
    """
    calls = []
    reads = Counter(node.target for node in model.graph.nodes if node.op == "get_attr")
    called = {node.target for node in model.graph.nodes if node.op == "call_module"}
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    once = {name for name in parameters if reads[name] == 1}
    for node in model.graph.nodes:
        if node.op != "call_function" or node.target not in _LINEAR:
            continue
        _, weight, bias = linear_arguments(node.args, node.kwargs)
        if _is_read(weight, once) and (bias is None or _is_read(bias, once)):
            path = _path(model, called, weight.target, bias and bias.target)
            if only is None or path in only:
                calls.append((path, node))
    for path, node in calls:
        x, weight, bias = linear_arguments(node.args, node.kwargs)
        sources = [source for source in (weight, bias) if source is not None]
        module = _linear(*(model.get_parameter(source.target) for source in sources))
        module.train(model.training)
        for source in sources:
            _delete(model, source.target)
        model.add_submodule(path, module)
        with model.graph.inserting_before(node):
            call = model.graph.call_module(path, (x,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        model.graph.erase_node(node)
        for source in sources:
            model.graph.erase_node(source)
    if calls:
        model.graph.lint()
        model.recompile()


def _is_read(node: Any, once: Collection[str]) -> bool:
    """A ``get_attr`` that only one node reads, of a parameter that has no other."""
    attribute = isinstance(node, fx.Node) and node.op == "get_attr"
    return attribute and len(node.users) == 1 and node.target in once


def _path(model: fx.GraphModule, called: Collection[Any], weight: str, bias: str | None) -> str:
    """Where the module for a call goes, whether or not other calls are lifted before it."""
    owner, _, name = weight.rpartition(".")
    if owner and name == "weight" and bias in (None, f"{owner}.bias"):
        held = {key for key, _ in model.get_submodule(owner).state_dict().items()}
        if owner not in called and held == {"weight"} | ({"bias"} if bias else set()):
            return owner
    path = f"{weight}_linear".replace(".", "_")
    while hasattr(model, path):
        path += "_"
    return path


def _linear(weight: nn.Parameter, bias: nn.Parameter | None = None) -> nn.Linear:
    m, n = weight.shape
    linear = nn.Linear(n, m, bias=bias is not None, device="meta")
    linear.weight = weight
    if bias is not None:
        linear.bias = bias
    return linear


def _delete(model: nn.Module, path: str) -> None:
    owner, _, name = path.rpartition(".")
    delattr(model.get_submodule(owner), name)
