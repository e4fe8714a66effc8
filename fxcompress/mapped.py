"""Tensors that are mapped from files: the system reads what is touched, and may forget it again.

safetensors, and so ``from_pretrained`` on the processor, maps weights in this way.  A mapping is
private: what is written to the tensor stays in this process, and never gets into the file.
"""

from __future__ import annotations

import math
import os
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, UntypedStorage


def map_tensor(path: str | os.PathLike[str], dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """The tensor whose entries are the content of a file, row by row.

    Raises:
        RuntimeError: the file is not there, or too short.
    """
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.empty(tuple(shape), dtype=dtype)
    return _seen(_mapped(os.fspath(path), size), dtype, shape)


def _mapped(path: str, size: int) -> UntypedStorage:
    return UntypedStorage.from_file(path, False, size)  # type: ignore[return-value]


def _seen(storage: UntypedStorage, dtype: torch.dtype, shape: Sequence[int]) -> Tensor:
    """Memory as a tensor."""
    return torch.empty(0, dtype=dtype).set_(storage).view(tuple(shape))


def mapped_copies(tensors: Iterable[Tensor]) -> dict[int, Tensor]:
    """Copies that take no memory: other mappings of the files that tensors are mapped from.

    Args:
        tensors: of any kind.

    Returns:
        A copy by the identity of every tensor that is mapped from a file which still holds its
        values.  Empty where the system does not tell what is mapped (elsewhere than on Linux).
    """
    regions = _regions()
    starts = [region.start for region in regions]
    files: dict[str, UntypedStorage] = {}
    found: dict[int, Tensor] = {}
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.layout != torch.strided or not tensor.numel():
            continue
        at = bisect_right(starts, tensor.data_ptr()) - 1
        if at < 0 or not tensor.is_contiguous():
            continue
        copied = regions[at].copy_of(tensor.detach(), files)
        if copied is not None:
            found[id(tensor)] = copied
    return found


@dataclass(frozen=True)
class _Region:
    """A part of a file that is mapped.

    Attributes:
        start, stop: addresses.
        offset: of ``start`` in the file.
        inode: of the file that was mapped; another one may have its name by now.
        path: of the file.
    """

    start: int
    stop: int
    offset: int
    inode: int
    path: str

    def copy_of(self, tensor: Tensor, files: dict[str, UntypedStorage]) -> Tensor | None:
        """Another mapping of a tensor; None if it is not of this region, or was written to.

        Args:
            tensor: contiguous.
            files: those that are mapped again already, whole.
        """
        size = tensor.numel() * tensor.element_size()
        if tensor.data_ptr() + size > self.stop:
            return None
        if self.path not in files:
            try:
                about = os.stat(self.path)
            except OSError:
                return None
            if about.st_ino != self.inode:
                return None
            files[self.path] = _mapped(self.path, about.st_size)
        begin = self.offset + tensor.data_ptr() - self.start
        part: Any = files[self.path][begin : begin + size]
        copied = _seen(part, tensor.dtype, tensor.shape)
        # Byte by byte, since NaN is not equal to itself.
        same = torch.equal(copied.view(-1).view(torch.uint8), tensor.view(-1).view(torch.uint8))
        return copied if same else None


def _regions() -> list[_Region]:
    """The files that are mapped in this process, by address."""
    try:
        lines = Path("/proc/self/maps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return []
    found = []
    for line in lines:  # 7f00-7f80 rw-p 00000000 fe:00 2146907    /a/file
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].startswith("/") and parts[1].endswith("p"):
            start, stop = (int(each, 16) for each in parts[0].split("-"))
            region = _Region(start, stop, int(parts[2], 16), int(parts[4]), parts[5])
            found.append(region)
    return sorted(found, key=lambda region: region.start)
