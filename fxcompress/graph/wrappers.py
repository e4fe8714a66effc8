"""Wrappers of models: what is inside is compressed, saved and loaded, never the wrapper.

``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put a model inside of another
module whose names and class are not the model's.  Every entry of the package takes the model out
with :func:`unwrapped`; whoever wants the wrapper puts it around the result.
"""

from __future__ import annotations

from functools import partial
from types import FunctionType, MethodType
from typing import Any, TypeVar, cast

from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel

M = TypeVar("M", bound=nn.Module)


def unwrapped(model: M) -> M:
    """The model inside of its wrappers; the model itself if there are none."""
    while True:
        inner = _inner(model)
        if inner is None:
            return model
        model = cast(M, inner)


def _inner(model: Any) -> nn.Module | None:
    if isinstance(model, (DataParallel, DistributedDataParallel)):
        return cast(nn.Module, model.module)
    return cast(nn.Module, model._orig_mod) if is_compiled(model) else None


def is_compiled(module: Any) -> bool:
    """Whether a module is what ``torch.compile(module)`` returns."""
    # By name: to import the class takes seconds.
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("torch._dynamo.eval_frame", "OptimizedModule")


def replaced_forward(model: nn.Module) -> str:
    """Why a copy of a model would not run by itself, and what to do; empty if it would.

    A function that was set as ``forward`` of an instance is the same function in a copy, and runs
    what it was made for: the layers of the original.
    """
    hooked = [name for name, module in model.named_modules() if hasattr(module, "_hf_hook")]
    if hooked:
        return (
            f"accelerate put hooks on {len(hooked)} of its modules ({hooked[0] or 'itself'}, ...): "
            "load it without device_map, or take them off (accelerate.hooks."
            "remove_hook_from_module(model, recurse=True))"
        )
    for name, module in model.named_modules():
        forward = vars(module).get("forward")
        # What torch.compile(module) returns makes its forward anew in a copy.
        own = isinstance(forward, FunctionType) and not is_compiled(module)
        if own and _holds_module(forward):
            place = f"model.{name}" if name else "model"
            return (
                f"the forward of {name or 'the model'} was replaced by a function around the "
                f"original one (torch.compile, autocast, ...): del {place}.forward, and set it on "
                "the result again"
            )
    return ""


def _holds_module(value: Any, depth: int = 8) -> bool:
    """Whether a function reaches a module that a copy of the function would share."""
    if isinstance(value, (nn.Module, MethodType)):
        return isinstance(value, nn.Module) or isinstance(value.__self__, nn.Module)
    if depth == 0:
        return False
    inner: list[Any] = []
    if isinstance(value, partial):
        inner = [value.func, *value.args, *value.keywords.values()]
    elif isinstance(value, FunctionType):
        inner = [cell.cell_contents for cell in value.__closure__ or () if _filled(cell)]
        inner += [*vars(value).values(), *(value.__defaults__ or ())]
    return any(_holds_module(each, depth - 1) for each in inner)


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False
