"""Copies of a model that share its parameters: cheap to make, safe to rewrite."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage, fx, nn

from fxcompress.rewrite.attention import expand_attention
from fxcompress.rewrite.fast_paths import disable_fast_paths
from fxcompress.rewrite.lift import lift

M = TypeVar("M", bound=nn.Module)


def skeleton(model: M) -> M:
    """A deep copy that shares the parameters (not the buffers: a forward may write those).

    Parameters that were made in inference mode are copied: nothing can be computed from them
    that has gradients.
    """
    own: dict[int, UntypedStorage] = {}
    memo: dict[int, Any] = {
        id(parameter): _ordinary(parameter, own) if parameter.is_inference() else parameter
        for parameter in model.parameters()
    }
    return copy.deepcopy(model, {**memo, **_computed(model)})


def _ordinary(parameter: nn.Parameter, own: dict[int, UntypedStorage]) -> nn.Parameter:
    """A copy that is no inference tensor; parameters that share memory still do."""
    memory = parameter.untyped_storage()
    with torch.inference_mode(False):
        copied = own.setdefault(memory.data_ptr(), memory.clone())
        fresh = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        fresh.set_(copied, parameter.storage_offset(), parameter.shape, parameter.stride())
        return nn.Parameter(fresh, requires_grad=parameter.requires_grad)


def _computed(model: nn.Module) -> dict[int, Tensor]:
    """Tensors that a graph of autograd hangs on (as weight_norm keeps) cannot be copied."""
    held = (value for module in model.modules() for value in vars(module).values())
    return {id(v): v.detach().clone() for v in held if isinstance(v, Tensor) and not v.is_leaf}


def prepared(model: nn.Module) -> nn.Module:
    """A skeleton in which every operator that can be a module is one."""
    work = skeleton(model)
    expand_attention(work)
    disable_fast_paths(work)  # they hide operators, and cannot read an expanded attention
    if isinstance(work, fx.GraphModule):
        lift(work)
    return work


def own_parameters(rewritten: M, original: nn.Module) -> M:
    """A copy of a rewritten skeleton whose parameters are all its own; ties stay tied.

    A copy, since parameters are not only kept in ``_parameters``: ``nn.LSTM`` computes with a
    list of its own, and so may any other module.  What ``original`` does not share is moved.
    """
    shared = {id(parameter) for parameter in original.parameters()}
    memo: dict[int, Any] = {id(p): p for p in rewritten.parameters() if id(p) not in shared}
    return copy.deepcopy(rewritten, {**memo, **_computed(rewritten)})
