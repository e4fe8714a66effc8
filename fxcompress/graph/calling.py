"""Have modules of a model called through something else for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn

_SLOT = "_compiled_call_impl"


@contextmanager
def called_through(modules: Iterable[nn.Module], call: Callable[..., Any]) -> Iterator[None]:
    """Have modules called through ``call(module, *args, **kwargs)``.

    ``nn.Module.__call__`` itself stays as it is, for it is one for the whole process: it runs what
    a module has in the slot that ``nn.Module.compile`` fills.  ``module._call_impl`` is the call
    as it was.
    """
    modules = [*modules]
    compiled = [vars(module).get(_SLOT) for module in modules]
    try:
        for module in modules:
            vars(module)[_SLOT] = partial(call, module)
        yield
    finally:
        for module, before in zip(modules, compiled, strict=True):
            vars(module).pop(_SLOT, None)
            if before is not None:
                vars(module)[_SLOT] = before
