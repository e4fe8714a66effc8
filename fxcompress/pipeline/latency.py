"""How long operators take on this machine: a table of measured times, kept between runs.

What is timed is the forward pass of one operator (dense, or the body of a form at some ranks) on
an input of the size that it met in the recorded example, in evaluation mode, on the model's
device, with the number of threads that torch has.  Times between measured ranks are interpolated.

Timings on a shared machine swing, so all operators are gone through in turn, :data:`ROUNDS` times,
and the least time of each counts: what it takes when nothing disturbs it.  Times of a rank that
come out longer than those of a higher one stay so; the solver has no use for smooth costs.
"""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fxcompress.forms import Body, Fitted, Form, JointForm, Shape, fit
from fxcompress.forms.narrow import narrowed
from fxcompress.forms.target import Rank, Ranks

ROUNDS = 7
"""Times that every operator is measured."""

LEAST = 1e-3
"""Seconds of one measurement at least: a fast operator is called as often as that takes."""

GRID = 7
"""Ranks of a form that are measured; for two ranks, the square of the next number."""

PAIR_GRID = 4

Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Timing:
    """One operator, or several on one input, to be timed.

    Attributes:
        shapes: of the operators that stand there now, with the sizes of their inputs.
        form: of the body that is timed in their place; None for the one operator itself.
        rank: of the body.
    """

    shapes: tuple[Shape, ...]
    form: Form | JointForm | None = None
    rank: Rank | None = None

    @property
    def key(self) -> str:
        """What its time is kept under."""
        words: list[object] = [f"{s}{', bias' if s.bias else ''}" for s in self.shapes]
        words += [str(self.shapes[0].dtype).removeprefix("torch."), self.shapes[0].counted]
        if self.form is not None:
            words += [self.form.name, self.rank]
        return " | ".join(map(str, words))


class Table:
    """Measured times by operator.

    Args:
        path: where they are kept; None to forget them.

    Attributes:
        unkept: why they could not be kept; empty if they were.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.unkept = ""
        self._all: dict[str, dict[str, float]] = {}
        if path is not None:
            try:
                known = json.loads(path.read_text(encoding="utf-8"))
                self._all = {key: _times(value) for key, value in known.items()}
            except (OSError, ValueError, TypeError, AttributeError):
                self._all = {}  # a table that cannot be read is measured again

    def measure(
        self, entries: Iterable[Timing], device: torch.device, tick: Callable[[], None]
    ) -> Mapping[str, float]:
        """Seconds of each entry, by its key; those that are not in the table are measured.

        Args:
            entries: to look up.
            device: that they run on.
            tick: called after every round.
        """
        known = self._all.setdefault(machine(device), {})
        missing = {entry.key: entry for entry in entries if entry.key not in known}
        if missing:
            known.update(_measured(missing, device, tick))
            if self.path is not None:
                self._keep(self.path)
        return known

    def _keep(self, path: Path) -> None:
        partial = path.with_suffix(f".{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            partial.write_text(json.dumps(self._all, indent=1), encoding="utf-8")
            partial.replace(path)  # at once: nothing half-written is ever read
        except OSError as error:
            # The measurement is good all the same, and took its time.
            self.unkept = (
                f"the measured times could not be kept in {path} ({error.strerror or error}), so "
                "the next run measures again; set XDG_CACHE_HOME to a directory that can be written"
            )


def _times(kept: Mapping[str, Any]) -> dict[str, float]:
    """The entries of a table that are times."""
    times = {key: value for key, value in kept.items() if type(value) in (int, float)}
    return {key: float(value) for key, value in times.items() if 0 < value < float("inf")}


def table_path() -> Path | None:
    """Where times are kept: ``fxcompress/latency.json`` in the user's cache directory.

    None for a user without a home.
    """
    try:
        root = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
    except RuntimeError:
        return None
    return Path(root) / "fxcompress" / "latency.json"


def machine(device: torch.device) -> str:
    """What times hold for: the processor or GPU, threads, and the version of torch."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, torch {torch.__version__}"
    name = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        lines = info.read_text(encoding="utf-8", errors="replace").splitlines()
        name = next(
            (ln.partition(":")[2].strip() for ln in lines if ln.startswith("model name")), name
        )
    threads = torch.get_num_threads()
    return f"{device.type}: {name}, {threads} threads, torch {torch.__version__}"


def rank_grid(ranks: Ranks) -> Ranks:
    """The ranks that are measured: from the first to the last, spaced evenly."""
    if ranks.ndim == 1:
        places = np.linspace(0, len(ranks) - 1, min(GRID, len(ranks))).round().astype(int)
        return cast("Ranks", ranks[np.unique(places)])
    firsts, seconds = (_few(np.unique(ranks[:, axis])) for axis in (0, 1))
    pairs = np.meshgrid(firsts, seconds, indexing="ij")
    return np.stack(pairs, -1).reshape(-1, 2)


