"""Data as people have them: texts, tensors in files, images, records, and batches with labels.

=====================  ==========================================================================
``text.txt``           cut into sequences by the tokenizer of the Hugging Face model
``records.jsonl``      one JSON object a line, whose ``text`` is taken
``x.npy``              rows of one array
``xy.npz``             arrays by name; ``y``, ``labels`` or ``targets`` are labels
``x.pt``               a tensor, or tensors by name; only weights are read, no code
``x.safetensors``      tensors by name
``images/``            a folder of images, or one folder for each class; needs pillow
``records/``           what ``datasets.Dataset.save_to_disk`` wrote; needs datasets
``file.py:function``   any iterable: batches, ``(inputs, labels)``, or records with a ``text``
=====================  ==========================================================================

Calibration needs no labels: they are left out where a model takes the inputs alone.
"""

from __future__ import annotations

import inspect
import itertools
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from operator import length_hint
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fxcompress.cli.code import call, is_code, reading
from fxcompress.cli.images import image_batches, is_image_folder
from fxcompress.cli.models import tokenizer_of
from fxcompress.errors import LoadError

if TYPE_CHECKING:
    from torch import Tensor, nn

LABELS = ("y", "labels", "label", "targets", "target")
TENSORS = (".npy", ".npz", ".pt", ".pth", ".safetensors")


@dataclass(frozen=True)
class Cut:
    """How files are cut into batches.

    Attributes:
        sequences: how many to cut from a text at most.
        length: tokens in each of them.
        rows: of a batch; None for 2 sequences, or 32 rows of anything else.
    """

    sequences: int = 64
    length: int = 512
    rows: int | None = None


def load_data(source: str | None, model: str, cut: Cut) -> Iterable[Any] | None:
    """Batches from a file or a folder, or whatever a function returns.

    Args:
        source: what ``--data`` says.
        model: what ``--model`` says, for its tokenizer.
        cut: how files are cut.
    """
    if source is None:
        return None
    path = Path(source)
    if path.is_dir():
        if is_image_folder(path):
            return image_batches(path, model, cut.rows or 32)
        return _records(_dataset(path), model, cut, source)
    if not path.is_file() or path.suffix == ".py" or is_code(source):
        made = call(source, "--data")
        return _records(made, model, cut, source) if _are_records(made) else made
    if path.suffix in TENSORS:
        return _tensors(path, model, cut.rows or 32)
    with reading(f"text from {source}"):
        text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        with reading(f"records from {source}"):
            records = [json.loads(line) for line in text.splitlines() if line.strip()]
        return _records(records, model, cut, source)
    return _sequences(text, model, cut, source)


def first_batch(batches: Iterable[Any]) -> Any:
    """The first batch; a bare tensor is told apart by whoever runs it."""
    with reading("a batch from --data"):
        for batch in batches:
            return batch
    raise typer.BadParameter("--data gives no batch")


class Inputs:
    """Batches of ``(inputs, labels)`` without the labels; as often as these can be gone through."""

    def __init__(self, batches: Iterable[Any]) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return (batch[0] for batch in self.batches)

    def __length_hint__(self) -> int:
        return length_hint(self.batches)


def without_labels(batches: Iterable[Any] | None, model: nn.Module) -> Any:
    """Batches as the model takes them: ``(inputs, labels)`` lose their labels.

    That is so where its ``forward`` takes a single argument.
    """
    from torch import Tensor

    if batches is None or isinstance(batches, (Tensor, Mapping, str)):
        return batches
    try:
        iterator = iter(batches)
    except TypeError:
        return batches
    first = next(iterator, None)
    again = batches if iterator is not batches else itertools.chain([first], iterator)
    if first is None:
        return batches
    return Inputs(again) if labels_of(first) is not None and _takes_one(model) else again


def labels_of(batch: Any) -> Tensor | None:
    """The labels of ``(inputs, labels)``: one number, or class, for every row."""
    from torch import Tensor

    pair = isinstance(batch, (tuple, list)) and len(batch) == 2
    if not pair or not all(isinstance(part, Tensor) and part.dim() for part in batch):
        return None
    labels: Tensor = batch[1]
    return labels if len(labels) == len(batch[0]) and labels.dim() <= 2 else None


