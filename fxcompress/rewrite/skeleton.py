"""Copies of a model that share its parameters: cheap to make, safe to rewrite."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import Tensor, UntypedStorage, fx, nn

from fxcompress.graph.versions import storage
from fxcompress.mapped import mapped_copies
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
    return copied(model, memo)


def copied(model: M, memo: dict[int, Any]) -> M:
    """A deep copy, also of what torch cannot copy by itself.

    Args:
        model: any module.
        memo: what stands for something in the copy, by identity.
    """
    # With gradients on, TorchScript copies parameters as operations on them.
    with torch.no_grad():
        made = copy.deepcopy(model, {**memo, **_uncopyable(model)})
    for old, new in zip(model.modules(), made.modules(), strict=False):
        if isinstance(old, torch.jit.ScriptModule):
            for source, parameter in zip(old.parameters(), new.parameters(), strict=True):
                parameter.requires_grad_(source.requires_grad)
    return made


def _ordinary(parameter: nn.Parameter, own: dict[int, UntypedStorage]) -> nn.Parameter:
    """A copy that is no inference tensor; parameters that share memory still do."""
    memory = parameter.untyped_storage()
    with torch.inference_mode(False):
        if memory.data_ptr() not in own:
            own[memory.data_ptr()] = memory.clone()  # type: ignore[no-untyped-call]
        copied = own[memory.data_ptr()]
        fresh = torch.empty(0, dtype=parameter.dtype, device=parameter.device)
        fresh.set_(copied, parameter.storage_offset(), parameter.shape, parameter.stride())
        return nn.Parameter(fresh, requires_grad=parameter.requires_grad)


_COMPRESSED = {torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc}


def _uncopyable(model: nn.Module) -> dict[int, Tensor]:
    """Copies of tensors that ``deepcopy`` has no way to copy.

    Those that a graph of autograd hangs on (as weight_norm keeps), and compressed sparse ones.
    """
    held = (
        value
        for module in model.modules()
        for value in (*vars(module).values(), *module._buffers.values())
    )
    return {
        id(value): value.detach().clone()
        for value in held
        if isinstance(value, Tensor) and (not value.is_leaf or value.layout in _COMPRESSED)
    }


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
    list of its own, and so may any other module.  What ``original`` does not share is moved, and
    what is mapped from a file is mapped once more.
    """
    # By memory: a matrix of a stack is a parameter of its own, in the memory of the original's.
    shared = {_place(parameter) for parameter in original.parameters()}
    memo: dict[int, Any] = {id(p): p for p in rewritten.parameters() if _place(p) not in shared}
    kept = {id(p): p for p in rewritten.parameters() if _place(p) in shared}
    mapped = mapped_copies(kept.values())
    memo |= {key: nn.Parameter(mapped[key], kept[key].requires_grad) for key in mapped}
    return copied(rewritten, memo)


def _place(parameter: Tensor) -> int:
    """Tells whose memory a parameter has; that on the meta device has none."""
    return storage(parameter) or id(parameter)
