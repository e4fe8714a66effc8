"""Rounds on disk: what is needed to go on after the last one that was finished."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
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


@dataclass(frozen=True, eq=False)
class Saved:
    """Where a run stands.

    Attributes:
        round: the last one that is finished.
        objective: its value for these weights.
        scale: of the learning rate, after failures.
        cursor: batches used so far.
        records: of all rounds.
        weights: of every site, and its bias, by parameter name.
        removed: what thresholdings took from each weight.
        predicted: what that costs by the metric.
    """

    round: int
    objective: float | None
    scale: float
    cursor: int
    records: tuple[Round, ...]
    weights: dict[str, Tensor]
    removed: list[Tensor]
    predicted: float


def fingerprint(survey: Survey) -> str:
    """Of the rules and of the dense model: a run goes on with these only."""
    digest = hashlib.sha256(survey.rules.rules.model_dump_json().encode())
    for name, parameter in survey.model.named_parameters():
        total = float(parameter.detach().double().sum())
        digest.update(f"{name} {tuple(parameter.shape)} {total!r}".encode())
    return digest.hexdigest()


def write(directory: str | PathLike[str], mark: str, saved: Saved) -> None:
    """Write to a directory; what was there stays whole until this is."""
    folder = Path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    content: dict[str, Any] = {
        **vars(saved),
        "records": [record.model_dump() for record in saved.records],
        "format": FORMAT,
        "fingerprint": mark,
    }
    new = folder / f"{FILE}.new"
    torch.save(content, new)
    os.replace(new, folder / FILE)


def read(directory: str | PathLike[str], mark: str) -> Saved | None:
    """What was written; None if nothing was.

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
    content["records"] = tuple(Round(**record) for record in content["records"])
    return Saved(**content)
