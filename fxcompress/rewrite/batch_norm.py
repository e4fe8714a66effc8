"""Fold a batch norm into the convolution before it.

before::

    h = conv(x; W, b)                              # read by the norm only
    y = γ (h - μ) / √(σ² + ε) + β                  # batch norm in eval mode

after::

    y = conv(x; s W, s (b - μ) + β),  s = γ / √(σ² + ε)      # the norm becomes nn.Identity

In eval mode both are the same function.  In training they are not: what is folded no longer
normalizes by the batch, so a rule has to ask for it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fxcompress.graph.operator import Operator
from fxcompress.graph.recorder import Recording
from fxcompress.operators.applied import operator_at
from fxcompress.operators.modules import shape_of
from fxcompress.operators.words import OPERATORS
from fxcompress.plans.plan import Folded


def find_batch_norms(
    model: nn.Module, recording: Recording, weights: Collection[str]
) -> tuple[tuple[Folded, ...], dict[str, str]]:
    """The batch norms that can be folded into some convolutions.

    Args:
        model: as it was recorded.
        recording: says which operator reads which value.
        weights: of the convolutions that are asked about.

    Returns:
        The pairs, and for every other weight the reason why there is none.
    """
    operators = {operator.name: operator for operator in recording.operators}
    calls = Counter(operator.path for operator in recording.operators)
    found, reasons = [], {}
    for operator in recording.operators:
        if operator.weight not in weights:
            continue
        reason = _obstacle(model, recording, operator, operators, calls)
        if reason is None:
            found.append(Folded(convolution=operator.path, norm=operators[operator.users[0]].path))
        else:
            reasons[str(operator.weight)] = reason
    return tuple(found), reasons


def _obstacle(
    model: nn.Module,
    recording: Recording,
    convolution: Operator,
    operators: Mapping[str, Operator],
    calls: Mapping[str, int],
) -> str | None:
    if OPERATORS[convolution.op].takes != "patches":
        return f"it is a {convolution.op}, not a convolution"
    users = [operators[name] for name in convolution.users]
    norms = [user for user in users if user.op == "batch_norm" and user.module]
    if not norms:
        return "no batch norm follows it"
    if len(users) > 1:
        return "its value is read by others than the batch norm"
    norm = model.get_submodule(norms[0].path)
    if not isinstance(norm, _BatchNorm) or norm.running_mean is None:
        return "the batch norm that follows has no running statistics"
    if norms[0].weight is not None and len(recording.weights[norms[0].weight].aliases) > 1:
        return "the batch norm that follows shares its parameters"
    if calls[norms[0].path] > 1 or len(recording.weights[str(convolution.weight)].calls) > 1:
        return "one of both is called several times"
    return None


@torch.no_grad()
def fold_batch_norms(model: nn.Module, pairs: Iterable[Folded]) -> None:
    """Fold pairs found by :func:`find_batch_norms`; changes ``model``.

    Parameters are replaced, not written: a skeleton shares them with the model it was made of.
    The weight learns if that of the convolution did, the bias if one of both biases did.
    """
    for pair in pairs:
        convolution: Any = operator_at(model, pair.convolution)
        norm: Any = model.get_submodule(pair.norm)
        shape = shape_of(convolution)
        learns = convolution.weight.requires_grad
        shifts = [each for each in (convolution.bias, norm.bias) if each is not None]
        shift_learns = any(each.requires_grad for each in shifts) if shifts else learns
        mean, variance = norm.running_mean.double(), norm.running_var.double()
        scale = (variance + norm.eps).rsqrt()
        if norm.weight is not None:
            scale = scale * norm.weight.double()
        shift = -mean * scale
        if convolution.bias is not None:
            shift = shift + convolution.bias.double() * scale
        if norm.bias is not None:
            shift = shift + norm.bias.double()
        weight = convolution.weight
        rows = shape.canonical(weight.double())  # (g x m/g x ...)
        scaled = rows * scale.reshape(len(rows), -1, *(1 for _ in rows.shape[2:]))
        convolution.weight = nn.Parameter(shape.stored(scaled).to(weight.dtype), learns)
        convolution.bias = nn.Parameter(shift.to(weight.dtype), shift_learns)
        owner, _, name = pair.norm.rpartition(".")
        setattr(model.get_submodule(owner), name, nn.Identity())
