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

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError
from fxcompress.graph.padding import Padding
from fxcompress.metric.output import (
    VALUES,
    Head,
    Loss,
    OutputKind,
    described,
    heads,
    per_prediction,
)
from fxcompress.metric.scaled import largest, times_power

FisherKind = Literal["sampled", "exact", "empirical"]

MOST_COLUMNS = 128
"""Columns that ``exact`` goes through at most: each of them is a backward pass."""

MOST_WIDE = 1 << 24
"""Numbers of an output that are looked at in float64 at most (128 MiB)."""

SUREST = 2.0**-400
"""Gradients at the output below this are none: the model is sure of everything."""

IGNORED = -100
"""A label that is none, as torch and Hugging Face have it."""


@dataclass(frozen=True, eq=False)
class Start:
    """Where one backward pass starts.

    Attributes:
        tensors: parts of the model's output.
        scaled: gradients with respect to each, of the same shape, over ``2^exponent``: those of a
            model that is sure of everything would be lost on the way otherwise.
        exponent: of two.
    """

    tensors: tuple[Tensor, ...]
    scaled: tuple[Tensor, ...]
    exponent: int = 0

    @property
    def gradients(self) -> tuple[Tensor, ...]:
        """With respect to each of the tensors."""
        return tuple(times_power(each, self.exponent) for each in self.scaled)

    @classmethod
    def of(cls, heads: Sequence[Head], rows: Sequence[Tensor]) -> Start:
        """From gradients of the rows of every head."""
        peak = max(map(largest, rows), default=0.0)
        exponent = math.frexp(peak)[1] if SUREST < peak < 0.25 else 0
        pairs = zip(heads, (times_power(each, -exponent) for each in rows), strict=True)
        scaled = [head.like(each) for head, each in pairs]
        if peak <= SUREST:
            scaled = [torch.zeros_like(each) for each in scaled]
        return cls(tuple(head.tensor for head in heads), tuple(scaled), exponent)


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
    name = described(found, kind)
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
        gradients.append(rows)
        counts.append(rows[..., 0].numel() if real is None else int(real.sum()))
    return Starts([Start.of(found, gradients)], max(counts), name)


def _sampled(head: Head, real: Tensor | None, generator: torch.Generator) -> Tensor:
    """Gradients of rows (..., C) for labels drawn from the model, zero where nothing is real."""
    if real is not None:  # by themselves: the others may hold anything
        rows = torch.zeros_like(_wide(head))
        if bool(real.any()):
            some = replace(head, tensor=head.rows(head.tensor.detach())[real])
            rows[real] = _sampled(some, None, generator).to(rows.dtype)
        return rows
    f = head.rows(head.tensor.detach().float())
    if head.family == "gaussian":
        # -log N(y; f, I) with y ~ N(f, I): the gradient at f is f - y, standard normal.
        drawn = torch.randn(f.shape, generator=generator, device=f.device, dtype=f.dtype)
        return drawn / (head.scale or 1.0)
    if head.family == "bernoulli":
        return _bernoulli(head, torch.bernoulli(f.sigmoid(), generator=generator))
    flat = f.softmax(-1).reshape(-1, f.shape[-1])
    labels = torch.multinomial(flat, 1, generator=generator)
    del flat  # as large as a vocabulary
    return _categorical(head, labels)


def _wide(head: Head) -> Tensor:
    """Rows in float64, so that probabilities of 1e-300 are none of 0; of many in float32."""
    narrow = head.tensor.numel() > MOST_WIDE and head.tensor.dtype != torch.float64
    return head.rows(head.tensor.detach().to(torch.float32 if narrow else torch.float64))


def _categorical(head: Head, labels: Tensor) -> Tensor:
    """``p - onehot(y)`` of rows (..., C) for labels y (rows x 1), exact where p is nearly 1."""
    f = _wide(head)
    p = f.softmax(-1).reshape(-1, f.shape[-1])
    p.scatter_(1, labels, 0.0)
    p.scatter_(1, labels, -p.sum(1, keepdim=True))
    return p.reshape(f.shape)


def _bernoulli(head: Head, given: Tensor) -> Tensor:
    """``p - y`` of rows (..., D) for y in [0, 1], exact where p is nearly y."""
    f = _wide(head)
    y = given.to(f.dtype)
    return (1 - y) * f.sigmoid() - y * (-f).sigmoid()


def _exact(head: Head, mask: Padding, generator: torch.Generator) -> list[Start]:
    """One pass for each column of a root of the Hessian."""
    f = _wide(head)
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
            rows[..., column] = 0.0
            rows[..., column] = -rows.sum(-1)  # (1 - p) √p
        elif head.family == "bernoulli":
            logit = f[..., column]
            rows[..., column] = (logit.sigmoid() * (-logit).sigmoid()).sqrt()
        else:
            rows[..., column] = 1.0 / (head.scale or 1.0)
        if several:
            coin = torch.rand(f.shape[:-1], generator=generator, device=f.device)
            rows = rows * ((coin < 0.5).to(rows.dtype) * 2 - 1)[..., None]
        if real is not None:
            rows = rows.masked_fill(~real[..., None], 0)
        starts.append(Start.of([head], [rows]))
    return starts


def _empirical(head: Head, batch: Any, mask: Padding, outputs: int) -> tuple[Tensor, Tensor | None]:
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
        return _bernoulli(head, given) if head.family == "bernoulli" else f - given, real
    if labels.shape != f.shape[:-1]:
        raise CalibrationError(_misfit(labels, head))
    if _is_causal(batch, labels):
        # A language model predicts the next token; Hugging Face shifts labels inside its loss.
        shifted = torch.full_like(labels, IGNORED)
        shifted[:, :-1] = labels[:, 1:]
        labels = shifted
    known = labels != IGNORED
    real = known if real is None else known & real
    return _categorical(head, labels.clamp_min(0).reshape(-1, 1)), real


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
    real = mask.real(value, VALUES, dims=0)
    if not bool((value if real is None else value[real]).isfinite().all()):
        raise CalibrationError("loss(output, batch) returned NaN or infinite values")
    counted = torch.ones_like(value)
    if real is not None:
        counted = counted.masked_fill(~real, 0)
    return Starts([Start((value,), (counted,))], int(counted.sum()), "loss")
