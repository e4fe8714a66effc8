"""Give a layer another number of channels: it stays of its class, with a ``forward`` of its own."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxcompress.operators.applied import Applied, operator_at
from fxcompress.operators.modules import canonical_weight, kind_of, shape_of
from fxcompress.operators.stacked import Matrix


def resize_obstacle(model: nn.Module, name: str) -> str | None:
    """Why a layer cannot have other channels; None if it can.

    Args:
        model: with objects in the places of weights that functions apply.
        name: of the operator, as it is displayed.
    """
    owner = model.get_submodule(name)
    if operator_at(model, name) is owner or isinstance(owner, Matrix):
        return None
    if kind_of(owner) is None or not isinstance(owner._modules.get("weight"), Applied):
        return f"a function applies the weight of {name}"
    held = {*owner._parameters, *owner._buffers}
    if more := held - {"weight", "bias"}:
        return f"{name} holds more than a weight and a bias: {', '.join(sorted(more))}"
    if operator_at(model, name)._parameters.get("bias") is not None:
        return f"a batch norm was folded into {name}, whose weight a function applies"
    return None


def resize(model: nn.Module, name: str, layer: nn.Module) -> nn.Module:
    """Put weight, bias and sizes of a plain layer into one of another class; changes ``model``.

    Parameters are replaced, not written: a skeleton shares them with the model it was made of.

    Args:
        model: without an obstacle to it (:func:`resize_obstacle`).
        name: of the operator.
        layer: torch's own layer of its kind.

    Returns:
        The module that has the weight now.
    """
    original, owner = operator_at(model, name), model.get_submodule(name)
    shape = shape_of(layer)
    weight: Any = layer.weight
    stored = shape_of(original).resized(shape.in_features, shape.out_features)
    small = nn.Parameter(stored.stored(canonical_weight(layer).detach()), weight.requires_grad)
    if isinstance(owner, Matrix):
        owner.become(stored, small)
        return owner
    owner._modules.pop("weight", None)
    owner._parameters = {"weight": small, **_without_weight(owner)}
    if layer.bias is not None:
        owner._parameters["bias"] = layer.bias  # type: ignore[assignment]
    for field, size in shape.module_sizes.items():
        if field in owner.__dict__:
            owner.__dict__[field] = size
    return owner


def _without_weight(module: nn.Module) -> dict[str, nn.Parameter | None]:
    return {name: each for name, each in module._parameters.items() if name != "weight"}
