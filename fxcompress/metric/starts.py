"""Where backward passes start, so that the squares of what they return add up to the Fisher.

The Fisher metric needs ``F = E[∇log p(y|x) ∇log p(y|x)ᵀ]``.  Three ways to take the mean over y:

* ``sampled``: y drawn from the model itself, once for every prediction.  Unbiased, one pass.
* ``exact``: the mean itself.  At the output it is the Hessian H of the negative log-likelihood;
  with ``H = L Lᵀ`` one backward pass from each column of L (one a class) gives gradients whose
  squares add up to F.  Where a sample makes several predictions (tokens, pixels) their columns get
  independent random signs, without which they would interfere: then it is unbiased, and exact with
  one prediction a sample.
* ``empirical``: y from the data.  Another matrix: it is not the Fisher, and near a fitted model it
  says little about the KL divergence (Kunstner et al., arXiv 1905.12558).

A user's own loss is the negative log-likelihood of the data's labels: empirical, too.

For each family the gradient at the output is known in closed form, so no loss graph is built.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError
from fxcompress.graph.padding import Padding
from fxcompress.metric.output import Head, Loss, OutputKind, heads, per_prediction

FisherKind = Literal["sampled", "exact", "empirical"]

MOST_COLUMNS = 128
"""Columns that ``exact`` goes through at most: each of them is a backward pass."""

IGNORED = -100
"""A label that is none, as torch and Hugging Face have it."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where one backward pass starts.

    Attributes:
        tensors: parts of the model's output.
        gradients: with respect to each, of the same shape.
    """

    tensors: tuple[Tensor, ...]
    gradients: tuple[Tensor, ...]


@dataclass(frozen=True, eq=False)
class Starts:
    """All backward passes of one batch.

    Attributes:
        passes: one after the other; their squares add up.
        predictions: how many predictions the batch holds (tokens, images, ...).
        kind: the families that were used, ``"loss"`` for a user's loss.
    """

    passes: Sequence[Start]
    predictions: int
    kind: str


def backward_starts(
    output: Any,
    batch: Any,
    *,
    kind: OutputKind,
    fisher: FisherKind,
    loss: Loss | None,
    mask: Padding,
    generator: torch.Generator,
) -> Starts:
    """The backward passes whose squared gradients add up to the Fisher of a batch.

    Args:
        output: what the model returned.
        batch: what it was given; has the labels for ``empirical``.
        kind: the families of the outputs.
        fisher: how the mean over labels is taken.
        loss: the user's own negative log-likelihood, which replaces both.
        mask: what is padding in the output; it makes no prediction.
        generator: the source of labels and signs.

    Raises:
        CalibrationError: no predictions, or none that is finite, or none that leaves a choice;
            labels that are missing or do not fit; a loss that cannot be used.
    """
    if loss is not None:
        return _from_loss(output, batch, loss, mask)
    found = heads(output, kind, mask)
    named = isinstance(kind, Mapping)
    words = (f"{head.name} {head.family}" if named else head.family for head in found)
    name = ", ".join(dict.fromkeys(words))
    if fisher == "exact":
        passes = [start for head in found for start in _exact(head, mask, generator)]
        return Starts(passes, max(head.predictions(mask) for head in found), name)
    counts, gradients = [], []
    for head in found:
        if fisher == "sampled":
            real = head.real(mask)
            rows = _sampled(head, real, generator)
        else:
            rows, real = _empirical(head, batch, mask, len(found))
            if real is not None:
                rows = rows.masked_fill(~real[..., None], 0)
        gradients.append(head.like(rows))
        counts.append(rows[..., 0].numel() if real is None else int(real.sum()))
    start = Start(tuple(head.tensor for head in found), tuple(gradients))
    return Starts([start], max(counts), name)


def _sampled(head: Head, real: Tensor | None, generator: torch.Generator) -> Tensor:
    """Gradients of rows (..., C) for labels drawn from the model, zero where there are none."""
    f = head.rows(head.tensor.detach().float())
    if real is None:
        return _drawn(head, f, generator)
    rows = torch.zeros_like(f)
    rows[real] = _drawn(head, f[real], generator)
    return rows


def _drawn(head: Head, f: Tensor, generator: torch.Generator) -> Tensor:
    if head.family == "gaussian":
        # -log N(y; f, I) with y ~ N(f, I): the gradient at f is f - y, standard normal.
        return torch.randn(f.shape, generator=generator, device=f.device, dtype=f.dtype)
    if head.family == "bernoulli":
        p = f.sigmoid()
        return p - torch.bernoulli(p, generator=generator)
    p = f.softmax(-1)
    flat = p.reshape(-1, p.shape[-1])
    labels = torch.multinomial(flat, 1, generator=generator)
    flat.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=flat.dtype))
    return flat.reshape(p.shape)


def _exact(head: Head, mask: Padding, generator: torch.Generator) -> list[Start]:
    """One pass for each column of a root of the Hessian."""
    f = head.rows(head.tensor.detach().float())
    columns = f.shape[-1]
    if columns > MOST_COLUMNS:
        raise CalibrationError(
            f"fisher: exact takes one backward pass for each of the {columns} classes or values of "
            f"an output, and {MOST_COLUMNS} are the most; choose fisher: sampled"
        )
    several = f.dim() > 2
    real = head.real(mask)
    starts = []
    for column in range(columns):
        rows = torch.zeros_like(f)
        if head.family == "categorical":
            # L = diag(√p) - p √pᵀ: L Lᵀ = diag(p) - p pᵀ.
            p = f.softmax(-1)
            root = p[..., column : column + 1].sqrt()
            rows = -p * root
            rows[..., column] += root[..., 0]
        elif head.family == "bernoulli":
            p = f[..., column].sigmoid()
            rows[..., column] = (p * (1 - p)).sqrt()
        else:
            rows[..., column] = 1.0
        if several:
            coin = torch.rand(f.shape[:-1], generator=generator, device=f.device)
            rows = rows * ((coin < 0.5).to(rows.dtype) * 2 - 1)[..., None]
        if real is not None:
            rows = rows.masked_fill(~real[..., None], 0)
        starts.append(Start((head.tensor,), (head.like(rows),)))
    return starts


def _empirical(
    head: Head, batch: Any, mask: Padding, outputs: int
) -> tuple[Tensor, Tensor | None]:
    """Gradients of rows for the labels of the data, and which rows have one."""
    labels = batch.get("labels") if isinstance(batch, Mapping) else None
    if not isinstance(labels, Tensor) or outputs > 1:
        raise CalibrationError(
            "fisher: empirical takes the labels of one output from batch['labels'], and there are "
            "none; pass loss=lambda output, batch: ... (one negative log-likelihood per "
            "prediction), or choose fisher: sampled, which needs no labels"
        )
    f = head.rows(head.tensor.detach().float())
    labels = labels.to(f.device)
    real = head.real(mask)
    if head.family != "categorical":
        given = head.rows(labels.to(f.dtype)) if labels.dim() == head.tensor.dim() else labels
        if given.shape != f.shape:
            raise CalibrationError(_misfit(labels, head))
        return (f.sigmoid() if head.family == "bernoulli" else f) - given, real
    if labels.shape != f.shape[:-1]:
        raise CalibrationError(_misfit(labels, head))
    if _is_causal(batch, labels):
        # A language model predicts the next token; Hugging Face shifts labels inside its loss.
        shifted = torch.full_like(labels, IGNORED)
        shifted[:, :-1] = labels[:, 1:]
        labels = shifted
    known = labels != IGNORED
    real = known if real is None else known & real
    rows = f.softmax(-1)
    flat = rows.reshape(-1, rows.shape[-1])
    at = labels.clamp_min(0).reshape(-1, 1)
    flat.scatter_add_(1, at, torch.full_like(at, -1, dtype=flat.dtype))
    return flat.reshape(rows.shape), real


def _is_causal(batch: Mapping[str, Any], labels: Tensor) -> bool:
    """Labels that repeat the input are those of a causal language model."""
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.shape != labels.shape:
        return False
    known = labels != IGNORED
    return bool(known.any()) and bool((ids.to(labels.device) == labels)[known].all())


def _misfit(labels: Tensor, head: Head) -> str:
    return (
        f"batch['labels'] has shape {tuple(labels.shape)}, which does not fit the {head.family} "
        f"output of shape {tuple(head.tensor.shape)}; pass loss=lambda output, batch: ..."
    )


def _from_loss(output: Any, batch: Any, loss: Loss, mask: Padding) -> Starts:
    """Start from the user's own loss; values at padding are left out.

    Raises:
        CalibrationError: the loss fails, is reduced to a scalar, not finite, or not
            differentiable.
    """
    value = per_prediction(loss, output, batch)
    if not value.requires_grad:
        raise CalibrationError(
            "loss(output, batch) returned a tensor without a gradient: it has to be computed "
            "from the output, without detach(), argmax() or no_grad()"
        )
    real = mask.real(value, "the values of loss(output, batch)", dims=0)
    if not bool((value if real is None else value[real]).isfinite().all()):
        raise CalibrationError("loss(output, batch) returned NaN or infinite values")
    counted = torch.ones_like(value)
    if real is not None:
        counted = counted.masked_fill(~real, 0)
    return Starts([Start((value,), (counted,))], int(counted.sum()), "loss")
