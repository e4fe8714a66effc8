"""The tensors in what a model hands around, and what is said of them."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxcompress.errors import RecordError


def shape_of(tensor: Tensor) -> tuple[int, ...] | None:
    """Sizes of a tensor; None for a nested one, whose rows have different ones.

    Raises:
        RecordError: a nested tensor of strided layout.
    """
    if not tensor.is_nested:
        return tuple(tensor.shape)
    if tensor.layout == torch.strided:
        raise RecordError(
            "the model computes with nested tensors of strided layout, which tell nothing of their "
            "shape: make them with layout=torch.jagged, or pad instead"
        )
    return None


def is_tensor(value: Any) -> bool:
    """Where a walk through a value ends: tensor subclasses may be containers, too."""
    return isinstance(value, Tensor)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors of a value: of containers that torch knows, and of dataclasses."""
    if isinstance(tree, Tensor):
        return [tree]
    found = []
    for leaf in tree_leaves(tree, is_leaf=is_tensor):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif is_dataclass(leaf) and not isinstance(leaf, type):
            found += tensors_in([getattr(leaf, each.name, None) for each in fields(leaf)])
    return found
