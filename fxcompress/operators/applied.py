"""What stands in the place of a weight that a ``forward`` applies by a function.

before::

    self.weight = nn.Parameter(...)             # m x n
    y = x @ self.weight.T + self.bias           # in the forward of the module that has it

after::

    self.weight = Applied(product)              # product: nn.Linear, or what was made of it
    y = x @ self.weight.T + self.bias           # runs product(x)

torch hands every function that is given such an object to it.  A product that the object was made
for runs the operator; anything else computes with the dense weight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from types import GetSetDescriptorType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxcompress.operators.calls import Application, function_name
from fxcompress.operators.modules import application
from fxcompress.operators.shape import Shape

PRODUCT = "product"
"""The name of the operator in the object."""


class _Weight:
    """What answers as a tensor would: an object for a weight, or the transpose of one."""

    stands_for: Any
    transposed: bool

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return run(function, args, kwargs or {})

    @property
    def shape(self) -> torch.Size:
        size = self.stands_for.size
        return torch.Size(size[::-1] if self.transposed else size)

    @property
    def ndim(self) -> int:
        return len(self.stands_for.size)

    @property
    def dtype(self) -> torch.dtype:
        return self._some.dtype

    @property
    def device(self) -> torch.device:
        return self._some.device

    @property
    def _some(self) -> nn.Parameter:
        found: nn.Parameter = next(self.stands_for.product.parameters())
        return found

    @property
    def T(self) -> Any:
        return _transpose(self) if self.ndim == 2 else self.dense().permute(*range(self.ndim)[::-1])

    @property
    def mT(self) -> Any:
        return self.T if self.ndim == 2 else self.dense().mT

    def dense(self) -> Tensor:
        """The dense weight, as the object has it."""
        weight: Tensor = self.stands_for.product.weight
        return weight.T if self.transposed else weight

    def __len__(self) -> int:
        return self.shape[0]


class StandIn(_Weight, nn.Module):
    """A module in the place of a parameter."""

    @property
    def stands_for(self) -> Any:
        return self

    @property
    def transposed(self) -> bool:  # type: ignore[override]
        return False

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name in self._modules or not hasattr(Tensor, name):
            return super().__getattr__(name)
        return _attribute(self, name)

    def to(self, *args: Any, **kwargs: Any) -> Any:
        """``Tensor.to``: what a module has under this name would change the model."""
        return run(Tensor.to, (self, *args), kwargs)

    def type(self, *args: Any, **kwargs: Any) -> Any:
        """``Tensor.type``: the type of the weight, or the weight in another one."""
        return run(Tensor.type, (self, *args), kwargs)

    def answer(self, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What a function makes of it in a way of its own; None for no such way.

        Args:
            name: of the function.
            args, kwargs: what it is called with, the object among them.
        """
        return None


class Applied(StandIn):
    """A weight that a forward applies by a function, and the operator that runs instead.

    Attributes:
        product: the operator.
        applies: its shape; calls that would apply it in another way compute with the dense weight.
        size: of the weight, as it is stored.
    """

    product: nn.Module

    def __init__(self, product: nn.Module, applies: Shape, size: tuple[int, ...]) -> None:
        super().__init__()
        self.product = product
        self.applies = applies
        self.size = size
        self.train(product.training)


class _Transpose(_Weight):
    """The transpose of a weight (not a module: it is gone after the product)."""

    transposed = True

    def __init__(self, stands_for: Applied) -> None:
        self.stands_for = stands_for

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or not hasattr(Tensor, name):
            raise AttributeError(name)
        return _attribute(self, name)


def _attribute(weight: Any, name: str) -> Any:
    found = getattr(Tensor, name)
    if isinstance(found, GetSetDescriptorType | property):
        return getattr(weight.dense(), name)
    return partial(_method, found, weight)


def _method(function: Any, weight: Any, *args: Any, **kwargs: Any) -> Any:
    return run(function, (weight, *args), kwargs)


def _operation(name: str) -> Callable[..., Any]:
    def operation(self: Any, *args: Any) -> Any:
        return run(getattr(Tensor, name), (self, *args), {})

    return operation


for _name in (
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "pow", "matmul"),
    *("neg", "getitem", "lt", "le", "gt", "ge"),
):
    setattr(_Weight, f"__{_name}__", _operation(f"__{_name}__"))
for _name in ("float", "double", "half", "bfloat16", "cpu", "cuda", "requires_grad_"):
    setattr(StandIn, _name, _operation(_name))


