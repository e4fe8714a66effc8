"""What the work takes in memory, and how it keeps to a limit.

Within a limit everything is done in one pass, with the moments of all layers in memory.  Where
that is too much, the model is cut into blocks (:mod:`fxcompress.metric.blocks`), or gone through
several times with some of its layers each; moments and factors wait in files
(:mod:`fxcompress.parking`).  Ranks and weights are the same, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import nn

from fxcompress.collective import ALONE, Processes
from fxcompress.errors import MemoryLimitError
from fxcompress.graph.blocks import cut
from fxcompress.graph.inputs import device_of
from fxcompress.graph.recorder import Recording
from fxcompress.metric import Metric
from fxcompress.metric.blocks import in_blocks
from fxcompress.metric.grams import FEW, WIDE
from fxcompress.metric.memory import free_memory, in_units
from fxcompress.metric.moment_sums import LARGEST_OUTPUT
from fxcompress.metric.passes import Section
from fxcompress.metric.statistic import Statistic
from fxcompress.metric.visitor import input_key
from fxcompress.parking import Parking
from fxcompress.pipeline.sites import Site

T = TypeVar("T")

SHARE = 0.8
"""Of the memory that is free, what is taken at most if nobody says otherwise."""


@dataclass(frozen=True, eq=False)
class Room:
    """How the work keeps to a limit on memory.

    Attributes:
        limit: bytes beside the model and the data; None if nobody knows what is free.
        blocks: paths of the modules that are run one after the other; none for the whole model.
        sections: of the sites, in the order in which they are measured.
        parking: where tensors wait; None if there is room for all of them.
    """

    limit: int | None
    blocks: tuple[str, ...]
    sections: tuple[Section, ...]
    parking: Parking | None = None

    def park(self, value: T) -> T:
        """A value in whose place there is room for others."""
        return value if self.parking is None else self.parking.park(value)

    def cool(self) -> None:
        """Forget what was read of what waits."""
        if self.parking is not None:
            self.parking.cool()


def make_room(
    model: nn.Module,
    recording: Recording,
    sites: Sequence[Site],
    needs: Needs,
    limit: int | None,
    processes: Processes = ALONE,
) -> Room:
    """Decide how sites are measured within a limit on memory.

    Args:
        model: the working copy.
        recording: of it.
        sites: in graph order.
        needs: what the work on them takes.
        limit: bytes beside the model and the data; None for :data:`SHARE` of what is free.
        processes: that work together, and have to do so in the same way.

    Raises:
        MemoryLimitError: a single site takes more than a limit that was given; the message says how
            much.
    """
    given = limit is not None
    if limit is None:
        device = device_of(model)
        free = processes.memory_for_each(free_memory(device), device)
        limit = None if free is None else int(SHARE * free)
    everyone = (Section(tuple(sites)),)
    if limit is None or needs.everything(sites) <= limit:
        return Room(limit, (), everyone)
    least, worst = max((max(needs.decomposing(s), needs.gathering([s])), s.name) for s in sites)
    if least > limit and given:
        raise MemoryLimitError(
            f"the limit on memory is {in_units(limit)}, and {worst} alone takes {in_units(least)}: "
            "allow as much (--memory, memory=), or leave it out of the rules "
            "(unless: [{name: ...}])"
        )
    most = max(limit, least)
    by_name = {site.name: site for site in sites}

    def cost(names: Sequence[str]) -> int:
        return needs.gathering(by_name[name] for name in names)

    names = [site.name for site in sites]
    blocks = () if recording.drew else cut(recording, names, cost, most)
    sections = tuple(
        Section(part, place)
        for place, mine in in_blocks(sites, blocks)
        for part in _parts(mine, needs, most)
    )
    return Room(limit, blocks, sections, Parking(model))


def _parts(sites: Sequence[Site], needs: Needs, most: int) -> Iterator[tuple[Site, ...]]:
    """Sites in as few parts as can be, each of which costs little enough."""
    part: list[Site] = []
    for site in sites:
        if part and needs.gathering([*part, site]) > most:
            yield tuple(part)
            part = []
        part.append(site)
    if part:
        yield tuple(part)


# ---- bytes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Needs:
    """How many bytes the work on sites takes.

    Attributes:
        metric: of the rules.
        batches: of calibration data; None if nobody knows, which counts as many.
    """

    metric: Metric
    batches: int | None

    def gathering(self, sites: Iterable[Site]) -> int:
        """Of the sums of all statistics of some sites, and of the largest mean made of them."""
        sums, largest = 0.0, 0
        for size, share in self._statistics(sites):
            sums += share * size
            largest = max(largest, size)
        return int(sums) + largest

    def finished(self, sites: Iterable[Site]) -> int:
        """Of the statistics of some sites themselves."""
        return sum(size for size, _ in self._statistics(sites))

    def decomposing(self, site: Site) -> int:
        """Of decomposing a weight: a factor of the metric, its roots, products."""
        groups, m, n = site.shape.matrix
        wide = max(
            m if m >= LARGEST_OUTPUT else self._entries(site, m),
            n if site.shape.takes == "indices" else self._entries(site, n),
        )
        return 8 * (4 * wide + groups * 4 * (m * n + min(m, n) ** 2))

    def refitting(self, site: Site) -> int:
        """Of making the weights of a form: a factor of the metric, parts of it."""
        groups, m, n = site.shape.matrix
        wide = n if site.shape.takes == "indices" else self._entries(site, n)
        return 8 * (3 * wide + groups * 4 * m * n)

    def everything(self, sites: Sequence[Site]) -> int:
        """Of all at once: moments, those of the data held back, decompositions."""
        found = 2 * self.gathering(sites) + sum(map(kept, sites))
        return found + max(map(self.decomposing, sites), default=0)

    def _statistics(self, sites: Iterable[Site]) -> Iterator[tuple[int, float]]:
        """Of every statistic, and how many times as much its sum takes."""
        keys = set()
        for site in sites:
            groups, m, n = site.shape.matrix
            # Triangles: 5/8 of the entries, in float64 and in the type of the products.
            packed = 5 / 8 * (2.0 if site.shape.dtype.itemsize == 8 else 1.5)
            for need in self.metric.needs:
                if isinstance(need, Statistic):
                    yield 8 * groups * math.prod(need.size(m, n)), 1.0
                elif need == "input":
                    if input_key(site) not in keys:
                        keys.add(input_key(site))
                        indices = site.shape.takes == "indices"
                        size = n if indices else self._entries(site, n)
                        yield 8 * groups * size, 1.0 if indices else packed
                elif need == "output":
                    wide = m >= LARGEST_OUTPUT
                    size = m if wide else self._entries(site, m)
                    yield 8 * groups * size, 1.0 if wide else packed
                else:
                    yield 8 * groups * m * (n if need == "entries" else 1), 1.0

    def _entries(self, site: Site, width: int) -> int:
        """Numbers that a second moment is kept as: of few rows, these themselves."""
        groups, m, n = site.shape.matrix
        rows = None if self.batches is None else site.dense_size().macs // (m * n) * self.batches
        few = rows is not None and groups == 1 and width >= WIDE and rows <= width // FEW
        return rows * width if few and rows is not None else width * width


def kept(site: Site) -> int:
    """Bytes of what stays of a decomposition: its factors, for the form of every view."""
    groups, m, n = site.shape.matrix
    return 4 * groups * min(m, n) * (m + n)
