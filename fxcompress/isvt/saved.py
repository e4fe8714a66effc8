"""Rounds on disk: what is needed to go on after the last one that was finished."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import Tensor

from fxcompress.checkpoint import Checkpoint
from fxcompress.plans.plan import Round

FILE = "rounds"


@dataclass(frozen=True, eq=False, kw_only=True)
class Standing:
    """Where a run stands, beside its weights.

    Attributes:
        round: the last one that is finished.
        objective: its value for the weights as they are; None before the first round.
        scale: of the learning rate, after failures.
        cursor: batches used so far.
        removed: what thresholdings took from each weight, as stored, in the order of the sites.
        predicted: what that costs by the metric.
        records: of all attempts.
        estimated: weights and biases of the sites that the metric was last estimated at, by
            parameter name; none for those of the dense model.
    """

    round: int = 0
    objective: float | None = None
    scale: float = 1.0
    cursor: int = 0
    removed: Sequence[Tensor] = ()
    predicted: float = 0.0
    records: tuple[Round, ...] = ()
    estimated: Mapping[str, Tensor] = field(default_factory=dict)


FIELDS = fields(Standing)


def write(checkpoint: Checkpoint, standing: Standing, weights: Mapping[str, Tensor]) -> None:
    """Write where a run stands.

    Args:
        checkpoint: of the run.
        standing: what is written.
        weights: of every site, and its bias, by parameter name.
    """
    content: dict[str, Any] = {each.name: getattr(standing, each.name) for each in FIELDS}
    content |= {
        "records": [record.model_dump() for record in standing.records],
        "removed": [*standing.removed],
        "estimated": dict(standing.estimated),
        "weights": dict(weights),
    }
    checkpoint.write(FILE, content)


def read(checkpoint: Checkpoint) -> tuple[Standing, dict[str, Tensor]] | None:
    """What was written, the weights beside; None if nothing was.

    Raises:
        CheckpointError: it belongs to other rules or another model, or cannot be read.
    """
    content = checkpoint.read(FILE)
    if content is None:
        return None
    weights = content.pop("weights")
    content["records"] = tuple(Round(**record) for record in content["records"])
    return Standing(**content), weights
