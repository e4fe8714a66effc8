"""Processes of ``torch.distributed`` that train at the same time see the same data, or stop.

Rounds of training add up no gradients over processes.  Each would go on with ranks and weights of
its own: ``DistributedDataParallel`` would refuse them, or average gradients of factors that differ.
So data that differ are an error there (what is cut once adds up sums: ``fxcompress.collective``).

No process waits for one that does nothing, for to compress on one of them only is right.  So there
is no collective call: each leaves a digest of its data in the store that the group was set up with,
and compares it with the digests of those that have begun the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_flatten

from fxcompress.errors import CalibrationError

PATIENCE = timedelta(minutes=30)
"""How long a process that has begun is waited for."""

FAILED = "failed"
"""In place of a digest: the process has stopped with an error of its own."""


def several() -> bool:
    """Whether this process is one of several that ``torch.distributed`` knows."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def same_data(batches: Iterable[Any], work: str) -> Iterator[Iterable[Any]]:
    """Batches to go through inside; at the end all processes at the same work must have had them.

    Args:
        batches: of any kind; gone through once.
        work: tells this work from other such.

    Raises:
        CalibrationError: another process had other batches, or does not finish.
    """
    if not several():
        yield batches
        return
    store: Any = dist.distributed_c10d._get_default_store()
    rank, size = dist.get_rank(), dist.get_world_size()
    name = f"fxcompress/{hashlib.sha256(work.encode()).hexdigest()[:16]}"
    place = f"{name}/{store.add(f'{name}/count/{rank}', 1)}"
    store.set(f"{place}/begun/{rank}", "yes")
    digest = hashlib.sha256()
    said = FAILED
    try:
        yield _watched(batches, digest)
        said = digest.hexdigest()
    finally:
        store.set(f"{place}/digest/{rank}", said)
    for other in range(size):
        if not store.check([f"{place}/begun/{other}"]):
            continue
        there = f"{place}/digest/{other}"
        try:
            store.wait([there], PATIENCE)
        except Exception as error:
            raise CalibrationError(
                f"process {other} of torch.distributed does not finish its calibration: {error}"
            ) from error
        if store.get(there).decode() not in (said, FAILED):
            raise CalibrationError(
                f"processes {rank} and {other} of torch.distributed were given different "
                "calibration data, so that rounds would give each ranks and weights of its own. "
                "Give all of them the same batches (no DistributedSampler), leave out rounds and "
                "steps, or compress on one of them only: "
                "if dist.get_rank() == 0: fxcompress.save(fxcompress.compile(...), directory), "
                "then dist.barrier(), and fxcompress.load on the others"
            )


def digest_of(batches: Iterable[Any]) -> str:
    """Of all values in batches; equal for equal data."""
    digest = hashlib.sha256()
    for _ in _watched(batches, digest):
        pass
    return digest.hexdigest()


def _watched(batches: Iterable[Any], digest: Any) -> Iterator[Any]:
    for batch in batches:
        leaves, structure = tree_flatten(dict(batch) if isinstance(batch, Mapping) else batch)
        digest.update(str(structure).encode())
        for leaf in leaves:
            _add(digest, leaf)
        yield batch


def _add(digest: Any, leaf: Any) -> None:
    """Add a value to a digest: tensors, arrays and plain values; of others their class."""
    if isinstance(leaf, Tensor) and leaf.layout == torch.strided and not leaf.is_nested:
        digest.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
        flat = leaf.detach().cpu().resolve_conj().resolve_neg().contiguous().reshape(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    elif isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:
        digest.update(f"{leaf.dtype} {leaf.shape}".encode())
        digest.update(leaf.tobytes())
    elif isinstance(leaf, (bool, int, float, complex, str, bytes, type(None))):
        digest.update(repr(leaf).encode())
    else:
        digest.update(type(leaf).__name__.encode())