def run(function: Any, args: Any, kwargs: Any) -> Any:
    """Call a torch function that is given objects for weights.

    Args:
        function: of torch.
        args, kwargs: what it is called with.
    """
    name = function_name(function)
    first = args[0] if args else None
    if isinstance(first, _Weight):
        swaps = transposes(name, first, args[1:], kwargs)
        if swaps is not None:
            return _transpose(first) if swaps else first
    for each in args:
        if isinstance(each, StandIn) and (own := each.answer(name, args, kwargs)) is not None:
            return own
    found = application(name, args, kwargs, is_applied)
    if found is not None and isinstance(found.weight, _Weight):
        weight: Any = found.weight
        if _fits(found, weight):
            out: Tensor = weight.stands_for.product(found.before(found.data))
            return found.after(out)
    args, kwargs = tree_map(_dense, (args, kwargs))
    return function(*args, **kwargs)


def displayed(model: nn.Module, path: str) -> str:
    """What the operator at a path is called: by the module that applies its weight, if one does.

    ``conv.weight.product`` is ``conv``; of a parameter of another name, ``attn.w_q.product`` is
    ``attn.w_q``.
    """
    holder, _, last = path.rpartition(".")
    if last != PRODUCT or not isinstance(model.get_submodule(holder), Applied):
        return path
    owner, _, name = holder.rpartition(".")
    return owner if name == "weight" and owner else holder


def operator_path(model: nn.Module, name: str) -> str:
    """The inverse of :func:`displayed`: where an operator is that is called ``name``.

    Raises:
        AttributeError: there is no such module.
    """
    module = model.get_submodule(name)
    if isinstance(module, Applied):
        return f"{name}.{PRODUCT}"
    held = isinstance(module._modules.get("weight"), Applied)
    return f"{name}.weight.{PRODUCT}" if held else name


def operator_at(model: nn.Module, name: str) -> nn.Module:
    """The module that computes an operator, by what the operator is called.

    Raises:
        AttributeError: there is none.
    """
    return model.get_submodule(operator_path(model, name))


def hold(model: nn.Module, weight: str, shape: Shape) -> None:
    """Put an object in the place of a parameter; changes ``model``.

    Args:
        model: has the parameter.
        weight: its name.
        shape: of the operator that functions make of it.

    Raises:
        ValueError: it is no parameter, or none of such an operator.
        AttributeError: the module that owns it is not there.
    """
    path, _, name = weight.rpartition(".")
    owner = model.get_submodule(path)
    if isinstance(owner._modules.get(name), Applied):
        return
    parameter = owner._parameters.get(name)
    if parameter is None or tuple(parameter.shape) != shape.stored_size:
        raise ValueError(f"it has no parameter {weight} of {shape}")
    bare = replace(shape, dtype=parameter.dtype, device=parameter.device)
    product = bare.applying(parameter).train(owner.training)
    del owner._parameters[name]
    owner._modules[name] = Applied(product, bare, tuple(parameter.shape))


def release(model: nn.Module, weight: str) -> None:
    """Undo :func:`hold`; the operator must not have been rewritten."""
    path, _, name = weight.rpartition(".")
    owner: Any = model.get_submodule(path)
    applied = owner._modules.pop(name)
    owner._parameters[name] = applied.product.weight


def is_applied(value: Any) -> bool:
    """Whether a value stands for a weight."""
    return isinstance(value, _Weight)


def any_applied(*values: Any) -> bool:
    """Whether there is an object for a weight among the arguments of a function."""
    return any(isinstance(leaf, _Weight) for leaf in tree_leaves(values))


def _dense(value: Any) -> Any:
    return value.dense() if isinstance(value, _Weight) else value


def _fits(found: Application, weight: Any) -> bool:
    """Whether a call applies a weight as the operator in its place does."""
    applied = weight.stands_for
    if not isinstance(applied, Applied):
        return False
    shape = found.shape.mirrored() if weight.transposed else found.shape
    return shape is not None and shape.same_product(applied.applies)


def transposes(name: str, weight: Any, args: Sequence[Any], kwargs: Any) -> bool | None:
    """Whether a function makes the transpose of a weight, or the weight itself; None for neither.

    Args:
        name: of the function, or of an attribute.
        weight: or what stands for it, with ``ndim`` and ``dtype``.
        args, kwargs: what else the function is given.
    """
    if weight.ndim != 2 or kwargs:
        return None
    if name in ("detach", "contiguous") or (name == "to" and tuple(args) == (weight.dtype,)):
        return False
    if name in ("t", "T", "mT", "numpy_T"):
        return True
    dims = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    if name not in ("transpose", "swapaxes", "permute") or [*map(type, dims)] != [int, int]:
        return None
    swapped = dims[0] % 2 != dims[1] % 2
    return swapped if name != "permute" else bool(swapped and dims[0] % 2) or None


def _transpose(weight: _Weight) -> _Weight:
    return weight.stands_for if weight.transposed else _Transpose(weight.stands_for)
