"""Which operators can be replaced in the module tree, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize

from fxcompress.graph.canonical import is_hf_conv1d
from fxcompress.graph.operator import Operator
from fxcompress.graph.paths import above
from fxcompress.graph.recorder import Recording

FLOATING = {"float64", "float32", "bfloat16", "float16"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
PARAMETRIZED = "its weight is parametrized (torch.nn.utils.parametrize): remove that first"


def obstacle(
    model: nn.Module, recording: Recording, done: tuple[type[nn.Module], ...] = ()
) -> Callable[[Operator], str | None]:
    """A function from an operator to the reason why it must stay as it is, or None.

    Args:
        model: as it was recorded.
        recording: facts about its weights.
        done: classes of modules that are rewritten operators already.
    """
    modules = dict(model.named_modules())
    finished = {name for name, module in modules.items() if isinstance(module, done)}

    def reason(operator: Operator) -> str | None:
        if operator.weight is None:
            module = modules.get(operator.path) if operator.module else None
            if module is not None and parametrize.is_parametrized(module):
                return PARAMETRIZED
            if module is not None and module._forward_pre_hooks:
                return (
                    "its weight is made by a hook (torch.nn.utils.weight_norm): remove that first"
                )
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
            readers = _scopes(facts.strangers)
            return f"its weight is also read by {readers}, which would bypass a rewritten layer"
        if facts.dtype not in FLOATING:
            return f"its weight is {facts.dtype}, not a floating type"
        if not finished.isdisjoint(above(operator.path)):
            return "it is part of a layer that was factorized before"
        return _module_obstacle(model.get_submodule(operator.path), recording, operator)

    return reason


def _module_obstacle(module: nn.Module, recording: Recording, operator: Operator) -> str | None:
    if parametrize.is_parametrized(module):
        return PARAMETRIZED
    if not _runs_as_usual(module):
        return f"its class {type(module).__name__} has a forward of its own"
    if operator.attributes.get("output_size"):
        return "it is called with output_size, which decides its output padding anew every time"
    if "forward" in module.__dict__:
        return "its forward was replaced on the instance (as accelerate does): undo that first"
    if any(module.__dict__[kind] for kind in HOOKS):
        return "it carries hooks, which a rewrite would lose: remove them first"
    more = {*module._parameters, *module._buffers, *module._modules} - {"weight", "bias"}
    if more:
        return f"it holds more than a weight and a bias: {', '.join(sorted(more))}"
    bias = module._parameters.get("bias")
    if bias is not None:
        facts = recording.weights.get(f"{operator.path}.bias")
        if facts is None or len(facts.aliases) > 1:
            return "its bias is tied to another parameter"
        if facts.strangers:
            return f"its bias is also read by {_scopes(facts.strangers)}"
    if len({p.dtype for p in module.parameters()}) > 1:
        return "its weight and bias have different types"
    if any(type(p) not in (nn.Parameter, torch.Tensor) for p in module.parameters()):
        return f"its weight is a {type(module.weight).__name__}, not a plain parameter"
    return None


_PLAIN_CLASSES = (
    *(nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d),
    *(nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d),
)


def _runs_as_usual(module: nn.Module) -> bool:
    """Whether a module computes what its base class does, in the same way."""
    for base in _PLAIN_CLASSES:
        if isinstance(module, base):
            methods = ("forward", "_conv_forward", "_output_padding")
            return all(getattr(type(module), m, None) is getattr(base, m, None) for m in methods)
    return is_hf_conv1d(module) and type(module).__name__ == "Conv1D"


def _scopes(strangers: tuple[str, ...]) -> str:
    return ", ".join(scope or "the model" for scope in strangers)
