"""The output distribution of a model: which tensors are predictions, and of what family.

=============  =========================================  ==========================
family         output f, shape                            log p(y|f)
=============  =========================================  ==========================
categorical    logits (..., C), images (batch, C, ...)    log softmax(f)_y
bernoulli      logits of yes (..., D), independent        Σ_d log sigmoid(±f_d)
gaussian       values (..., D), unit variance             -½ ‖y - f‖²
=============  =========================================  ==========================

A *prediction* is one such row.  A model with several outputs predicts all of them, independently
of one another: the divergences add up, and so do the Fishers.

``auto`` counts every floating-point tensor that a model returns, by name or place:

* Names with ``logit``, ``class`` or ``cls`` are categorical (Bernoulli with one class beside other
  outputs); if there are none, the first tensor whose name is not one of values (embeddings, hidden
  states, boxes, ...).  All others are Gaussian.
* What a model shows of its inside does not count: losses, hidden states of single layers, attention
  weights, caches; nor what is nested in lists, nor ``last_hidden_state`` where there are logits.
* Of several outputs a Gaussian one is taken in units of its own root mean square: pixels and
  shares of an image weigh alike beside logits.  A single one, or a declared one, has unit variance.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fxcompress.errors import CalibrationError
from fxcompress.graph.padding import NONE, Padding

Family = Literal["categorical", "bernoulli", "gaussian"]

OutputKind = Literal["auto", "categorical", "bernoulli", "gaussian"] | Mapping[str, Family]
"""A family, or the families of several outputs by name (``"logits"``) or place (``"0"``)."""

Loss = Callable[[Any, Any], Tensor]
"""``loss(output, batch)``: the negative log-likelihood of every prediction, unreduced."""

_LOGITS = ("logits", "prediction_logits", "logits_per_image")
_VALUES = ("last_hidden_state", "image_embeds", "text_embeds", "pooler_output")
_SPANS = ("start_logits", "end_logits")


class NotFinite(CalibrationError):
    """Outputs that are NaN or infinite: training tells it from all other errors."""


@dataclass(frozen=True, eq=False)
class Head:
    """One tensor of predictions.

    Attributes:
        name: field of the output, or its place in a tuple; empty for a plain tensor.
        tensor: as the model returned it.
        family: what it means.
        scale: standard deviation of a Gaussian; None for 1.
    """

    name: str
    tensor: Tensor
    family: Family
    scale: float | None = None

    @property
    def classes(self) -> int:
        """The dimension of classes or values: 1 of images (batch, C, ...), else the last."""
        return 1 if self.family == "categorical" and self.tensor.dim() >= 4 else -1

    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor of its shape as (..., C); one number a sample as (batch, 1)."""
        if tensor.dim() == 1:
            return tensor[:, None]
        return tensor.movedim(self.classes, -1)

    def like(self, rows: Tensor) -> Tensor:
        """The inverse of :meth:`rows`, in the tensor's type."""
        if self.tensor.dim() == 1:
            return rows[:, 0].to(self.tensor.dtype)
        return rows.movedim(-1, self.classes).to(self.tensor.dtype)

    def real(self, mask: Padding) -> Tensor | None:
        """Which rows count (...): those that are not padding; None for all.

        Raises:
            CalibrationError: which of them are padding could not be followed.
        """
        return mask.real(self.rows(self.tensor), f"the model's output {self.name}".rstrip())

    def predictions(self, mask: Padding) -> int:
        """How many rows count."""
        real = self.real(mask)
        rows = self.rows(self.tensor)
        return rows[..., 0].numel() if real is None else int(real.sum())


