"""Rounds on disk: what is needed to go on after the last one that was finished."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import partial
from os import PathLike
from pathlib import Path
from types import CellType, CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.errors import TrainingError
from fxcompress.pipeline.survey import Survey
from fxcompress.plans.plan import Round
from fxcompress.processes import digest_of

FORMAT = 2
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


def fingerprint(
    survey: Survey, batches: Sequence[Any], loss: Callable[..., Any] | None,
    forward: Callable[..., Any] | None,
) -> dict[str, str]:  # fmt: skip
    """What a run goes on with, or not at all: a digest of everything that it depends on.

    Of a function it is the name, the code, and the values that it was made with (defaults,
    closure, ``partial``); globals that it reads are not seen.
    """
    tensors = [survey.model.state_dict()]
    return {
        "rules": hashlib.sha256(survey.rules.rules.model_dump_json().encode()).hexdigest(),
        "model": digest_of(tensors),
        "calibration data": digest_of(batches),
        "loss": _code(loss),
        "forward": _code(forward),
    }


def _code(value: Any, above: tuple[int, ...] = ()) -> str:
    """Digest of a callable: its name and code, and the plain values that it was made with."""
    if value is None:
        return ""
    parts = None if id(value) in above else _parts(value)
    if parts is None:
        return digest_of([value])
    inner = [_code(part, (*above, id(value))) for part in parts]
    return hashlib.sha256(" ".join(inner).encode()).hexdigest()


def _parts(value: Any) -> list[Any] | None:
    """What tells a callable, or a part of one, from others; None if it is a plain value."""
    if isinstance(value, partial):
        return [value.func, *value.args, *sorted(value.keywords), *_sorted(value.keywords)]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    if isinstance(value, FunctionType):
        defaults = [*(value.__defaults__ or ()), *_sorted(value.__kwdefaults__ or {})]
        cells = [_content(cell) for cell in value.__closure__ or ()]
        return [value.__qualname__, value.__code__, *defaults, *cells]
    if isinstance(value, CodeType):
        return [value.co_code, " ".join(value.co_names), *value.co_consts]
    if isinstance(value, tuple):
        return [*value]
    if isinstance(value, frozenset):  # its order is another in every process
        return sorted(value, key=repr)
    if not callable(value):
        return None
    name = getattr(value, "__qualname__", None)
    if name is not None:  # a class, or not written in Python
        return [name]
    state = value.state_dict() if isinstance(value, nn.Module) else {}
    plain = {k: v for k, v in vars(value).items() if isinstance(v, PLAIN) and k != "training"}
    return [type(value).__qualname__, state, plain]


PLAIN = (bool, int, float, complex, str, bytes, type(None))


def _sorted(values: Mapping[str, Any]) -> list[Any]:
    return [values[name] for name in sorted(values)]


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not set yet
        return None


def write(
    directory: str | PathLike[str],
    mark: Mapping[str, str],
    standing: Standing,
    weights: Mapping[str, Tensor],
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
    content: dict[str, Any] = {each.name: getattr(standing, each.name) for each in FIELDS}
    content |= {
        "records": [record.model_dump() for record in standing.records],
        "removed": [*standing.removed],
        "estimated": dict(standing.estimated),
        "weights": dict(weights),
        "format": FORMAT,
        "fingerprint": dict(mark),
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


def read(
    directory: str | PathLike[str], mark: Mapping[str, str]
) -> tuple[Standing, dict[str, Tensor]] | None:
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
    if not isinstance(content, dict) or content.pop("format", None) != FORMAT:
        raise TrainingError(
            f"{file} was written by another version of fxcompress: delete it to start over"
        )
    other = content.pop("fingerprint")
    if differing := [name for name, digest in mark.items() if other.get(name) != digest]:
        raise TrainingError(
            f"{file} is of another run: its {', '.join(differing)} differ. Delete it to start "
            "over, or give another checkpoint directory"
        )
    weights = content.pop("weights")
    content["records"] = tuple(Round(**record) for record in content["records"])
    return Standing(**content), weights