def _few(ranks: Ranks) -> Ranks:
    places = np.linspace(0, len(ranks) - 1, min(PAIR_GRID, len(ranks))).round().astype(int)
    return cast("Ranks", ranks[np.unique(places)])


def entries_for(form: Fitted, ranks: Ranks) -> list[Timing]:
    """What has to be measured for a form of one operator, or of several."""
    return [Timing(form.shapes, form.form, _rank(row)) for row in rank_grid(ranks)]


def interpolated(
    times: Mapping[str, float], form: Fitted, permitted: Ranks, ranks: Ranks
) -> Seconds:
    """Seconds at some of the permitted ranks, linear between those that were measured."""
    if not len(permitted):
        return np.empty(0)
    grid = rank_grid(permitted)
    measured = np.array([times[entry.key] for entry in entries_for(form, permitted)])
    if ranks.ndim == 1:
        return cast("Seconds", np.interp(ranks, grid, measured))
    firsts, seconds = np.unique(grid[:, 0]), np.unique(grid[:, 1])
    square = measured.reshape(len(firsts), len(seconds))
    rows = np.stack([np.interp(ranks[:, 1], seconds, line) for line in square])
    place = np.interp(ranks[:, 0], firsts, np.arange(len(firsts)))
    low = np.floor(place).astype(int)
    high = np.minimum(low + 1, len(firsts) - 1)
    at = np.arange(len(ranks))
    share = place - low
    return cast("Seconds", (1 - share) * rows[low, at] + share * rows[high, at])


def _rank(row: Any) -> Rank:
    return int(row) if np.ndim(row) == 0 else (int(row[0]), int(row[1]))


@torch.inference_mode()
def _measured(
    entries: Mapping[str, Timing], device: torch.device, tick: Callable[[], None]
) -> dict[str, float]:
    least: dict[str, float] = {}
    numbers = torch.Generator(device).manual_seed(0)  # torch's global one stays as it is
    for _ in range(ROUNDS):
        for key, entry in entries.items():
            module, inputs = _built(entry, device, numbers)
            seconds = sum(_time(module, each, device) for each in inputs)
            least[key] = min(seconds, least.get(key, seconds))
        tick()
    return least


class _Together(nn.Module):
    """All operators of a body, one after the other."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.shared = body.shared
        self.heads = nn.ModuleList(body.heads)

    def forward(self, x: Tensor) -> list[Tensor]:
        values = () if self.shared is None else self.shared(x)
        return [head(x, *values) for head in self.heads]


class _OneByOne(nn.Module):
    """The operators of a narrowed body, each with inputs of its own."""

    def __init__(self, body: Body, inputs: Sequence[Sequence[Tensor]]) -> None:
        super().__init__()
        self.heads = nn.ModuleList(body.heads)
        self.inputs = inputs

    def forward(self, x: Tensor) -> list[Tensor]:
        pairs = zip(self.heads, self.inputs, strict=True)
        return [head(each) for head, inputs in pairs for each in inputs]


@torch.no_grad()
def _built(
    entry: Timing, device: torch.device, numbers: torch.Generator
) -> tuple[nn.Module, Sequence[Tensor]]:
    shapes = [replace(shape, device=device) for shape in entry.shapes]
    shape: Any = shapes[0]
    module: nn.Module
    given: Sequence[Tensor] = []
    if entry.form is not None:
        assert entry.rank is not None
        body = fit(entry.form, shapes, order=_order(entry, shape)).empty(entry.rank)
        module = _Together(body)
        if body.kept is not None:
            assert isinstance(entry.rank, int)
            inputs = [each.examples(numbers) for each in narrowed(shapes, entry.rank)]
            module, given = _OneByOne(body, inputs), inputs[0][:1]
    else:
        module = shape.bare()
    for parameter in module.parameters():
        parameter.normal_(std=0.02, generator=numbers)
    return module.eval(), given or shape.examples(numbers)


def _order(entry: Timing, shape: Any) -> int:
    """In how many blocks a body puts channels in order, to be timed: of 8 channels each.

    How many they will be depends on the weight; that is in the middle of what weights need.
    """
    assert entry.form is not None
    most = fit(entry.form, entry.shapes).places()
    return most // 8 if most % 8 == 0 else most


def _time(module: nn.Module, inputs: Tensor, device: torch.device) -> float:
    """Seconds of one call, from as many as take :data:`LEAST`."""
    calls = 1
    while True:
        start = now(device)
        for _ in range(calls):
            module(inputs)
        seconds = now(device) - start
        if seconds >= LEAST:
            return seconds / calls
        calls = max(2 * calls, int(1.2 * calls * LEAST / max(seconds, 1e-9)))


def now(*devices: torch.device) -> float:
    """What a clock shows, in seconds, once devices have done all that they were given."""
    for device in devices:
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
    return time.perf_counter()
