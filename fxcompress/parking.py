"""Tensors that wait in a file until they are needed, so that memory is free for others.

A tensor that is parked is another one with the same values, mapped from a temporary file: the
system reads what is touched, and may forget it again.  The file has no name any more, so nothing
is left of it whatever ends the process.
"""

from __future__ import annotations

import copy
import ctypes
import dataclasses
import mmap
import shutil
import tempfile
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from fxcompress.errors import MemoryLimitError

T = TypeVar("T")

SMALL = 1 << 16
"""Bytes up to which a tensor stays where it is."""


def _trim() -> None:
    """Have glibc give back what was freed, which it keeps in pieces; elsewhere nothing."""
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


class Parking:
    """A place for tensors that nobody needs for now.

    Args:
        model: whose parameters stay where they are, and what shares memory with them.
        directory: where files are made; the system's for temporary ones if it is None.
    """

    def __init__(self, model: nn.Module | None = None, directory: str | None = None) -> None:
        self.directory = directory or tempfile.gettempdir()
        self._fixed = {_memory(each) for each in ([] if model is None else model.parameters())}
        self._maps: weakref.WeakSet[mmap.mmap] = weakref.WeakSet()
        self._parked: Any = WeakTensorKeyDictionary()

    @property
    def free(self) -> int:
        """Bytes that are left on the disk."""
        return shutil.disk_usage(self.directory).free

    def park(self, value: T) -> T:
        """Put the large tensors of a value where they wait; those that are shared stay shared.

        Args:
            value: a tensor, or dataclasses, containers and partial functions of some.

        Raises:
            MemoryLimitError: the disk is full.
        """
        return mapped(value, self._park)

    def cool(self) -> None:
        """Give memory back: what was read of the files, and what nobody uses any more."""
        for each in [*self._maps] if hasattr(mmap, "MADV_DONTNEED") else ():
            each.madvise(mmap.MADV_DONTNEED)
        _trim()

    def _park(self, tensor: Tensor) -> Tensor:
        size = tensor.numel() * tensor.element_size()
        if size <= SMALL or tensor.device.type != "cpu" or tensor.layout != torch.strided:
            return tensor
        if _memory(tensor) in self._fixed:
            return tensor
        if tensor in self._parked:
            return self._parked[tensor]  # type: ignore[no-any-return]
        dense = tensor.detach().contiguous()
        try:
            with tempfile.TemporaryFile(dir=self.directory) as file:
                file.write(dense.flatten().view(torch.uint8).numpy().data)
                file.flush()
                pages = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY)
        except OSError as error:
            raise MemoryLimitError(
                f"{size >> 20} MiB that have to wait cannot be written to {self.directory}: "
                f"{error}; allow more memory, or set TMPDIR to a disk with more space"
            ) from error
        self._maps.add(pages)
        parked = torch.frombuffer(pages, dtype=torch.uint8).view(dense.dtype).view(dense.shape)
        self._parked[tensor] = self._parked[parked] = parked
        return parked


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.layout == torch.strided else 0


def mapped(value: T, change: Callable[[Tensor], Tensor], known: dict[int, Any] | None = None) -> T:
    """A value with every tensor in it changed, parameters apart.

    Args:
        value: a tensor, or dataclasses, containers and partial functions of some.
        change: from a tensor to another; asked once for each.
        known: what is changed already, by identity.
    """
    known = {} if known is None else known
    if id(value) in known:
        return known[id(value)][1]  # type: ignore[no-any-return]
    inner = partial(mapped, change=change, known=known)
    found: Any = value
    if isinstance(value, nn.Parameter | np.ndarray):
        pass
    elif isinstance(value, Tensor):
        found = change(value)
    elif isinstance(value, dict):
        found = {key: inner(each) for key, each in value.items()}
    elif isinstance(value, tuple | list) and not hasattr(value, "_fields"):
        found = type(value)(inner(each) for each in value)
    elif isinstance(value, partial):
        given = {key: inner(each) for key, each in value.keywords.items()}
        found = partial(value.func, *(inner(each) for each in value.args), **given)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        changed = {
            each.name: inner(before)
            for each in dataclasses.fields(value)
            if (before := getattr(value, each.name)) is not None
        }
        if any(changed[name] is not getattr(value, name) for name in changed):
            found = copy.copy(value)
            for name, each in changed.items():
                object.__setattr__(found, name, each)
    known[id(value)] = value, found  # the value, too, so that no other one gets its identity
    return found  # type: ignore[no-any-return]
