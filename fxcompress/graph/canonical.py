"""The canonical vocabulary: one name per operator, attributes normalized by name.

Rules are written against these names, never against raw fx targets.  A linear map is
``linear`` whether it was written as ``nn.Linear``, as Hugging Face's ``Conv1D`` (which stores
its weight transposed), as ``F.linear`` or as a matrix product with a parameter.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_CONVOLUTIONS: tuple[type[nn.Module], ...] = (
    *(nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)
_MODULE_NAMES = {
    "Conv1d": "conv1d",
    "Conv2d": "conv2d",
    "Conv3d": "conv3d",
    "ConvTranspose1d": "conv_transpose1d",
    "ConvTranspose2d": "conv_transpose2d",
    "ConvTranspose3d": "conv_transpose3d",
    "BatchNorm1d": "batch_norm",
    "BatchNorm2d": "batch_norm",
    "BatchNorm3d": "batch_norm",
    "LayerNorm": "layer_norm",
    "GroupNorm": "group_norm",
    "ReLU": "relu",
    "GELU": "gelu",
    "SiLU": "silu",
    "Embedding": "embedding",
    "LSTM": "lstm",
    "GRU": "gru",
}


def is_hf_conv1d(module: nn.Module) -> bool:
    """Hugging Face's ``Conv1D``: a linear layer with an (in, out) weight."""
    library = sys.modules.get("transformers.pytorch_utils")
    return library is not None and isinstance(module, library.Conv1D)


def is_leaf(module: nn.Module) -> bool:
    """Whether a module becomes one node: operators of the vocabulary, and childless modules."""
    return (
        isinstance(module, (nn.Linear, *_CONVOLUTIONS))
        or is_hf_conv1d(module)
        or next(module.children(), None) is None
    )


def canonicalize(
    *,
    module: nn.Module | None = None,
    function: Any = None,
    args: Any = (),
    kwargs: Any = None,
) -> dict[str, Any]:
    """Canonical ``op`` and ``attributes`` of a leaf module or of a torch function call.

    For a function that applies a weight, the entry ``weight`` holds the tensor.
    """
    if module is not None:
        return _module(module)
    return _function(function, args, kwargs or {})


def _module(module: nn.Module) -> dict[str, Any]:
    weight = getattr(module, "weight", None)
    dtype = {"dtype": _dtype(weight)} if isinstance(weight, Tensor) else {}
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
        op = next(
            name
            for cls in type(module).__mro__
            if (name := _MODULE_NAMES.get(cls.__name__, "")).startswith("conv")
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
    return {"op": _MODULE_NAMES.get(name, _snake(name)), "attributes": {}}


def _linear(n: int, m: int, bias: bool, dtype: dict[str, str]) -> dict[str, Any]:
    attributes = {"in_features": n, "out_features": m, "bias": bias, **dtype}
    return {"op": "linear", "attributes": attributes}


def _function(function: Any, args: Any, kwargs: Any) -> dict[str, Any]:
    """A torch function; products with a parameter count as ``linear``, decided by the caller."""
    name = getattr(function, "__name__", str(function)).split(".")[0]
    packet = getattr(function, "overloadpacket", None)
    if packet is not None:
        name = packet.__name__
    weight: Any = None
    bias = False
    if function is F.linear or name == "linear":
        weight = kwargs.get("weight", args[1] if len(args) > 1 else None)
        bias = kwargs.get("bias", args[2] if len(args) > 2 else None) is not None
        if isinstance(weight, Tensor):
            op = _linear(weight.shape[1], weight.shape[0], bias, {"dtype": _dtype(weight)})
            return {**op, "weight": weight}
    product = {"matmul": 1, "__matmul__": 1, "mm": 1, "addmm": 2}.get(name)
    if product is not None and len(args) > product:
        weight = args[product]
        if isinstance(weight, nn.Parameter) and weight.dim() == 2:
            op = _linear(
                weight.shape[0], weight.shape[1], name == "addmm", {"dtype": _dtype(weight)}
            )
            return {**op, "weight": weight}
    return {"op": _plain(name), "attributes": {}}


def _plain(name: str) -> str:
    """``__iadd__``, ``__radd__``, ``add_`` and ``add`` are all ``add``."""
    if name.startswith("__") and name.endswith("__"):
        name = name.strip("_")
        for prefix in ("i", "r"):
            if name.startswith(prefix) and hasattr(torch, name[1:]) and name[1:]:
                return name[1:]
        return name
    return name.strip("_") or name


def _snake(name: str) -> str:
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")
