"""A dense weight that is computed only if its values are wanted.

Models ask their layers' weights for a type or a device (T5 does so in every forward).  Such a
question must not cost the product of the factors.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

_PROPERTIES = ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta", "requires_grad")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size),
}


class LazyWeight(Tensor):
    """Answers for shape, type and device itself; anything else goes to the computed tensor.

    It is a tensor, and differentiable: an operation on it is one on ``compute()``.
    """

    _compute: Callable[[], Tensor]

    @staticmethod
    def __new__(cls, shape: tuple[int, ...], like: Tensor, compute: Callable[[], Tensor]) -> Any:
        """A weight of ``shape`` with the type and device of ``like``."""
        made = Tensor._make_wrapper_subclass(
            cls, shape, dtype=like.dtype, device=like.device, requires_grad=like.requires_grad
        )
        made._compute = compute
        return made

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in _METADATA:
            return super().__torch_function__(function, types, args, kwargs)  # type: ignore[no-untyped-call]
        args, kwargs = tree_map(_computed, (args, kwargs))
        return function(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Only reached where torch functions are switched off, as in the inside of a module.
        args, kwargs = tree_map(_computed, (args, kwargs or {}))
        return function(*args, **kwargs)


def lazy(shape: tuple[int, ...], like: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, put off until it is needed; at once where torch is compiling."""
    if torch.compiler.is_compiling():
        return compute()
    weight: Tensor = LazyWeight(shape, like, compute)
    return weight


def _computed(value: Any) -> Any:
    return value._compute() if isinstance(value, LazyWeight) else value
