"""Processes of ``torch.distributed`` that compress one model together, each on data of its own.

They exchange sums and what one of them found out, and go on with equal values, so that all come to
the same result.  A process by itself is :data:`ALONE`: it exchanges nothing.

An error in one process ends all of them.  Whatever is exchanged, each first says whether it is
well: one that stops says why in place of what the others wait for.  A process that is gone is
noticed by ``torch.distributed`` itself: at once where a connection breaks, else at the timeout that
the process group was set up with.
"""

from __future__ import annotations

import socket
import time
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxcompress.errors import FxcompressWarning, ProcessError
from fxcompress.processes import PATIENCE as LONGEST
from fxcompress.processes import several

T = TypeVar("T")
K = TypeVar("K", bound=Hashable)

PATIENCE = LONGEST.total_seconds()
"""Seconds that the other processes are waited for to begin, ..."""

SOON = 30.0
"""... and after which a warning says so."""

POLL = 0.02
"""Seconds between two looks whether they have begun."""

BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Integers of a number of bytes."""


@dataclass(frozen=True)
class Processes:
    """All processes that work together.  Every method has to be called by all of them, in order.

    Attributes:
        rank: place of this one among them.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def gathered(self, value: T) -> list[T]:
        """The values of all processes, from rank 0.

        Args:
            value: of this one, which can be pickled.

        Raises:
            ProcessError: another process stopped, or does not answer.
        """
        return [value] if self.size == 1 else self._exchange(None, value)

    def shared(self, value: T) -> T:
        """The value of rank 0; errors as of :meth:`gathered`."""
        return self.from_first(lambda: value)

    def from_first(self, compute: Callable[[], T]) -> T:
        """What rank 0 computes, for the others; errors as of :meth:`gathered`."""
        return self.gathered(compute() if self.rank == 0 else None)[0]  # type: ignore[return-value]

    def sum(self, *tensors: Tensor) -> None:
        """Put the sums over all processes in the place of tensors, the same bits everywhere.

        Args:
            tensors: equally many of equal shapes in all processes.

        Raises:
            ProcessError: as of :meth:`gathered`.
        """
        if self.size == 1:
            return
        self._exchange(None, None)
        with _answered():
            for tensor in tensors:
                there = tensor.to(_device_for(tensor)).contiguous()
                dist.all_reduce(there)
                if there is not tensor:
                    tensor.copy_(there)

    def sum_by_key(self, found: Mapping[K, Tensor], device: torch.device) -> dict[K, Tensor]:
        """Sums over all processes; a key that a process does not have counts as zeros there.

        Args:
            found: float64 tensors.
            device: of the sums.
        """
        if self.size == 1:
            return dict(found)
        shapes: dict[K, torch.Size] = {}
        for each in self.gathered({key: total.shape for key, total in found.items()}):
            shapes |= each
        sums = {
            key: found[key] if key in found else torch.zeros(shape, dtype=torch.float64).to(device)
            for key, shape in shapes.items()
        }
        self.sum(*sums.values())
        return sums

    def add_up(self, counts: Mapping[K, float]) -> dict[K, Any]:
        """Sums of numbers by key; one that a process does not have counts as 0 there."""
        total: dict[K, float] = {}
        for each in self.gathered(dict(counts)):
            for key, count in each.items():
                total[key] = total.get(key, 0) + count
        return total

    def memory_for_each(self, free: int | None, device: torch.device) -> int | None:
        """The bytes that every process may count on: the least, with those beside it in mind.

        Args:
            free: on the device of this one; None if nobody knows.
            device: that it works on.
        """
        if self.size == 1:
            return free
        found = self.gathered((free, socket.gethostname(), str(device)))
        places = [place for _, *place in found]
        known = [
            free // places.count(place)
            for (free, *_), place in zip(found, places, strict=True)
            if free is not None
        ]
        return min(known, default=None)

    def require_same(self, compute: Callable[[], Any], message: str) -> None:
        """Require that all processes have the same.

        Args:
            compute: makes what is compared; not called in a process by itself.
            message: of the error.

        Raises:
            ProcessError: they have not; or as of :meth:`gathered`.
        """
        if self.size == 1:
            return
        first, *others = self.gathered(compute())
        different = [rank for rank, each in enumerate(others, 1) if each != first]
        if different:
            ranks = ", ".join(map(str, different))
            raise ProcessError(f"processes 0 and {ranks} of torch.distributed differ: {message}")

    def _exchange(self, error: str | None, value: Any) -> list[Any]:
        found: list[Any] = [None] * self.size
        with _answered():
            dist.all_gather_object(found, (error, value))
        stopped = [(rank, text) for rank, (text, _) in enumerate(found) if text is not None]
        if stopped and error is None:
            told = "\n".join(f"process {rank}: {text}" for rank, text in stopped)
            raise ProcessError(f"another process of torch.distributed stopped\n{told}")
        return [value for _, value in found]


