"""Linear function calls of an ``fx.GraphModule``, as modules for the time of a rewrite.

before::

    w = get_attr[target=fc.weight]; b = get_attr[target=fc.bias]
    y = call_function[target=F.linear](x, w, b)        # or aten.linear, after torch.export

after::

    y = call_module[target=fc](x)                      # nn.Linear with the same parameters

so that everything downstream deals with modules only.  :func:`lower` undoes it for the
calls that were not rewritten.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_LINEAR = {F.linear, torch.ops.aten.linear.default}


@dataclass(frozen=True, eq=False)
class Lifted:
    """One lifted call: what :func:`lower` needs to undo it."""

    path: str
    target: Any
    weight: str
    bias: str | None
    previous: nn.Module | None


def lift(model: fx.GraphModule) -> list[Lifted]:
    """Turn calls of linear functions on parameters into modules; changes ``model``.

    Only parameters that no other node reads are lifted; state dict names do not change where
    the parameter is called ``weight`` (and the bias ``bias``) and has an owner of its own.
    """
    lifted = []
    for node in list(model.graph.nodes):
        if node.op != "call_function" or node.target not in _LINEAR:
            continue
        x, weight, *rest = (*node.args, *node.kwargs.values())
        bias = rest[0] if rest else None
        if not (_own_parameter(model, weight) and (bias is None or _own_parameter(model, bias))):
            continue
        owner, _, name = weight.target.rpartition(".")
        simple = name == "weight" and (bias is None or bias.target == f"{owner}.bias")
        path = owner if simple and owner else f"{weight.target}_linear".replace(".", "_")
        previous = model.get_submodule(path) if simple and owner else None
        if previous is not None and (
            any(True for _ in previous.children())
            or any(n.op == "call_module" and n.target == path for n in model.graph.nodes)
        ):
            continue
        module = nn.utils.skip_init(nn.Linear, 1, 1, bias=bias is not None, device="meta")
        module.weight = model.get_parameter(weight.target)
        module.out_features, module.in_features = module.weight.shape
        if bias is not None:
            module.bias = model.get_parameter(bias.target)
        lifted.append(
            Lifted(path, node.target, weight.target, bias and bias.target, previous)
        )
        model.add_submodule(path, module)
        with model.graph.inserting_before(node):
            call = model.graph.call_module(path, (x,))
        call.meta = dict(node.meta)
        node.replace_all_uses_with(call)
        model.graph.erase_node(node)
        for source in filter(None, (weight, bias)):
            model.graph.erase_node(source)
        if previous is None:
            for source in filter(None, (weight, bias)):
                _delete(model, source.target)
    if lifted:
        model.recompile()
    return lifted


def lower(model: fx.GraphModule, lifted: list[Lifted]) -> None:
    """Undo :func:`lift` for every call whose module is still the lifted ``nn.Linear``."""
    for entry in lifted:
        module = model.get_submodule(entry.path)
        if type(module) is not nn.Linear:
            continue
        if entry.previous is None:
            _delete(model, entry.path)
            _set(model, entry.weight, module.weight)
            if entry.bias:
                _set(model, entry.bias, module.bias)
        else:
            model.set_submodule(entry.path, entry.previous)
        for node in list(model.graph.nodes):
            if node.op == "call_module" and node.target == entry.path:
                with model.graph.inserting_before(node):
                    args = [node.args[0], model.graph.get_attr(entry.weight)]
                    if entry.bias:
                        args.append(model.graph.get_attr(entry.bias))
                    call = model.graph.call_function(entry.target, tuple(args))
                call.meta = dict(node.meta)
                node.replace_all_uses_with(call)
                model.graph.erase_node(node)
    if lifted:
        model.graph.lint()
        model.recompile()


def _own_parameter(model: fx.GraphModule, node: Any) -> bool:
    """A ``get_attr`` of a parameter that only one node reads."""
    if not (isinstance(node, fx.Node) and node.op == "get_attr" and len(node.users) == 1):
        return False
    reads = [n for n in model.graph.nodes if n.op == "get_attr" and n.target == node.target]
    parameters = dict(model.named_parameters(remove_duplicate=False))
    return len(reads) == 1 and node.target in parameters


def _delete(model: nn.Module, path: str) -> None:
    owner, _, name = path.rpartition(".")
    delattr(model.get_submodule(owner), name)


def _set(model: nn.Module, path: str, value: nn.Parameter) -> None:
    owner, _, name = path.rpartition(".")
    setattr(model.get_submodule(owner), name, value)