def heads(output: Any, kind: OutputKind = "auto", mask: Padding = NONE) -> list[Head]:
    """The tensors that carry a model's predictions.

    ``auto`` takes all of them, as said above; a plain tensor, or the first tensor of a tuple, for
    logits: declare ``metric: {output: gaussian}`` for a regression, and ``{output: {"0":
    categorical, "1": gaussian}}`` for several outputs.  A single family is that of the main output:
    the logits, else ``last_hidden_state`` or an embedding, else the first tensor.

    Raises:
        CalibrationError: no floating-point tensor is to be found, or not the one that was
            declared; values that are not finite; or what the family makes no sense of.
    """
    found = _heads(output, kind, mask)
    for head in found:
        _require_sense(head, head.real(mask))
    return found


def _heads(output: Any, kind: OutputKind, mask: Padding) -> list[Head]:
    """As :func:`heads`; their values are not judged."""
    if isinstance(kind, Mapping):
        found = _declared(output, kind)
    else:
        found = _seen(output, mask) if kind == "auto" else _main(output, kind)
    if not found:
        raise CalibrationError(
            f"no predictions found in the model's output of type {type(output).__name__}; "
            "pass loss=lambda output, batch: ... (one negative log-likelihood per prediction)"
        )
    return found


def _main(output: Any, family: Family) -> list[Head]:
    """The output that a single family is about."""
    if isinstance(output, Tensor):
        return [Head("", output, family)] if output.is_floating_point() else []
    fields = _fields(output)
    tensors = {name: value for name, value in fields.items() if isinstance(value, Tensor)}
    for name in _LOGITS:
        if name in tensors:
            return [Head(name, tensors[name], family)]
    if all(name in tensors for name in _SPANS):
        return [Head(name, tensors[name], family) for name in _SPANS]
    named = [name for name in _VALUES if name in tensors]
    floating = [name for name, value in tensors.items() if value.is_floating_point()]
    return [Head(name, tensors[name], family) for name in [*named, *floating][:1]]


def _seen(output: Any, mask: Padding) -> list[Head]:
    """Every output that ``auto`` counts, and what it takes it for."""
    if isinstance(output, Tensor):
        return [Head("", output, "categorical")] if output.is_floating_point() else []
    tensors = {
        name: value
        for name, value in _fields(output).items()
        if isinstance(value, Tensor) and value.is_floating_point() and not _INSIDE.search(name)
    }
    if any(value.dim() for value in tensors.values()):  # a loss beside other outputs is none
        tensors = {name: value for name, value in tensors.items() if value.dim()}
    logits = [name for name in tensors if _CLASSES.search(name)]
    if logits:
        tensors.pop("last_hidden_state", None)
    else:
        logits = [name for name in tensors if not _NUMBERS.search(name)][:1]
    found = []
    for name, value in tensors.items():
        head = Head(name, value, "categorical" if name in logits else "gaussian")
        if len(tensors) > 1 and head.family == "gaussian":
            real = head.real(mask)
            rows = head.rows(value)
            head = replace(head, scale=_root_mean_square(rows if real is None else rows[real]))
        elif len(tensors) > 1 and (value.dim() == 1 or value.shape[head.classes] == 1):
            head = replace(head, family="bernoulli")
        found.append(head)
    return found


def _root_mean_square(values: Tensor) -> float:
    """Of the finite values; 1 if they are all zero."""
    values = values.detach()
    finite = values[values.isfinite()].to(torch.float64)
    peak = float(finite.abs().max()) if finite.numel() else 0.0
    return peak * float((finite / peak).square().mean().sqrt()) if peak else 1.0


def described(found: Sequence[Head], kind: OutputKind) -> str:
    """The outputs that count and what they are taken for, in words."""
    if isinstance(kind, Mapping):
        return ", ".join(f"{head.name} {head.family}" for head in found)
    if kind == "auto" and len(found) > 1:
        words = (
            f"{head.name} {head.family}" + (" of its own scale" if head.scale else "")
            for head in found
        )
        return f"{SEVERAL}{', '.join(words)}"
    return ", ".join(dict.fromkeys(head.family for head in found))


