"""Progress of the stages, on stderr.

On a terminal, a bar for the running stage; the finished ones stay above it::

    record      ━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━━       1.2 s
    calibrate   ━━━━━━━━━━━━━━━╺━━━━━━━━━━━━━━━━━━━━━━━━ 6/16 35.1 s  0:00:57 left

In notebooks, and elsewhere if it is asked for, a line for each finished stage::

    record  1.2 s
    calibrate  16/16  93.2 s
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from time import perf_counter
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, ProgressColumn, Task, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress
from rich.text import Text

from fxcompress.notebook import in_notebook

Tick = Callable[[], None]


class Progress(Protocol):
    """What the pipeline reports its progress to."""

    @property
    def seconds(self) -> dict[str, float]:
        """Time spent per stage so far, the running one included; equal names are summed."""

    def stage(self, name: str, total: int | None = None) -> Tick:
        """Start a stage, which ends the one before.

        Args:
            name: ``"calibrate"``.
            total: number of units of work, None if it is not known.

        Returns:
            A function to call when one unit is done.
        """


@contextmanager
def stages(enabled: bool | None = None) -> Iterator[Progress]:
    """Show the stages of a computation; whatever ends it, nothing stays half-drawn.

    >>> with stages(enabled=False) as progress:
    ...     tick = progress.stage("calibrate", total=16)
    ...     for batch in range(16):
    ...         tick()
    >>> list(progress.seconds)
    ['calibrate']

    Args:
        enabled: False for silence; True to show something even where stderr is no terminal;
            None to show bars on a terminal, lines in a notebook, and nothing elsewhere.
    """
    terminal = sys.stderr is not None and sys.stderr.isatty()
    view: _View
    if enabled is None:
        enabled = terminal or in_notebook()
    if not enabled or sys.stderr is None:
        view = _Silent()
    elif terminal:
        view = _Bars()
    else:
        view = _Lines()
    running = _Stages(view)
    view.open()
    try:
        yield running
        running.end()
    except BaseException:
        running.abandon()
        raise
    finally:
        view.close()


@dataclass
class _Stage:
    name: str
    total: int | None
    started: float
    done: int = 0

    @property
    def count(self) -> str:
        """``6/16``, ``6`` without a total, nothing if the stage is one piece."""
        if self.total is not None:
            return f"{self.done}/{self.total}"
        return str(self.done) if self.done > 1 else ""


class _View(Protocol):
    """How stages are shown."""

    def open(self) -> None: ...
    def begin(self, stage: _Stage) -> None: ...
    def advance(self, stage: _Stage) -> None: ...
    def finish(self, stage: _Stage, seconds: float) -> None: ...
    def abandon(self, stage: _Stage) -> None: ...
    def close(self) -> None: ...


@dataclass
class _Stages:
    view: _View
    finished: dict[str, float] = field(default_factory=dict)
    current: _Stage | None = None

    @property
    def seconds(self) -> dict[str, float]:
        seconds = dict(self.finished)
        if self.current is not None:
            name = self.current.name
            seconds[name] = seconds.get(name, 0.0) + perf_counter() - self.current.started
        return seconds

    def stage(self, name: str, total: int | None = None) -> Tick:
        self.end()
        stage = self.current = _Stage(name, total, perf_counter())
        self.view.begin(stage)

        def tick() -> None:
            # A stage that has ended is no longer drawn: late ticks must not disturb the next.
            if stage is self.current:
                stage.done += 1
                self.view.advance(stage)

        return tick

    def end(self) -> None:
        """End the running stage, if there is one, as finished."""
        stage = self.current
        if stage is not None:
            self.view.finish(stage, self._leave(stage))

    def abandon(self) -> None:
        """End the running stage, if there is one, as broken off; its time still counts."""
        stage = self.current
        if stage is not None:
            self._leave(stage)
            self.view.abandon(stage)

    def _leave(self, stage: _Stage) -> float:
        seconds = perf_counter() - stage.started
        self.finished[stage.name] = self.finished.get(stage.name, 0.0) + seconds
        self.current = None
        return seconds


class _Silent:
    def open(self) -> None:
        pass

    def begin(self, stage: _Stage) -> None:
        pass

    def advance(self, stage: _Stage) -> None:
        pass

    def finish(self, stage: _Stage, seconds: float) -> None:
        pass

    def abandon(self, stage: _Stage) -> None:
        pass

    def close(self) -> None:
        pass


class _Lines(_Silent):
    """A line per finished stage, for log files."""

    def finish(self, stage: _Stage, seconds: float) -> None:
        parts = [stage.name, stage.count, f"{seconds:.1f} s"]
        print("  ".join(part for part in parts if part), file=sys.stderr, flush=True)


class _Elapsed(ProgressColumn):
    """``93.2 s``, as in the lines."""

    def render(self, task: Task) -> Text:
        seconds = task.finished_time if task.finished else task.elapsed
        return Text(f"{seconds or 0.0:.1f} s", justify="right")


class _Remaining(TimeRemainingColumn):
    """``0:00:57 left`` while there is an estimate and something left."""

    def render(self, task: Task) -> Text:
        if task.finished or task.time_remaining is None:
            return Text("")
        return super().render(task) + Text(" left")


class _Memory(ProgressColumn):
    """``1.4 GB``, what the process holds, where the system tells."""

    def render(self, task: Task) -> Text:
        held = _resident()
        return Text("" if task.finished or held is None else f"{held / 1e9:.1f} GB", "dim")


def _resident() -> int | None:
    """Bytes of memory that the process holds; None where Linux's ``/proc`` is missing."""
    try:
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError, IndexError):
        return None


class _Bars:
    """Bars on a terminal."""

    def __init__(self) -> None:
        self.live = RichProgress(
            TextColumn("{task.description:<11}", markup=False),
            BarColumn(),
            TextColumn("{task.fields[count]}", markup=False, justify="right"),
            _Elapsed(),
            _Remaining(),
            _Memory(),
            console=Console(stderr=True),
            # Slow enough not to take time from the work it reports on.
            refresh_per_second=4,
        )
        self.task = TaskID(0)

    def open(self) -> None:
        self.live.start()

    def begin(self, stage: _Stage) -> None:
        self.task = self.live.add_task(stage.name, total=stage.total, count=stage.count)

    def advance(self, stage: _Stage) -> None:
        self.live.update(self.task, completed=stage.done, count=stage.count)

    def finish(self, stage: _Stage, seconds: float) -> None:
        # The bar ends full, even if the work needed fewer units than announced; the count says.
        done = max(stage.done, 1)
        self.live.update(self.task, total=done, completed=done, count=stage.count)

    def abandon(self, stage: _Stage) -> None:
        self.live.remove_task(self.task)

    def close(self) -> None:
        self.live.stop()
