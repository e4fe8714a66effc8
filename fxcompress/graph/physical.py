"""The plain tensors behind those that a model computes with: of ``torch.func``, or nested ones."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack

_functorch = torch._C._functorch


def base(tensor: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """The tensor that holds the values, and how to bring it in order.

    Returns:
        The innermost tensor, which is what autograd sees, and a function for any tensor of its
        layout (its gradient): batch dimensions of ``torch.func.vmap`` come first, and of a
        jagged nested tensor all rows come one after the other.
    """
    places: list[int] = []
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_batchedtensor(tensor):
            places.append(_functorch.maybe_get_bdim(tensor))
        tensor = _functorch.get_unwrapped(tensor)

    def ordered(value: Tensor) -> Tensor:
        # Each place counts the dimensions that the level below it leaves.
        for level, place in enumerate(reversed(places)):
            value = value.movedim(place + level, 0)
        return value.values() if value.is_nested else value

    return tensor, ordered


def physical(tensor: Tensor, extents: int | None = None) -> Tensor:
    """All values of a tensor as a plain one.

    Args:
        tensor: that a model computes with.
        extents: dimensions of a convolution, whose input has items and channels before them;
            batch dimensions are more items.  None for any other operator.
    """
    inner, ordered = base(tensor)
    return folded(ordered(inner), extents)


def folded(tensor: Tensor, extents: int | None) -> Tensor:
    """With one dimension of items before channels and extents, where there are more."""
    if extents is None or tensor.dim() <= extents + 2:
        return tensor
    return tensor.flatten(0, tensor.dim() - extents - 2)


def is_transformed(tensor: Tensor) -> bool:
    """Whether a tensor is inside a transform of ``torch.func``."""
    return bool(_functorch.is_functorch_wrapped_tensor(tensor))


def outside(tensor: Tensor) -> AbstractContextManager[object]:
    """No transform is at work inside, if one is on a tensor: what is summed there stays plain."""
    return temporarily_clear_interpreter_stack() if is_transformed(tensor) else nullcontext()


def is_differentiated(tensor: Tensor) -> bool:
    """Whether a transform takes a derivative through it (grad, vjp, jvp and the like)."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    return False