SEVERAL = "auto: "
"""How the words start if ``auto`` found several outputs."""


def declared_by(model: object) -> Family | None:
    """The family that a Hugging Face classifier says its logits have (``config.problem_type``)."""
    names = [each.__name__ for each in type(model).__mro__]
    stock = type(model).__module__.startswith("transformers.")
    if stock and not any(_CLASSIFIERS.search(name) for name in names):
        return None
    problem = getattr(getattr(model, "config", None), "problem_type", None)
    return _PROBLEMS.get(problem) if isinstance(problem, str) else None


_PROBLEMS: Mapping[str, Family] = {
    "single_label_classification": "categorical",
    "multi_label_classification": "bernoulli",
    "regression": "gaussian",
}
_CLASSIFIERS = re.compile("For(?!Token)[A-Za-z]*Classification")
_CLASSES = re.compile("logit|class|(^|_)cls", re.IGNORECASE)
_NUMBERS = re.compile(
    "hidden|embed|pool|box|mask|depth|coord|point|feature|recon|score|spectrogram|waveform",
    re.IGNORECASE,
)
_INSIDE = re.compile(
    "^(loss|encoder_|enc_|init_|intermediate_|hidden|attn|past_|cache|mems$|state$|extract_feat|"
    "router_|projected_)|_loss$|_loss_|attention|_hidden_states|hidden_states$",
    re.IGNORECASE,
)


def _declared(output: Any, kinds: Mapping[str, Family]) -> list[Head]:
    fields = {"0": output} if isinstance(output, Tensor) else _fields(output)
    found = []
    for name, family in kinds.items():
        value = fields.get(name)
        if not isinstance(value, Tensor) or not value.is_floating_point():
            known = ", ".join(n for n, each in fields.items() if isinstance(each, Tensor))
            raise CalibrationError(
                f"metric: {{output: ...}} names '{name}', and the model's output has no such "
                f"tensor of floating type; it has: {known or 'none'}"
            )
        found.append(Head(name, value, family))
    return found


def _fields(output: Any) -> dict[str, Any]:
    """The parts of an output by name, or by place."""
    if isinstance(output, Mapping):
        return dict(output)
    if isinstance(output, tuple | list):
        return {str(place): value for place, value in enumerate(output)}
    return dict(vars(output)) if hasattr(output, "__dict__") else {}


def _require_sense(head: Head, real: Tensor | None) -> None:
    """Outputs that the family makes no sense of would pass for layers without influence.

    Args:
        head: the output.
        real: which of its rows are looked at; None for all.
    """
    tensor, where = head.tensor, f" {head.name}" if head.name else ""
    seen = tensor if real is None else head.rows(tensor)[real]
    if not bool(seen.isfinite().all()):
        raise NotFinite(f"the model's output{where} has NaN or infinite values")
    if tensor.dim() == 0:
        raise CalibrationError(
            "the model returned a single number (its own loss?), not predictions: pass a "
            "forward= that returns the logits, or loss="
        )
    if head.family != "categorical":
        return
    if tensor.dim() == 1 or tensor.shape[head.classes] == 1:
        what = "has no dimension of samples" if tensor.dim() == 1 else "has one class only"
        raise CalibrationError(
            f"the model's output{where} of shape {tuple(tensor.shape)} is taken for logits, and "
            f"{what}: declare what it is, metric: {{output: bernoulli}} for yes or no, "
            "metric: {output: gaussian} for a regression"
        )


def per_prediction(loss: Loss, output: Any, batch: Any) -> Tensor:
    """The values of a user's loss, one for every prediction.

    Raises:
        CalibrationError: the loss fails, or is reduced to a scalar.
    """
    try:
        value = loss(output, batch)
    except Exception as error:
        raise CalibrationError(
            f"loss(output, batch) failed: {type(error).__name__}: {error}\nIt is given what the "
            f"model returned ({type(output).__name__}) and the whole batch "
            f"({type(batch).__name__})"
        ) from error
    if not isinstance(value, Tensor) or value.dim() == 0:
        raise CalibrationError(
            "loss(output, batch) must return one value per prediction (reduction='none'), "
            "not a single number: otherwise it is not known what it is a mean of"
        )
    return value


