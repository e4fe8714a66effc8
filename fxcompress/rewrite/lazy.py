"""A dense weight that is computed: only if its values are wanted, and only to be read.

Models ask their layers' weights for a type or a device (T5 does so in every forward).  Such a
question must not cost the product of the factors.

Nor may a write to the product vanish, which nobody would see until the model is used (adapters
that are merged, ``weight.data += delta``; initializations; pruning).  So every write raises: to
the weight, and to all that shares its memory (``.data``, slices, transposes).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxcompress.graph.versions import storage, writes_in_place

_PROPERTIES = ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_meta", "requires_grad")
_METADATA = {
    *(getattr(Tensor, name).__get__ for name in _PROPERTIES),
    *(Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.element_size),
}

_HOOKS = {"register_hook", "register_post_accumulate_grad_hook", "retain_grad"}
"""What leaves something on a tensor that is gone with it."""


class _ReadOnly(Tensor):
    """A tensor that is not to be written to."""

    def set_(self, *args: Any, **kwargs: Any) -> Any:
        # Of the methods that write, torch lets only this one by.
        raise _refusal("set_")


class Computed(_ReadOnly):
    """A tensor that was computed from parameters, as are all views of it: for reading only.

    What is computed from it is an ordinary tensor, and so is ``nn.Parameter`` of it.
    """

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _read(function, args, kwargs or {})

    @property
    def _is_param(self) -> bool:
        return False

    @_is_param.setter
    def _is_param(self, value: bool) -> None:
        # nn.Parameter(weight.data) makes a parameter of a tensor's own class, which it marks.
        self.__class__ = nn.Parameter  # type: ignore[assignment]


class LazyWeight(_ReadOnly):
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
        return _read(function, args, kwargs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        # Only reached where torch functions are switched off, as in the inside of a module.
        args, kwargs = tree_map(_values, (args, kwargs or {}))
        schema = getattr(function, "_schema", None)
        if schema is not None and schema.is_mutable:
            raise _refusal(schema.name)
        return function(*args, **kwargs)


def lazy(shape: tuple[int, ...], like: Tensor, compute: Callable[[], Tensor]) -> Tensor:
    """``compute()``, put off until it is needed; at once where torch is compiling."""
    if torch.compiler.is_compiling():
        return compute()
    weight: Tensor = LazyWeight(shape, like, compute)
    return weight


def read_only(value: Tensor) -> Tensor:
    """A tensor that was computed, guarded against writes; a parameter stays what it is."""
    if isinstance(value, (nn.Parameter, Computed)) or torch.compiler.is_compiling():
        return value
    return value.as_subclass(Computed)


def _read(function: Any, args: Any, kwargs: Any) -> Any:
    """Call a torch function on the values of computed tensors.

    Raises:
        RuntimeError: it writes to one of them, or would leave something on it that is lost.
    """
    name = getattr(function, "__name__", "")
    owner = getattr(getattr(function, "__self__", None), "__name__", "")
    if _is_computed(args[0] if args else None):
        if name == "__set__":
            _set(owner, args)
            return None
        if name in _HOOKS or owner == "grad":
            return _of_itself(function, name, args, kwargs)
        if name == "requires_grad_":
            return _requires_grad(*args, **kwargs)
        if writes_in_place(name):
            raise _refusal(name)
    guarded = [leaf for leaf in tree_leaves((args, kwargs)) if _is_computed(leaf)]
    values = {id(leaf): _values(leaf) for leaf in guarded}
    versions = [value._version for value in values.values() if not value.is_inference()]
    args, kwargs = tree_map(lambda leaf: values.get(id(leaf), leaf), (args, kwargs))
    out = function(*args, **kwargs)
    if versions != [value._version for value in values.values() if not value.is_inference()]:
        raise _refusal(name)
    return tree_map(_Views(values.values()), out)


class _Views:
    """Guards what shares memory with some tensors."""

    def __init__(self, values: Any) -> None:
        self.memory = {storage(value) for value in values} - {0}

    def __call__(self, leaf: Any) -> Any:
        if isinstance(leaf, Tensor) and storage(leaf) in self.memory:
            return read_only(leaf)
        if isinstance(leaf, np.ndarray):
            leaf.flags.writeable = False
        return leaf


def _of_itself(function: Any, name: str, args: Any, kwargs: Any) -> Any:
    """What concerns a tensor object, and not its values: of use for ``.detach()`` only."""
    with torch._C.DisableTorchFunctionSubclass():
        if isinstance(args[0], Computed) and args[0].is_leaf:
            return function(*args, **kwargs)
    if name in _HOOKS:
        raise _refusal(name)
    return None  # no gradient


def _set(attribute: str, args: Any) -> None:
    """Set an attribute, if that changes nothing."""
    tensor, value = args
    if attribute == "requires_grad":
        _requires_grad(tensor, value)
    elif attribute != "grad" or value is not None:
        raise _refusal(f"{attribute} = ...")


def _requires_grad(tensor: Tensor, requires_grad: bool = True) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        if tensor.requires_grad == requires_grad:
            return tensor
        if isinstance(tensor, LazyWeight) or not tensor.is_leaf:
            raise _refusal(f"requires_grad = {requires_grad}")
        return tensor.requires_grad_(requires_grad)  # of .detach(), which is a tensor by itself


def _is_computed(value: Any) -> bool:
    return isinstance(value, (LazyWeight, Computed))


def _values(value: Any) -> Any:
    if isinstance(value, LazyWeight):
        return value._compute()
    return value.as_subclass(Tensor) if isinstance(value, Computed) else value


def _refusal(what: str) -> RuntimeError:
    return RuntimeError(
        f"{what}: the weight or bias of a factorized layer is computed from its factors, so what "
        "is written to it would be lost. Change the parameters of .body; or work on a copy "
        "(.clone()); or put a dense layer in its place whose weight is layer.weight.clone() (to "
        "merge an adapter into it, say). To train or freeze the layer: layer.body.requires_grad_()"
    )
