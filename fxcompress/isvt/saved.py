"""Rounds on disk: what is needed to go on after the last one that was finished."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fxcompress.analysis import Survey
from fxcompress.errors import TrainingError
from fxcompress.plan import Round

FORMAT = 1
FILE = "rounds.pt"


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
    """

    round: int = 0
    objective: float | None = None
    scale: float = 1.0
    cursor: int = 0
    removed: Sequence[Tensor] = ()
    predicted: float = 0.0
    records: tuple[Round, ...] = ()


FIELDS = fields(Standing)


def fingerprint(survey: Survey) -> str:
    """Of the rules and of the dense model: a run goes on with these only."""
    digest = hashlib.sha256(survey.rules.rules.model_dump_json().encode())
    for name, parameter in survey.model.named_parameters():
        total = float(parameter.detach().double().sum())
        digest.update(f"{name} {tuple(parameter.shape)} {total!r}".encode())
    return digest.hexdigest()


def write(
    directory: str | PathLike[str], mark: str, standing: Standing, weights: Mapping[str, Tensor]
) -> None:
    """Write to a directory; what was there stays whole until this is, whoever else writes there.

    Args:
        directory: made if it is missing.
        mark: the :func:`fingerprint` of the run.
        standing: of the run.
        weights: of every site, and its bias, by parameter name.
    """
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {field.name: getattr(standing, field.name) for field in FIELDS}
    content |= {
        "records": [record.model_dump() for record in standing.records],
        "removed": [*standing.removed],
        "weights": dict(weights),
        "format": FORMAT,
        "fingerprint": mark,
    }
    # A name of its own: other processes (ranks, jobs) may write to this directory meanwhile.
    new = folder / f"{FILE}.{uuid.uuid4().hex}.new"
    try:
        with new.open("xb") as stream:
            torch.save(content, stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(new, folder / FILE)
    except BaseException:
        new.unlink(missing_ok=True)
        raise


def read(directory: str | PathLike[str], mark: str) -> tuple[Standing, dict[str, Tensor]] | None:
    """What was written, the weights beside; None if nothing was.

    Raises:
        TrainingError: it belongs to other rules or another model, or cannot be read.
    """
    file = Path(directory) / FILE
    if not file.exists():
        return None
    try:
        content = torch.load(file, weights_only=True)
    except Exception as error:
        raise TrainingError(f"{file} cannot be read ({error}): delete it to start over") from error
    if content.pop("format", None) != FORMAT or content.pop("fingerprint", None) != mark:
        raise TrainingError(
            f"{file} is of another run: its rules or its model differ. Delete it to start over, "
            "or give another checkpoint directory"
        )
    weights = content.pop("weights")
    content["records"] = tuple(Round(**record) for record in content["records"])
    return Standing(**content), weights