def loss_sum(loss: Loss, output: Any, batch: Any, mask: Padding) -> tuple[Tensor, int]:
    """Sum of a user's loss over the predictions of a batch, and how many they are.

    Args:
        loss: the user's.
        output: what the model returned.
        batch: that it was given, on the model's device.
        mask: what is padding in the output, still followed; it makes no prediction.

    Raises:
        CalibrationError: as :func:`per_prediction`.
    """
    value = per_prediction(loss, output, batch)
    real = mask.real(value, VALUES, dims=0)
    counted = value if real is None else value[real]
    return counted.sum(), counted.numel()


VALUES = "the values of loss(output, batch)"


def divergence(
    dense: Any, other: Any, kind: OutputKind = "auto", mask: Padding = NONE
) -> tuple[float, int]:
    """KL divergence from a model's predictions to another's.

    Args:
        dense: what the dense model returned.
        other: what the other model returned on the same batch.
        kind: the families of the outputs.
        mask: what is padding in the outputs of one of them; it makes no prediction.

    Returns:
        The sum over predictions, in nats, and how many there are.

    Raises:
        CalibrationError: as :func:`heads`; or the outputs differ in shape.
    """
    total, predictions = divergence_sum(dense, other, kind, mask, torch.float64)
    return float(total), predictions


ROWS = 256
"""Predictions whose divergence is computed at once."""


def divergence_sum(
    dense: Any,
    other: Any,
    kind: OutputKind = "auto",
    mask: Padding = NONE,
    dtype: torch.dtype = torch.float32,
) -> tuple[Tensor, int]:
    """As :func:`divergence`, a tensor that can be differentiated with respect to ``other``.

    Args:
        dense, other, kind, mask: as there.
        dtype: to compute in.
    """
    totals, predictions = [], 0
    for p, q in zip(_heads(dense, kind, mask), _heads(other, kind, mask), strict=True):
        if p.tensor.shape != q.tensor.shape:
            raise CalibrationError(
                f"the outputs have shapes {tuple(p.tensor.shape)} and {tuple(q.tensor.shape)}"
            )
        real = p.real(mask)
        real = q.real(mask) if real is None else real
        for head in (p, q):
            _require_sense(head, real)
        one, two = (head.rows(head.tensor) for head in (p, q))
        if real is not None:  # before anything is computed: zero times NaN is NaN
            one, two = one[real], two[real]
        one, two = (rows.reshape(-1, rows.shape[-1]) for rows in (one, two))
        # Some rows at a time: over a vocabulary every step takes as much memory as the outputs.
        for part, other_part in zip(torch.split(one, ROWS), torch.split(two, ROWS), strict=True):
            first, second = part.to(dtype), other_part.to(dtype)
            if p.scale is not None:
                first, second = first / p.scale, second / p.scale
            totals.append(_row_divergence(p.family, first, second).sum())
        predictions = max(predictions, len(one))
    return torch.stack(totals).sum(), predictions


def _row_divergence(family: Family, p: Tensor, q: Tensor) -> Tensor:
    """KL of each row (..., C) to (...), from logits or values."""
    if family == "gaussian":
        return 0.5 * (p - q).square().sum(-1)
    if family == "categorical":
        log_p, log_q = p.log_softmax(-1), q.log_softmax(-1)
        return (log_p.exp() * (log_p - log_q)).sum(-1)
    yes = p.sigmoid() * (F.logsigmoid(p) - F.logsigmoid(q))
    no = (-p).sigmoid() * (F.logsigmoid(-p) - F.logsigmoid(-q))
    return (yes + no).sum(-1)