ALONE = Processes()
"""A process that works by itself."""


@contextmanager
def joined(alone: bool) -> Iterator[Processes]:
    """All processes of ``torch.distributed``, until the work inside is done by each of them.

    Args:
        alone: whether this one works by itself, as it does where there is no other.

    Raises:
        ProcessError: the others do not begin, one stops with an error, or does not answer.
    """
    if alone or not several():
        yield ALONE
        return
    own = Processes(dist.get_rank(), dist.get_world_size())
    _meet(own)
    try:
        yield own
    except ProcessError:
        raise  # which all know of
    except Exception as error:
        with suppress(Exception):
            own._exchange(f"{type(error).__name__}: {error}", None)
        raise
    own.gathered(None)  # one that goes on before all are through could not be told of an error


def fingerprint(model: nn.Module) -> list[tuple[str, tuple[int, ...], int]]:
    """Parameters and buffers, told apart by the sum of their bits: exact on every device."""
    return [
        (name, tuple(tensor.shape), int(_bits(tensor.detach()).sum(dtype=torch.int64)))
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if tensor.layout == torch.strided
    ]


def _bits(tensor: Tensor) -> Tensor:
    real = torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor
    return real.view(BITS[real.element_size()])


def _meet(own: Processes) -> None:
    """Wait until all processes are here, which no collective call could: others may do nothing."""
    store: Any = dist.distributed_c10d._get_default_store()
    turn = f"fxcompress/together/{store.add(f'fxcompress/turn/{own.rank}', 1)}"
    store.set(f"{turn}/{own.rank}", "yes")
    start, told = time.monotonic(), False
    while missing := [r for r in range(own.size) if not store.check([f"{turn}/{r}"])]:
        waited = time.monotonic() - start
        text = (
            f"process {own.rank} of torch.distributed waits for {', '.join(map(str, missing))}: "
            "all processes compress together, each on its own batches, so all of them have to "
            "call this. To compress in one of them only, pass alone=True"
        )
        if waited > PATIENCE:
            raise ProcessError(text)
        if waited > SOON and not told:
            warnings.warn(text, FxcompressWarning, stacklevel=2)
            told = True
        time.sleep(POLL)


@contextmanager
def _answered() -> Iterator[None]:
    """What ``torch.distributed`` says where a process does not answer, in our words."""
    try:
        yield
    except RuntimeError as error:
        raise ProcessError(
            "a process of torch.distributed does not answer: it was ended, or is stuck. Nothing "
            f"was changed; start all of them again ({error})"
        ) from error


def _device_for(tensor: Tensor) -> torch.device:
    """Where the process group can add up a tensor: NCCL cannot in the memory of the CPU."""
    known = [each.partition(":")[0] for each in dist.get_backend_config().split(",")]
    return tensor.device if tensor.device.type in known else torch.device(known[0])
