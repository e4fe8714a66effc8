"""The calibration data of a process, and where its batches stand among those of all.

Batches of several processes are one set of data, numbered in turns: first the first batch of every
process, from rank 0, then the second of every process that has one.  So a list that is dealt out
(``batches[rank::size]``, or samples by a ``DistributedSampler``) keeps its order.  What depends on
chance (labels, what is held back) depends on these numbers, and not on who has a batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from fxcompress.collective import Processes
from fxcompress.processes import digest_of


@dataclass(frozen=True, eq=False)
class Data:
    """Batches of this process.

    Attributes:
        batches: gone through once.
        total: how many there are in all processes; None if that is not known.
        places: of these among all, rising; None for 0, 1, ...
        told: how they are spread over processes, for the plan; empty for a process by itself.
    """

    batches: Iterable[Any]
    total: int | None
    places: Sequence[int] | None = None
    told: str = ""

    def first(self, count: int | None) -> Data:
        """The first of all batches; all for None."""
        if count is None:
            return self
        total = None if self.total is None else min(count, self.total)
        places = None if self.places is None else [at for at in self.places if at < count]
        own = count if places is None else len(places)
        return Data(itertools.islice(self.batches, own), total, places, self.told)


def dealt(own: Sequence[Any], processes: Processes) -> tuple[Any, Data]:
    """The first of all batches, and which of them are this process's to go through.

    Where all processes were given the same batches, each takes its share of them: they count once.

    Args:
        own: batches that this process was given.
        processes: all of them.

    Raises:
        ProcessError: another process stopped.
    """
    rank, size = processes.rank, processes.size
    given = processes.gathered((len(own), digest_of(own)))
    counts = [count for count, _ in given]
    if len({*given}) == 1:
        shares = range(rank, len(own), size)
        data = Data(own[rank::size], len(own), shares, f"{size}, given the same batches")
        return (own[0] if own else None), data
    order = sorted((at, each) for each, count in enumerate(counts) for at in range(count))
    places = [place for place, (_, each) in enumerate(order) if each == rank]
    first = order[0][1]
    batch = processes.gathered(own[0] if rank == first else None)[first]
    return batch, Data(own, sum(counts), places, f"{size}, each with its own batches")
