"""The weights of a save: one safetensors file, or several of a size at most.

::

    model.fxcompress.safetensors                             all of them, or the first of
    model.fxcompress-0123456789abcdef-00002-of-00003.safetensors       several, of one save:
    model.fxcompress-0123456789abcdef-00003-of-00003.safetensors       its id is in their names
    model.fxcompress.safetensors.index.json                  which tensor is in which, for others

The first file decides: its metadata have the index, so that a save is renamed into its place with
that one file, whatever its number of others.  Files are mapped, not read: a tensor takes no memory
before somebody looks at it.
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fxcompress.errors import LoadError
from fxcompress.saved.pretrained import SAVE_ID
from fxcompress.saved.tensors import stored

WEIGHTS = "model.fxcompress.safetensors"
"""Its metadata have copies of the other files, under their names."""
INDEX = f"{WEIGHTS}.index.json"

_SHARD = re.compile(r"model\.fxcompress-([0-9a-f]{16})-([0-9]{5,})-of-([0-9]{5,})\.safetensors")

_TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
"""Types of stored tensors by their names in the file; others are read to tell what they are."""

# ---- writing --------------------------------------------------------------------------


def writers(
    tensors: Mapping[str, Tensor], own: str, about: Mapping[str, str], most: int
) -> dict[str, Callable[[Path], object]]:
    """What writes the files of a save, by their names, the one that decides last.

    Args:
        tensors: all of them, on any device.
        own: the id of the save.
        about: metadata of the file that decides.
        most: bytes of tensors in one file, unless a single one has more.
    """
    parts = _parts(tensors, most)
    names = [WEIGHTS] + [_shard(own, at, len(parts)) for at in range(2, len(parts) + 1)]
    if len(parts) > 1:
        where = {name: file for file, part in zip(names, parts, strict=True) for name in part}
        size = sum(map(_size, tensors.values()))
        index = {"metadata": {"total_size": size, SAVE_ID: own}, "weight_map": where}
        about = {**about, INDEX: json.dumps(index, indent=1) + "\n"}

    def writer(part: Sequence[str], metadata: Mapping[str, str]) -> Callable[[Path], object]:
        def write(path: Path) -> None:
            found = {name: stored(tensors[name]) for name in part}
            save_file(found, path, metadata=dict(metadata))

        return write

    others = {
        name: writer(part, {"format": "pt", SAVE_ID: own})
        for name, part in zip(names[1:], parts[1:], strict=True)
    }
    found: dict[str, Callable[[Path], object]] = {**others, WEIGHTS: writer(parts[0], about)}
    if others:
        found[INDEX] = lambda path: path.write_text(about[INDEX], encoding="utf-8")
    return found


def remove_others(directory: Path, kept: Mapping[str, Any]) -> None:
    """Remove the files of weights of saves before.

    Args:
        directory: of the save.
        kept: names of its own files.
    """
    for path in directory.glob("model.fxcompress*"):
        if path.name not in kept and (path.name == INDEX or _SHARD.fullmatch(path.name)):
            path.unlink(missing_ok=True)


def _parts(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    """Names of tensors, in their order, for each file."""
    parts: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        own = _size(tensor)
        if parts[-1] and size + own > most:
            parts.append([])
            size = 0
        parts[-1].append(name)
        size += own
    return parts


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _shard(own: str, at: int, of: int) -> str:
    return f"model.fxcompress-{own}-{at:05d}-of-{of:05d}.safetensors"


# ---- reading --------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Weights:
    """The weights of a save, without their values.

    Attributes:
        path: of the file that decides.
        header: the tensors by their names, on the meta device.
        about: the metadata of that file.
        parts: names of the tensors in every file.
    """

    path: Path
    header: Mapping[str, Tensor]
    about: Mapping[str, str]
    parts: Mapping[Path, Sequence[str]]

    @classmethod
    def at(cls, path: Path) -> Weights:
        """The weights in a file, and in those that it says belong to it.

        Raises:
            LoadError: one is missing, cannot be read, or is of another save.
        """
        header, about = read_header(path)
        parts: dict[Path, Sequence[str]] = {path: [*header]}
        header = dict(header)
        for name, wanted in _listed(path, about).items():
            if name == path.name:
                _require_same(path, wanted, header)
                continue
            shard = path.parent / name
            found, of = read_header(shard, f"{path} is one of several files of a save")
            if of.get(SAVE_ID) != about.get(SAVE_ID):
                raise LoadError(f"{shard} is of another save than {path}: save the model again")
            _require_same(shard, wanted, found)
            header |= found
            parts[shard] = [*found]
        return cls(path, header, about, parts)

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors, mapped, file by file.

        Raises:
            LoadError: a file changed since.
        """
        for path, names in self.parts.items():
            try:
                with safe_open(path, "pt") as file:
                    for name in names:
                        yield name, self._checked(path, name, file.get_tensor(name))
            except (SafetensorError, OSError, ValueError) as error:
                raise LoadError(f"{path} cannot be read: {error}; save the model again") from error

    def tensor(self, name: str) -> Tensor:
        """One of the tensors, mapped."""
        path = next(path for path, names in self.parts.items() if name in names)
        with safe_open(path, "pt") as file:
            return self._checked(path, name, file.get_tensor(name))

    def _checked(self, path: Path, name: str, value: Tensor) -> Tensor:
        known = self.header[name]
        if value.shape != known.shape or value.dtype != known.dtype:
            raise LoadError(f"{path} was written to while it was read: load the model again")
        return value


def _listed(path: Path, about: Mapping[str, str]) -> dict[str, set[str]]:
    """The files of a save with the names of their tensors, as the index in the metadata says."""
    if INDEX not in about:
        return {}
    try:
        index = json.loads(about[INDEX])
        pairs = [*index["weight_map"].items()]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(f"{path} has an index that cannot be read: {error}") from error
    found: dict[str, set[str]] = {}
    for name, file in pairs:
        # No other names: a path would lead out of the directory.
        if not isinstance(file, str) or not (file == path.name or _SHARD.fullmatch(file)):
            raise LoadError(f"{path} has an index with a file that no save has: {file!r}")
        found.setdefault(file, set()).add(name)
    return found


def _require_same(path: Path, wanted: set[str], found: Mapping[str, Tensor]) -> None:
    """Require that a file has the tensors that the index says."""
    odd = sorted(wanted ^ found.keys())
    if odd:
        which = "has no" if odd[0] in wanted else "has, beside what the index says,"
        raise LoadError(f"{path} {which} {odd[0]}: it was changed; save the model again")


def read_header(
    path: Path, owner: str = "not a directory written by fxcompress.save"
) -> tuple[Mapping[str, Tensor], Mapping[str, str]]:
    """The tensors in a file without their values, on the meta device, and its metadata.

    Args:
        path: of the file.
        owner: what a message says about one that is missing.

    Raises:
        LoadError: it is missing, or cannot be read.
    """
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise OSError("it is no file")
        with safe_open(path, "pt") as file:
            found = {}
            for name in file.keys():  # noqa: SIM118
                part = file.get_slice(name)
                dtype = _TYPES.get(part.get_dtype())
                if dtype is None:
                    dtype = file.get_tensor(name).dtype
                found[name] = torch.empty(part.get_shape(), dtype=dtype, device="meta")
            return found, file.metadata() or {}
    except FileNotFoundError as error:
        raise LoadError(f"{path} is missing: {owner}") from error
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise LoadError(f"{path} cannot be read: {error}; save the model again") from error
