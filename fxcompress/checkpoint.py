"""What a run found out so far, on disk, so that one that was interrupted goes on from there."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import nn

from fxcompress.errors import CheckpointError
from fxcompress.processes import digest_of

FORMAT = 3


@dataclass(frozen=True)
class Checkpoint:
    """Files of one run.

    Attributes:
        directory: that they are in; made when something is written.
        mark: digests of what the run depends on, by what that is (:func:`mark_of`).
    """

    directory: Path
    mark: Mapping[str, str]

    def write(self, name: str, content: Mapping[str, Any]) -> None:
        """Write a file; what was there stays whole until it is, whoever else writes there.

        Args:
            name: of the file, without its ending.
            content: plain values, tensors and containers of them.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        # A name of its own: other processes (ranks, jobs) may write to this directory meanwhile.
        new = self.directory / f"{name}.{uuid.uuid4().hex}.new"
        try:
            with new.open("xb") as stream:
                torch.save({**content, "format": FORMAT, "fingerprint": dict(self.mark)}, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(new, self._file(name))
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def read(self, name: str) -> dict[str, Any] | None:
        """What was written; None if nothing was.  Tensors are mapped from the file.

        Raises:
            CheckpointError: it belongs to another run, or cannot be read.
        """
        file = self._file(name)
        if not file.exists():
            return None
        try:
            content = torch.load(file, weights_only=True, mmap=True)
        except Exception as error:
            raise CheckpointError(
                f"{file} cannot be read ({error}): delete it to start over"
            ) from error
        if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
            raise CheckpointError(
                f"{file} was written by another version of fxcompress: delete it to start over"
            )
        other = content.pop("fingerprint")
        if differing := [key for key, digest in self.mark.items() if other.get(key) != digest]:
            raise CheckpointError(
                f"{file} is of another run: its {', '.join(differing)} differ. Delete it to start "
                "over, or give another checkpoint directory"
            )
        return content

    def _file(self, name: str) -> Path:
        return self.directory / f"{name}.pt"


def mark_of(
    rules: str,
    model: nn.Module,
    batches: Sequence[Any],
    loss: Callable[..., Any] | None,
    forward: Callable[..., Any] | None,
) -> dict[str, str]:
    """What a run goes on with, or not at all: a digest of everything that it depends on.

    Of a function it is the name, the code, and the values that it was made with (defaults,
    closure, ``partial``); globals that it reads are not seen.

    Args:
        rules: as JSON.
        model: whose weights count.
        batches, loss, forward: as the run was given them.
    """
    return {
        "rules": hashlib.sha256(rules.encode()).hexdigest(),
        "model": digest_of([model.state_dict()]),
        "calibration data": digest_of(batches),
        "loss": _code(loss),
        "forward": _code(forward),
    }


def _code(value: Any, above: tuple[int, ...] = ()) -> str:
    """Digest of a callable: its name and code, and the plain values that it was made with."""
    if value is None:
        return ""
    parts = None if id(value) in above else _parts(value)
    if parts is None:
        return digest_of([value])
    inner = [_code(part, (*above, id(value))) for part in parts]
    return hashlib.sha256(" ".join(inner).encode()).hexdigest()


def _parts(value: Any) -> list[Any] | None:
    """What tells a callable, or a part of one, from others; None if it is a plain value."""
    if isinstance(value, partial):
        return [value.func, *value.args, *sorted(value.keywords), *_sorted(value.keywords)]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        defaults = [*(value.__defaults__ or ()), *_sorted(value.__kwdefaults__ or {})]
        cells = [_content(cell) for cell in value.__closure__ or ()]
        return [value.__qualname__, value.__code__, *defaults, *cells]
    if isinstance(value, CodeType):
        return [value.co_code, " ".join(value.co_names), *value.co_consts]
    if isinstance(value, tuple):
        return [*value]
    if isinstance(value, frozenset):  # its order is another in every process
        return sorted(value, key=repr)
    if not callable(value):
        return None
    name = getattr(value, "__qualname__", None)
    if name is not None:  # a class, or not written in Python
        return [name]
    state = value.state_dict() if isinstance(value, nn.Module) else {}
    plain = {k: v for k, v in vars(value).items() if isinstance(v, PLAIN) and k != "training"}
    return [type(value).__qualname__, state, plain]


PLAIN = (bool, int, float, complex, str, bytes, type(None))


def _sorted(values: Mapping[str, Any]) -> list[Any]:
    return [values[name] for name in sorted(values)]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None
