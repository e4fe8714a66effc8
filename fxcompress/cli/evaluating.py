"""What a model is worth on data that it was not fitted to: perplexity, or accuracy."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from fxcompress.cli.data import labels_of
from fxcompress.errors import CalibrationError

if TYPE_CHECKING:
    from torch import Tensor, nn


def evaluate(model: nn.Module, batches: Iterable[Any]) -> dict[str, float]:
    """``{"perplexity": ...}`` of a language model, ``{"accuracy": ...}`` where there are classes.

    Perplexity is e to the mean negative log-likelihood of every token but the first of a sequence;
    padding (``attention_mask``) does not count.

    Args:
        model: in eval mode afterwards as before.
        batches: mappings with ``input_ids``, or with one class for every row under ``labels``; or
            ``(inputs, labels)``.

    Raises:
        CalibrationError: there is neither text nor are there classes.
    """
    import torch

    total, count, name = 0.0, 0, ""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            for batch in batches:
                name, gained, counted = _one(model, batch)
                total, count = total + gained, count + counted
    finally:
        model.train(training)
    if not count:
        raise CalibrationError("there is nothing to evaluate on: no batches, or nothing in them")
    mean = total / count
    return {name: mean if name == "accuracy" else math.exp(mean) if mean < 700 else math.inf}


def _one(model: nn.Module, batch: Any) -> tuple[str, float, int]:
    """Which figure a batch gives, its sum, and over how many predictions."""
    import torch.nn.functional as F

    from fxcompress.graph.inputs import run_model

    labels = batch.get("labels") if isinstance(batch, Mapping) else labels_of(batch)
    inputs = batch if isinstance(batch, Mapping) else batch[0] if labels is not None else batch
    output = run_model(model, inputs)
    logits: Tensor | None = output if hasattr(output, "shape") else getattr(output, "logits", None)
    if labels is not None and logits is not None and logits.dim() == labels.dim() + 1 == 2:
        hits = logits.argmax(1) == labels.to(logits.device)
        return "accuracy", float(hits.sum()), len(labels)
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if ids is None or logits is None or logits.dim() != 3 or logits.shape[:2] != ids.shape:
        raise CalibrationError(
            "--evaluate knows language models (input_ids, and logits for every token) and "
            "classifiers ((inputs, classes)); for another figure: fxcompress sweep --evaluate "
            "file.py:function"
        )
    target = ids[:, 1:].to(logits.device)
    mask = batch.get("attention_mask")
    if mask is not None:
        target = target.masked_fill(mask[:, 1:].to(target.device) == 0, -100)
    scores = logits[:, :-1].float().flatten(0, 1)
    loss = F.cross_entropy(scores, target.flatten(), ignore_index=-100, reduction="sum")
    return "perplexity", float(loss), int((target != -100).sum())
