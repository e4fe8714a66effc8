"""The output distribution of a model, and labels sampled from it.

The Fisher metric needs ``∇ log p(y|x)`` with y drawn from the model itself (the true Fisher;
labels of the data would give the empirical one, another matrix).  For each family the
gradient with respect to the model's output is known in closed form, so no loss graph is
built: :func:`sampled_gradient` returns the tensor to start the backward pass from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fxcompress.errors import CalibrationError

OutputKind = Literal["auto", "categorical", "bernoulli", "gaussian"]

Loss = Callable[[Any, Any], Tensor]
"""``loss(output, batch)``: the negative log-likelihood of every prediction, unreduced."""


@dataclass(frozen=True, eq=False)
class OutputGradient:
    """Where a backward pass starts.

    Attributes:
        tensor: part of the model's output.
        gradient: of the summed negative log-likelihood with respect to it, same shape.
        predictions: how many predictions the batch holds (tokens, images, ...).
        kind: the family that was used.
    """

    tensor: Tensor
    gradient: Tensor
    predictions: int
    kind: str


def main_output(output: Any) -> tuple[Tensor, str]:
    """The tensor that carries a model's predictions, and its family.

    A Hugging Face output is asked for ``logits`` (categorical), then for
    ``last_hidden_state`` or an embedding (Gaussian).  A plain tensor, or the first tensor of a
    tuple, counts as logits: declare ``metric: {output: gaussian}`` for a regression.

    Raises:
        CalibrationError: no floating-point tensor is to be found.
    """
    if isinstance(output, Tensor) and output.is_floating_point():
        return output, "categorical"
    if isinstance(output, Mapping) or hasattr(output, "logits"):
        fields = output if isinstance(output, Mapping) else vars(output)
        for name in ("logits", "prediction_logits", "logits_per_image"):
            if isinstance(fields.get(name), Tensor):
                return fields[name], "categorical"
        for name in ("last_hidden_state", "image_embeds", "text_embeds", "pooler_output"):
            if isinstance(fields.get(name), Tensor):
                return fields[name], "gaussian"
        values = list(fields.values())
    else:
        values = list(output) if isinstance(output, (tuple, list)) else []
    for value in values:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value, "categorical"
    raise CalibrationError(
        f"no predictions found in the model's output of type {type(output).__name__}; "
        "pass loss=lambda output, batch: ... (one negative log-likelihood per prediction)"
    )


def class_dimension(tensor: Tensor) -> int:
    """Where the classes lie: dimension 1 of images (batch, classes, ...), else the last."""
    return 1 if tensor.dim() >= 4 else -1


def sampled_gradient(
    output: Any, kind: OutputKind, mask: Tensor | None, generator: torch.Generator
) -> OutputGradient:
    """Draw labels from the model's own distribution and differentiate their likelihood.

    Args:
        output: what the model returned.
        kind: the family, or ``"auto"`` (see :func:`main_output`).
        mask: (batch, positions) real positions; the others make no prediction.
        generator: the source of the labels.

    Raises:
        CalibrationError: no predictions, or none that is finite, or none that leaves a choice.
    """
    tensor, found = main_output(output)
    kind = found if kind == "auto" else kind  # type: ignore[assignment]
    detached = tensor.detach().float()
    if not bool(detached.isfinite().all()):
        raise CalibrationError("the model's output has NaN or infinite values")
    _require_predictions(detached, kind)
    width = detached.shape[-1] if detached.dim() > 1 else 1
    if kind == "gaussian":
        # -log N(y; f, I) with y ~ N(f, I): the gradient at f is f - y, standard normal.
        gradient = _normal(detached, generator)
        predictions = detached.numel() // max(width, 1)
        dim = -1
    elif kind == "bernoulli":
        p = detached.sigmoid()
        gradient = p - torch.bernoulli(p, generator=generator)
        predictions = detached.numel() // max(width, 1)
        dim = -1
    else:
        dim = class_dimension(detached)
        p = detached.softmax(dim).movedim(dim, -1)
        flat = p.reshape(-1, p.shape[-1])
        labels = torch.multinomial(flat, 1, generator=generator)
        flat.scatter_add_(1, labels, torch.full_like(labels, -1, dtype=flat.dtype))
        gradient = flat.reshape(p.shape).movedim(-1, dim)
        predictions = len(flat)
    if mask is not None and dim == -1 and gradient.shape[:2] == mask.shape:
        gradient = gradient * mask[..., None].to(gradient.device)
        per_position = predictions // max(mask.numel(), 1)
        predictions = int(mask.sum()) * max(per_position, 1)
    return OutputGradient(tensor, gradient.to(tensor.dtype), predictions, kind)


def loss_gradient(output: Any, batch: Any, loss: Loss) -> OutputGradient:
    """Start from the user's own loss: its labels are the data's (the empirical Fisher).

    Raises:
        CalibrationError: the loss fails, is reduced to a scalar, not finite, or not
            differentiable.
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
            "not a single number: the Fisher metric needs to know what it is a mean of"
        )
    if not value.requires_grad:
        raise CalibrationError(
            "loss(output, batch) returned a tensor without a gradient: it has to be computed "
            "from the output, without detach(), argmax() or no_grad()"
        )
    if not bool(value.isfinite().all()):
        raise CalibrationError("loss(output, batch) returned NaN or infinite values")
    return OutputGradient(value, torch.ones_like(value), value.numel(), "loss")


def _require_predictions(logits: Tensor, kind: str) -> None:
    """Outputs that the family makes no sense of would pass for layers without influence."""
    if logits.dim() == 0:
        raise CalibrationError(
            "the model returned a single number (its own loss?), not predictions: pass a "
            "forward= that returns the logits, or loss="
        )
    if kind == "categorical" and (logits.dim() == 1 or logits.shape[class_dimension(logits)] == 1):
        raise CalibrationError(
            f"the model's output of shape {tuple(logits.shape)} is taken for logits, and has "
            + ("no dimension of samples" if logits.dim() == 1 else "one class only")
            + ": declare what it is, metric: {output: bernoulli} for yes or no, "
            "metric: {output: gaussian} for a regression"
        )


def _normal(like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.randn(like.shape, generator=generator, device=like.device, dtype=like.dtype)
