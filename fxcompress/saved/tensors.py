"""The state of a model as the plain tensors that files hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from fxcompress.errors import SaveError


def storable(model: nn.Module) -> dict[str, Tensor]:
    """The state of a model as plain tensors where they are, tied ones once.

    Raises:
        SaveError: something in the state is no tensor, or a kind of tensor that a safetensors file
            cannot hold.
    """
    state: Mapping[str, Any] = model.state_dict()
    tensors: dict[str, Tensor] = {}
    seen: set[tuple[Any, ...]] = set()
    for name, value in state.items():
        if problem := _problem(value):
            raise SaveError(f"{_owner(model, name)} cannot be saved: {name} {problem}")
        tensor: Tensor = value.detach().as_subclass(Tensor).resolve_conj().resolve_neg()
        place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
        if tensor.numel() and place in seen:
            continue  # a tied weight
        seen.add(place)
        tensors[name] = tensor
    return tensors


def stored(tensor: Tensor) -> Tensor:
    """A tensor as a file holds it: on the processor, row by row, in memory of its own."""
    own = tensor.cpu().contiguous()
    # What shares memory with another tensor without being the same is stored by itself.
    return own.clone() if _partly(own) else own


def _partly(tensor: Tensor) -> bool:
    """Whether a tensor is a part of a larger piece of memory."""
    return tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size()


def _problem(value: Any) -> str:
    """Why a value of a state dict cannot be stored; empty if it can."""
    if not isinstance(value, Tensor):
        return (
            f"is a {type(value).__name__}, not a tensor (extra state of get_extra_state, or packed "
            "weights of a quantized layer): keep it in buffers, or quantize after loading"
        )
    if is_traceable_wrapper_subclass(value):
        return (
            f"is a {type(value).__name__}, which a file of plain tensors cannot hold: turn it into "
            "one first (dequantize it, or gather what is sharded)"
        )
    if value.is_meta:
        return "is on the meta device, without values: load it into memory first"
    if value.layout != torch.strided or value.is_quantized or value.is_nested:
        return "is a sparse, nested or quantized tensor: make it a dense one (to_dense, dequantize)"
    if value.dtype not in _TYPES:
        return f"has the type {value.dtype}, which safetensors does not store"
    return ""


_TYPES = frozenset(
    getattr(torch, name)
    for name in (
        "float64", "float32", "float16", "bfloat16", "complex64", "bool",
        "int64", "int32", "int16", "int8", "uint64", "uint32", "uint16", "uint8",
        "float8_e4m3fn", "float8_e5m2",
    )
)  # fmt: skip


def _owner(model: nn.Module, name: str) -> str:
    """The module that an entry of the state dict belongs to, in words."""
    path = name.rpartition(".")[0]
    while path:
        try:
            return f"{path} ({type(model.get_submodule(path)).__name__})"
        except AttributeError:
            path = path.rpartition(".")[0]
    return f"this {type(model).__name__}"