def _takes_one(model: nn.Module) -> bool:
    """Whether a model cannot be called with two tensors."""
    try:
        inspect.signature(model.forward).bind(None, None)
    except TypeError:
        return True
    except ValueError:
        return False
    return False


def _are_records(made: Any) -> bool:
    first = made[0] if isinstance(made, (list, tuple)) and made else None
    return isinstance(first, Mapping) and isinstance(first.get("text"), str)


def _dataset(path: Path) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise typer.BadParameter(
            f"--data {path} is a folder without images; to read what datasets saved there, "
            "pip install datasets"
        ) from error
    with reading(f"records from {path}"):
        return datasets.load_from_disk(str(path))


def _records(records: Iterable[Any], model: str, cut: Cut, source: str) -> list[Any]:
    """Texts of records, joined and cut as one."""
    texts = []
    for number, record in enumerate(records):
        text = record.get("text") if isinstance(record, Mapping) else None
        if not isinstance(text, str):
            raise LoadError(f"record {number} of {source} has no 'text'; give batches instead")
        texts.append(text)
    return _sequences("\n\n".join(texts), model, cut, source)


def _sequences(text: str, model: str, cut: Cut, source: str) -> list[Any]:
    ids = tokenizer_of(model)(text, return_tensors="pt").input_ids[0]
    count = min(cut.sequences, len(ids) // cut.length)
    if count == 0:
        raise typer.BadParameter(
            f"{source} has {len(ids)} tokens, fewer than one sequence of {cut.length}: give more "
            f"text, or --length {max(1, len(ids) // 2)}"
        )
    if count < cut.sequences:
        told = f"{source} gives {count} sequences, not {cut.sequences}"
        typer.secho(told, err=True, fg="yellow")
    rows = ids[: count * cut.length].view(count, cut.length)
    return [{"input_ids": part} for part in rows.split(cut.rows or 2)]


def _tensors(path: Path, model: str, rows: int) -> list[Any]:
    with reading(f"tensors from {path}"):
        found = _read_tensors(path)
    named = {"x": found} if not isinstance(found, dict) else found
    import torch

    wrong = [name for name, each in named.items() if not isinstance(each, torch.Tensor)]
    if wrong or not named or len({len(each) for each in named.values() if each.dim()}) != 1:
        raise LoadError(
            f"{path} has to hold one tensor, or several by name with a row for every sample; "
            f"{f'{wrong[0]} is none' if wrong else 'their first extents differ'}"
        )
    labels = [name for name in named if name in LABELS]
    parts = {name: each.split(rows) for name, each in named.items()}
    inputs = [name for name in named if name not in labels]
    if len(inputs) != 1 or inputs[0] in ("input_ids", "pixel_values", "input_values"):
        return [dict(zip(parts, batch, strict=True)) for batch in zip(*parts.values(), strict=True)]
    only = inputs[0]
    if Path(model).is_dir():  # Hugging Face models take keywords
        name = "pixel_values" if named[only].is_floating_point() else "input_ids"
        return [{name: part} for part in parts[only]]
    if labels:
        return list(zip(parts[only], parts[labels[0]], strict=True))
    return list(parts[only])


def _read_tensors(path: Path) -> Any:
    import numpy as np
    import torch

    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    if path.suffix in (".pt", ".pth"):
        return torch.load(path, weights_only=True, map_location="cpu")
    loaded = np.load(path, allow_pickle=False)
    if path.suffix == ".npy":
        return _as_tensor(loaded)
    return {name: _as_tensor(loaded[name]) for name in loaded.files}


def _as_tensor(array: Any) -> Tensor:
    import numpy as np
    import torch

    # What numpy makes of Python's numbers is float64, and models are float32.
    return torch.from_numpy(array.astype(np.float32) if array.dtype == np.float64 else array)
