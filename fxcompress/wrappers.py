"""Wrappers of models: what is inside is compressed, saved and loaded, never the wrapper.

``torch.compile``, ``DataParallel`` and ``DistributedDataParallel`` put a model inside of another
module whose names and class are not the model's.  Every entry of the package takes the model out
with :func:`unwrapped`; whoever wants the wrapper puts it around the result.
"""

from __future__ import annotations

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
    """Whether it is what ``torch.compile(module)`` returns."""
    # By name: to import the class takes seconds.
    kind = type(module)
    return (kind.__module__, kind.__name__) == ("torch._dynamo.eval_frame", "OptimizedModule")
