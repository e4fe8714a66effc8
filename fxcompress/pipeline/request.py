"""What a caller gives beside the model and the rules; the stages hand it on as one value."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from os import PathLike
from typing import Any

from fxcompress.collective import ALONE, Processes
from fxcompress.graph.inputs import Forward
from fxcompress.metric import Loss
from fxcompress.progress import Progress


@dataclass(frozen=True, eq=False)
class Request:
    """Data, functions of the user's, and where to tell what happens.

    Attributes:
        show: progress of the stages.
        calibration: batches, gone through once; None without data.
        examples: batches to record the graph on; None for the first of ``calibration``.
        loss: ``loss(output, batch)``, one negative log-likelihood per prediction; None for labels
            that are drawn from the model's own output.
        forward: ``forward(model, batch)``; None to call the model with the batch.
        checkpoint: directory for what was found out so far; None to keep nothing.
        notes: what the user should know, in the order in which it was found.
        processes: that work on the same model together.
    """

    show: Progress
    calibration: Iterable[Any] | None = None
    examples: Sequence[Any] | None = None
    loss: Loss | None = None
    forward: Forward | None = None
    checkpoint: str | PathLike[str] | None = None
    notes: Notes = field(default_factory=lambda: Notes())
    processes: Processes = ALONE


class Notes:
    """Remarks that are gathered while the stages run, each once."""

    def __init__(self) -> None:
        self._found: dict[str, None] = {}

    def add(self, *notes: str) -> None:
        """Add those that are new."""
        self._found.update(dict.fromkeys(notes))

    def share(self, processes: Processes) -> None:
        """Take those of all processes, in the same order everywhere."""
        found = processes.gathered(self.all)
        self._found = dict.fromkeys(note for notes in found for note in notes)

    @property
    def all(self) -> tuple[str, ...]:
        """Every note, the first one first."""
        return tuple(self._found)
