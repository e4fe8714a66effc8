"""The canonical vocabulary: one name per operator, attributes normalized by name.

Rules are written against these names, never against raw fx targets.  A linear map is
``linear`` whether it was written as ``nn.Linear``, as Hugging Face's ``Conv1D`` (which stores
its weight transposed), as ``F.linear`` or as a matrix product with a parameter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxcompress.graph.attributes import plain_attributes
from fxcompress.graph.names import (
    function_operator,
    gelu_approximation,
    is_reflected,
    module_operator,
)
from fxcompress.operators.calls import function_name
from fxcompress.operators.modules import application, kind_of
from fxcompress.operators.words import OPERATORS

Parameter = Callable[[Tensor], int | None]
"""Key of the parameter that a tensor is, or is a view of; None for any other tensor."""

# Functions that apply a parameter, if they are given one, in a way of their own.
_PRODUCTS = {
    *OPERATORS,
    *("matmul", "__matmul__", "mm", "addmm", "bilinear", "einsum", "tensordot", "bmm", "baddbmm"),
    *("__rmatmul__", "grouped_mm", "_grouped_mm", "multi_head_attention_forward"),
}


def is_leaf(module: nn.Module) -> bool:
    """Whether a module becomes one node.

    Operators of the vocabulary do, and modules that nothing is seen of: scripted ones, those of
    torch, and any without children.  Not one whose own forward applies a matrix: what that makes
    of it is seen.
    """
    if isinstance(module, torch.jit.ScriptModule):
        return True
    kind = kind_of(module)
    if kind is not None:
        return kind.is_plain(module)
    if next(module.children(), None) is not None:
        return False
    torchs = type(module).__module__.startswith("torch.")
    return torchs or all(each is None or each.dim() < 2 for each in module._parameters.values())


def canonicalize(
    *,
    module: nn.Module | None = None,
    function: Any = None,
    args: Any = (),
    kwargs: Any = None,
    parameter: Parameter = lambda tensor: None,
) -> dict[str, Any]:
    """Canonical ``op`` and ``attributes`` of a leaf module or of a torch function call.

    For a function that applies a parameter to data, the entry ``weight`` holds the key that
    ``parameter`` has for it; if it does so as an operator with a weight, ``application`` tells how.
    """
    if module is not None:
        return _module(module, tuple(args), kwargs or {})
    return _function(function, tuple(args), kwargs or {}, parameter)


def _module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if isinstance(module, torch.jit.ScriptModule):
        return {"op": "script_module", "attributes": {}}
    weight = getattr(module, "weight", None)
    dtype = {"dtype": dtype_name(weight)} if isinstance(weight, Tensor) else {}
    kind = kind_of(module)
    if kind is not None:
        return {
            "op": kind.op(module),
            "attributes": {**kind.attributes(module, args, kwargs), **dtype},
        }
    name = type(module).__name__
    op = module_operator(name)
    plain = plain_attributes(op, module, args, kwargs)
    if approximate := gelu_approximation(name):
        plain["approximate"] = approximate
    return {"op": op, "attributes": plain}


def _function(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], parameter: Parameter
) -> dict[str, Any]:
    """A torch function; products with a parameter count as ``linear``."""
    name = function_name(function)
    op = function_operator(name, args, kwargs)
    operands = args[::-1] if is_reflected(name) else args
    found: dict[str, Any] = {"op": op, "attributes": plain_attributes(op, None, operands, kwargs)}
    if name not in _PRODUCTS:
        return found
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    keys = {id(t): key for t in tensors if t.dim() > 1 and (key := parameter(t)) is not None}
    if all(parameter(tensor) is not None for tensor in tensors):
        keys = {}  # a product of parameters applies none of them to data
    applied = application(name, args, kwargs, lambda value: id(value) in keys)
    if applied is not None:
        attributes = {**applied.shape.attributes, "dtype": dtype_name(applied.weight)}
        if "bias" in attributes:
            attributes["bias"] = applied.bias is not None
        found = {"op": applied.shape.op, "attributes": attributes}
    if not keys:
        return found
    own = None if applied is None else keys.get(id(applied.weight))
    if own is None:
        return {**found, "weight": next(iter(keys.values()))}
    return {**found, "weight": own, "application": applied}


def dtype_name(tensor: Tensor) -> str:
    """``"float32"`` for ``torch.float32``."""
    return str(tensor.dtype).removeprefix("torch.")
