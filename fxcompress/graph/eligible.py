"""Which operators can be replaced in the module tree, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize

from fxcompress.graph.canonical import is_hf_conv1d
from fxcompress.graph.operator import Operator
from fxcompress.graph.recorder import Recording

FLOATING = {"float64", "float32", "bfloat16", "float16"}


def obstacle(
    model: nn.Module, recording: Recording, done: tuple[type[nn.Module], ...] = ()
) -> Callable[[Operator], str | None]:
    """A function from an operator to the reason why it must stay as it is, or None.

    Args:
        model: as it was recorded.
        recording: facts about its weights.
        done: classes of modules that are rewritten operators already.
    """
    finished = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, done))

    def reason(operator: Operator) -> str | None:
        if operator.weight is None:
            return "it applies no parameter of its own"
        facts = recording.weights[operator.weight]
        if len(facts.aliases) > 1:
            others = ", ".join(name for name in facts.aliases if name != operator.weight)
            return f"its weight is tied to {others}"
        if not operator.module:
            where = f"the forward of {operator.scope}" if operator.scope else "the model's forward"
            return (
                f"its weight {operator.weight} is applied by a function call in {where}, not by a "
                "module that could be replaced; use nn.Linear there, or give compile() an "
                "fx.GraphModule"
            )
        if not operator.path:
            return "it is the model itself; wrap it in nn.Sequential"
        if facts.strangers:
            readers = ", ".join(scope or "the model" for scope in facts.strangers)
            return f"its weight is also read by {readers}, which would bypass a rewritten layer"
        if facts.dtype not in FLOATING:
            return f"its weight is {facts.dtype}, not a floating type"
        if operator.path.startswith(finished):
            return "it is part of a layer that was factorized before"
        return _module_obstacle(model.get_submodule(operator.path), recording, operator)

    return reason


def _module_obstacle(module: nn.Module, recording: Recording, operator: Operator) -> str | None:
    if parametrize.is_parametrized(module):
        return "its weight is parametrized (torch.nn.utils.parametrize): remove that first"
    plain = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    if operator.op == "linear" and not plain and not is_hf_conv1d(module):
        return f"its class {type(module).__name__} has a forward of its own"
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks:
        return "it carries hooks, which a rewrite would lose: remove them first"
    bias = module._parameters.get("bias")
    if bias is not None:
        facts = recording.weights[f"{operator.path}.bias"] if (
            f"{operator.path}.bias" in recording.weights
        ) else None  # fmt: skip
        if facts is None or len(facts.aliases) > 1:
            return "its bias is tied to another parameter"
        if facts.strangers:
            return f"its bias is also read by {', '.join(facts.strangers)}"
    if len({p.dtype for p in module.parameters()}) > 1:
        return "its weight and bias have different types"
    if any(type(p) not in (nn.Parameter, torch.Tensor) for p in module.parameters()):
        return f"its weight is a {type(module.weight).__name__}, not a plain parameter"
    return None
