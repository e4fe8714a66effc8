"""Copies of a model that share its parameters: cheap to make, safe to rewrite."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

from torch import fx, nn

from fxcompress.rewrite.attention import expand_attention
from fxcompress.rewrite.lift import lift

M = TypeVar("M", bound=nn.Module)


def skeleton(model: M) -> M:
    """A deep copy that shares the parameters (not the buffers: a forward may write those)."""
    memo: dict[int, Any] = {id(parameter): parameter for parameter in model.parameters()}
    return copy.deepcopy(model, memo)


def prepared(model: nn.Module) -> nn.Module:
    """A skeleton in which every operator that can be a module is one."""
    work = skeleton(model)
    expand_attention(work)
    if isinstance(work, fx.GraphModule):
        lift(work)
    return work


def own_parameters(model: nn.Module) -> None:
    """Give a model that shares parameters with another its own; ties stay tied."""
    own: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in own:
                    own[id(parameter)] = copy.deepcopy(parameter)
                module._parameters[key] = own[id(parameter)]
