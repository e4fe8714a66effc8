"""``forecast``: what a compile will take in memory and time, told before anything is measured."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx, nn

from fxcompress.graph.blocks import below
from fxcompress.graph.inputs import Forward, device_of
from fxcompress.graph.wrappers import unwrapped
from fxcompress.metric import METRICS
from fxcompress.metric.memory import in_units
from fxcompress.metric.visitor import input_key
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.room import Needs, kept
from fxcompress.pipeline.sites import Site
from fxcompress.pipeline.survey import Survey, survey
from fxcompress.progress import stages
from fxcompress.rewrite import resident
from fxcompress.rules import Rules, read_rules

_VIEWS = {
    *("view", "reshape", "transpose", "permute", "expand", "unsqueeze", "squeeze", "getitem"),
    *("chunk", "split", "flatten", "unflatten", "narrow", "t", "detach", "view_as", "dropout"),
    *("input", "parameter", "output", "to", "contiguous", "identity", "float", "type_as", "write"),
}
"""Operators that mostly hand on memory that they were given."""

BACKWARD = 1.5
"""What is alive at once on the way back, in units of the values of the forward pass."""


@dataclass(frozen=True)
class Stage:
    """What a stage takes.

    Attributes:
        name: as progress has it.
        memory: bytes beside the model and the data.
        waiting: bytes that wait in files meanwhile.
        work: multiply-accumulates that it cannot do without.
    """

    name: str
    memory: int
    waiting: int
    work: float


@dataclass(frozen=True)
class Forecast:
    """What a compile will take.

    Attributes:
        model: bytes of the model.
        limit: bytes that the work may take; None if nobody knows what is free.
        blocks: paths of the modules that are run one after the other; none if the whole model is.
        passes: how often the data are gone through.
        stages: one after the other.
        rate: multiply-accumulates a second of a product of matrices on this machine.
    """

    model: int
    limit: int | None
    blocks: tuple[str, ...]
    passes: int
    stages: tuple[Stage, ...]
    rate: float

    @property
    def peak(self) -> int:
        """Bytes beside the model and the data, of the stage that takes most."""
        return max(stage.memory for stage in self.stages)

    @property
    def waiting(self) -> int:
        """Bytes of files."""
        return max(stage.waiting for stage in self.stages)

    @property
    def seconds(self) -> float:
        """Of all stages, if nothing but products of matrices took time."""
        return sum(stage.work for stage in self.stages) / self.rate

    def __str__(self) -> str:
        told = "" if self.limit is None else f" of {in_units(self.limit)} that it may take"
        how = (
            f"in {len(self.blocks)} blocks, {self.blocks[0]} to {self.blocks[-1]}"
            if self.blocks
            else "as a whole"
            if self.passes == 1
            else f"as a whole {self.passes} times"
        )
        lines = [
            f"model {in_units(self.model)}; the work takes {in_units(self.peak)} beside it{told}, "
            f"and {in_units(self.waiting)} in files",
            f"the model is run {how}; at least {self.seconds:,.0f} s on this machine",
            "",
            f"{'stage':<12} {'memory':>12} {'in files':>12} {'at least':>10}",
        ]
        for stage in self.stages:
            waiting = in_units(stage.waiting) if stage.waiting else "-"
            lines.append(
                f"{stage.name:<12} {in_units(stage.memory):>12} {waiting:>12} "
                f"{stage.work / self.rate:>8,.1f} s"
            )
        return "\n".join(lines)


def forecast(
    model: nn.Module,
    rules: Rules,
    calibration: Iterable[Any],
    *,
    memory: int | str | None = None,
    batches: int | None = None,
    forward: Forward | None = None,
) -> Forecast:
    """What :func:`fxcompress.compile` will take in memory and time.

    The model is run once on the first batch, to record its graph; it may be on the meta device,
    where it takes no memory itself.

    Args:
        model, rules, calibration, memory, forward: as of :func:`fxcompress.compile`.
        batches: how many there will be, if ``calibration`` does not say.

    Raises:
        RuleError, RecordError, CalibrationError, MemoryLimitError: as of
            :func:`fxcompress.compile`.
    """
    model = resident(unwrapped(model))
    loaded = read_rules(rules, memory=memory)
    with torch.inference_mode(False), stages(False) as silent:
        request = Request(silent, calibration, None, None, forward)
        found, data = survey(model, loaded, request, values=False)
    count = batches or data.total or 1
    most = loaded.rules.metric.batches
    return foresee(found, min(count, most) if most else count)


def foresee(found: Survey, batches: int) -> Forecast:
    """What the stages after a survey take.

    Args:
        found: has the sites and the room.
        batches: of calibration data.
    """
    room, sites = found.room, found.sites
    metric = METRICS[found.rules.rules.metric.kind]
    needs, parked = Needs(metric, batches), room.parking is not None
    held = max(1, int(batches * found.rules.rules.metric.held_back)) if metric.needs else 0
    held = held if found.rules.rules.metric.held_back and batches > 1 else 0
    passing = max(
        (
            needs.gathering(cast("Sequence[Site]", section.sites))
            + activations(found, room.blocks, section.block, metric.backward)
            for section in room.sections
        ),
        default=0,
    )
    moments = needs.finished(sites)
    boundaries = sum(_returned(found, path) for path in room.blocks) * (2 if metric.backward else 1)
    forwards = 1 + metric.backward + bool(room.blocks)
    repeats = 1 if room.blocks else len(room.sections)
    macs = found.size.macs
    grams = sum(_gram(*each) for each in _unique(sites)) if metric.needs else 0.0
    factors = sum(map(kept, sites))
    widest = max(map(needs.decomposing, sites))
    waiting = moments + held * boundaries + batches * boundaries
    calibrate = Stage(
        "calibrate",
        passing,  # sums are given up one by one as moments are made of them
        waiting if parked else 0,
        (batches - held) * (forwards * repeats * macs + grams),
    )
    judge = Stage(
        "held back",
        passing + (0 if parked else moments),
        waiting + moments // 2 if parked else 0,
        held * (forwards * repeats * macs + grams),
    )
    work = sum(_work(site) * max(1, len(found.group(site.name).forms)) for site in sites)
    decompose = Stage(
        "decompose",
        widest + (0 if parked else 2 * moments + factors),
        waiting + factors if parked else 0,
        work,
    )
    size = found.size.bytes
    again = size + max(map(needs.refitting, sites))
    judged = moments // 2 if held else 0  # in float32
    rewrite = Stage(
        "rewrite",
        again + (0 if parked else factors + judged),
        factors + judged if parked else 0,
        4.0 * macs,
    )
    stages = tuple(
        stage for stage in (calibrate, judge, decompose, rewrite) if stage.work or stage is rewrite
    )
    return Forecast(size, room.limit, room.blocks, repeats, stages, _rate(found.model))


def activations(found: Survey, blocks: Sequence[str], block: int, backward: bool) -> int:
    """Bytes of the values of a block, and of what is alive of them on the way back.

    Args:
        found: has the recorded graph.
        blocks: paths.
        block: place of the one; their number for what comes after the last.
        backward: whether gradients are wanted.
    """
    size = found.sites[0].shape.dtype.itemsize
    sizes = [
        size * math.prod(node.meta["shape"])
        for node in found.recording.graph.nodes
        if _in_block(node, blocks, block) and node.meta["op"] not in _VIEWS
        and node.meta.get("shape")
    ]  # fmt: skip
    if not backward:
        return 2 * max(sizes, default=0)
    return int(BACKWARD * sum(sizes))


def _in_block(node: fx.Node, blocks: Sequence[str], block: int) -> bool:
    scope = node.meta["path"] or node.meta["scope"]
    if block < len(blocks):
        return below(scope, blocks[block])
    return not any(below(scope, path) for path in blocks)


def _returned(found: Survey, path: str) -> int:
    """Bytes of what a block returns, about: the last value that is computed in it."""
    last = [
        node
        for node in found.recording.graph.nodes
        if below(node.meta["path"] or node.meta["scope"], path) and node.meta.get("shape")
    ]
    size = found.sites[0].shape.dtype.itemsize
    return size * math.prod(last[-1].meta["shape"]) if last else 0


def _unique(sites: Iterable[Site]) -> Iterable[tuple[Site, bool]]:
    """Sites, and whether each is the first on its input."""
    seen = set()
    for site in sites:
        key = input_key(site)
        yield site, key not in seen
        seen.add(key)


def _gram(site: Site, first: bool) -> float:
    """Multiply-accumulates of the second moments of a batch, in and behind a site."""
    _, m, n = site.shape.matrix
    positions = site.dense_size().macs / (m * n)
    return 5 / 8 * positions * (m * m + (n * n if first else 0))


def _work(site: Site) -> float:
    """Multiply-accumulates of decomposing a weight once, about."""
    groups, m, n = site.shape.matrix
    k = min(m, n)
    whitening = (m**3 + n**3) / 6 + m * n * (m + n) / 2
    return groups * (whitening + k * m * n + 4 * k**3)


def _rate(model: nn.Module) -> float:
    """Multiply-accumulates a second of a product of matrices in float32."""
    device = device_of(model)
    if device.type == "meta":
        device = torch.device("cpu")
    a = torch.ones(1024, 1024, device=device)
    best = math.inf
    for _ in range(4):
        begin = time.perf_counter()
        float((a @ a)[0, 0])
        best = min(best, time.perf_counter() - begin)
    return 1024**3 / best
