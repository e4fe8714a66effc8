"""The canonical vocabulary: one name per operator, attributes normalized by name.

Rules are written against these names, never against raw fx targets.  A linear map is
``linear`` whether it was written as ``nn.Linear``, as Hugging Face's ``Conv1D`` (which stores
its weight transposed), as ``F.linear`` or as a matrix product with a parameter.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fxcompress.graph.attributes import plain_attributes
from fxcompress.graph.functional import dtype_name, functional_attributes
from fxcompress.graph.names import (
    MODULES,
    function_name,
    function_operator,
    gelu_approximation,
    is_reflected,
    module_operator,
)
from fxcompress.operators.modules import is_hf_conv1d

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


Parameter = Callable[[Tensor], int | None]
"""Key of the parameter that a tensor is, or is a view of; None for any other tensor."""

# Functions that multiply by a matrix (rows are features), and where it stands.
_MATRIX = {"matmul": 1, "__matmul__": 1, "mm": 1, "addmm": 2}
# Functions that apply a parameter, if they are given one, in a way of their own.
_PRODUCTS = {
    *_MATRIX,
    *("linear", "bilinear", "einsum", "tensordot", "bmm", "baddbmm", "__rmatmul__", "embedding"),
    *("conv1d", "conv2d", "conv3d", "grouped_mm", "_grouped_mm", "multi_head_attention_forward"),
    *("conv_transpose1d", "conv_transpose2d", "conv_transpose3d"),
}


def is_leaf(module: nn.Module) -> bool:
    """Whether a module becomes one node.

    Operators of the vocabulary do, and modules that nothing is seen of: childless and scripted
    ones.
    """
    return (
        isinstance(module, (nn.Linear, *_CONVOLUTIONS, torch.jit.ScriptModule))
        or is_hf_conv1d(module)
        or next(module.children(), None) is None
    )


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
    ``parameter`` has for it.
    """
    if module is not None:
        return _module(module, tuple(args), kwargs or {})
    return _function(function, tuple(args), kwargs or {}, parameter)


def _module(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    if isinstance(module, torch.jit.ScriptModule):
        return {"op": "script_module", "attributes": {}}
    weight = getattr(module, "weight", None)
    dtype = {"dtype": dtype_name(weight)} if isinstance(weight, Tensor) else {}
    if isinstance(module, nn.Linear):
        return _linear(module.in_features, module.out_features, module.bias is not None, dtype)
    if is_hf_conv1d(module):
        return _linear(int(module.nx), int(module.nf), True, dtype)  # type: ignore[arg-type]
    if isinstance(module, nn.modules.conv._ConvNd):
        attributes = {
            "in_channels": module.in_channels,
            "out_channels": module.out_channels,
            "kernel_size": tuple(module.kernel_size),
            "stride": tuple(module.stride),
            "padding": module.padding if isinstance(module.padding, str) else tuple(module.padding),
            "dilation": tuple(module.dilation),
            "groups": module.groups,
            "bias": module.bias is not None,
            "padding_mode": module.padding_mode,
            **dtype,
        }
        if module.transposed and (len(args) > 1 or kwargs.get("output_size") is not None):
            attributes["output_size"] = True
        op = next(
            name
            for cls in type(module).__mro__
            if (name := MODULES.get(cls.__name__, "")).startswith("conv")
        )
        return {"op": op, "attributes": attributes}
    if isinstance(module, nn.Embedding):
        attributes = {
            "num_embeddings": module.num_embeddings,
            "embedding_dim": module.embedding_dim,
            **dtype,
        }
        return {"op": "embedding", "attributes": attributes}
    name = type(module).__name__
    op = module_operator(name)
    plain = plain_attributes(op, module, args, kwargs)
    if approximate := gelu_approximation(name):
        plain["approximate"] = approximate
    return {"op": op, "attributes": plain}


def _linear(n: int, m: int, bias: bool, dtype: dict[str, str]) -> dict[str, Any]:
    attributes = {"in_features": n, "out_features": m, "bias": bias, **dtype}
    return {"op": "linear", "attributes": attributes}


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
    found["attributes"].update(functional_attributes(op, args, kwargs))
    tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
    keys = {id(t): key for t in tensors if t.dim() > 1 and (key := parameter(t)) is not None}
    if all(parameter(tensor) is not None for tensor in tensors):
        keys = {}  # a product of parameters applies none of them to data
    matrix, bias, transposed = _matrix(name, args, kwargs)
    if id(matrix) in keys or (op == "linear" and matrix.dim() == 2):
        m, n = matrix.shape if transposed else matrix.shape[::-1]
        found = _linear(n, m, bias is not None, {"dtype": dtype_name(matrix)})
    if not keys:
        return found
    return {**found, "weight": keys.get(id(matrix), next(iter(keys.values())))}


def _matrix(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, bool]:
    """What a function multiplies rows by, the bias it adds, and whether the matrix is (m x n)."""
    if name == "linear":
        _, weight, bias = linear_arguments(args, kwargs)
        return weight, bias, True
    place = _MATRIX.get(name, len(args))
    matrix = args[place] if place < len(args) else None
    if not isinstance(matrix, Tensor) or matrix.dim() != 2:
        return None, None, False
    return matrix, args[0] if name == "addmm" else None, False


def linear_arguments(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any, Any]:
    """Input, weight and bias (or None) of a call of ``F.linear``, however they were passed.

    >>> linear_arguments(("x",), {"bias": "b", "weight": "w"})
    ('x', 'w', 'b')
    """
    bound = _LINEAR_SIGNATURE.bind(*args, **kwargs)
    bound.apply_defaults()
    return bound.args


def _linear_signature(input: Any, weight: Any, bias: Any = None) -> None: ...


_LINEAR_SIGNATURE = inspect.signature(_linear_signature)
