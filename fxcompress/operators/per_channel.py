"""Tensors with one entry a channel: of a batch norm, of a scale, of a bias by itself.

A value that goes through them with fewer channels needs these entries only.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

SIZES = ("num_features", "num_parameters")
"""Fields of modules that say how many entries they have."""


@dataclass(frozen=True)
class PerChannel:
    """What a module, or a parameter by itself, has for every channel.

    Attributes:
        name: of the module or of the parameter.
        parameters: entries of parameters.
        bytes: of parameters and buffers.
    """

    name: str
    parameters: int
    bytes: int


def per_channel(model: nn.Module, name: str, channels: int) -> PerChannel | str:
    """What has one entry a channel, or why it has not.

    Args:
        model: has it.
        name: of a module, whose own tensors are meant, or of a parameter.
        channels: n.
    """
    parameters = size = 0
    try:
        held = [*_tensors(model, name)]
    except AttributeError:
        return f"{name} is no parameter"
    for place, key, tensor in held:
        if tensor.numel() == 1 and name != key:
            continue
        if tensor.numel() != channels or channels not in tensor.shape:
            return f"its {key} of shape {tuple(tensor.shape)} has not one entry a channel"
        parameters += place == "_parameters"
        size += tensor.element_size()
    return PerChannel(name, parameters, size)


@torch.no_grad()
def keep_channels(model: nn.Module, name: str, kept: Tensor, channels: int) -> None:
    """Leave the entries of some channels; parameters are replaced, not written.

    Args:
        model: changed.
        name: as of :func:`per_channel`.
        kept: the channels (k), int64; on the meta device, any k of them.
        channels: n.
    """
    holder = model.get_submodule(name) if _is_module(model, name) else None
    owner: Any = model.get_submodule(name.rpartition(".")[0]) if holder is None else holder
    for place, key, tensor in [*_tensors(model, name)]:
        if tensor.numel() != channels:
            continue
        axis = tuple(tensor.shape).index(channels)
        if kept.is_meta or tensor.is_meta:
            small = tensor.narrow(axis, 0, len(kept)).clone()
        else:
            small = tensor.index_select(axis, kept.to(tensor.device))
        if place == "_parameters":
            small = nn.Parameter(small, tensor.requires_grad)
        getattr(owner, place)[key.rpartition(".")[2]] = small
    for field in SIZES:
        if holder is not None and holder.__dict__.get(field) == channels:
            holder.__dict__[field] = len(kept)


def _is_module(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _tensors(model: nn.Module, name: str) -> Iterator[tuple[str, str, Tensor]]:
    """Where each tensor is kept, its name within the module (a parameter's full one), itself.

    Raises:
        AttributeError: there is neither a module nor a parameter of that name.
    """
    if not _is_module(model, name):
        yield "_parameters", name, model.get_parameter(name)
        return
    module = model.get_submodule(name)
    for place in ("_parameters", "_buffers"):
        for key, tensor in getattr(module, place).items():
            if tensor is not None:
                yield place, key, tensor
