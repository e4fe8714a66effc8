"""Which operators can be replaced in the module tree, and why the others cannot."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn.utils import parametrize

from fxcompress.graph.operator import Operator
from fxcompress.graph.paths import above
from fxcompress.graph.recorder import PART, Recording, Weight
from fxcompress.operators.applied import operator_path
from fxcompress.operators.modules import kind_of
from fxcompress.operators.shape import Shape

FLOATING = {"float64", "float32", "bfloat16", "float16"}
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
MADE_BY_HOOK = "its weight is made by a hook (torch.nn.utils.weight_norm): remove that first"
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
            if module is not None and made_by_hook(module):
                return MADE_BY_HOOK
            return "it applies no parameter of its own"
        facts = recording.weights[operator.weight]
        if len(facts.aliases) > 1:
            others = ", ".join(name for name in facts.aliases if name != operator.weight)
            return f"its weight is tied to {others}"
        if not operator.module:
            return _function_obstacle(model, operator, facts)
        path = operator_path(model, operator.path)
        if not path:
            return "it is the model itself; wrap it in nn.Sequential"
        if facts.strangers:
            readers = _scopes(facts.strangers)
            return f"its weight is also read by {readers}, which would bypass a rewritten layer"
        if facts.dtype not in FLOATING:
            return f"its weight is {facts.dtype}, not a floating type"
        if 0 in facts.shape:
            return f"its weight has no entries: its shape is {facts.shape}"
        if not finished.isdisjoint(above(operator.path)):
            return "it is part of a layer that was factorized before"
        return _module_obstacle(model.get_submodule(path), recording, operator)

    return reason


def made_by_hook(module: nn.Module) -> bool:
    """Whether a hook makes the weight of a module before every call."""
    held = module._parameters
    return bool(module._forward_pre_hooks) and "weight" not in held and "weight" in vars(module)


def forward_of(scope: str) -> str:
    """What messages call the place where a function was called."""
    return f"the forward of {scope}" if scope else "the model's forward"


def applied_shape(model: nn.Module, facts: Weight) -> Shape | str:
    """The operator that functions make of a weight, or why an object cannot stand in its place.

    Args:
        model: that was recorded.
        facts: about the weight.
    """
    reasons = [each for each in facts.applied if isinstance(each, str)]
    if reasons:
        return reasons[0]
    shapes = [*dict.fromkeys(each for each in facts.applied if not isinstance(each, str))]
    if len(shapes) > 1:
        ways = ", ".join(f"{s}{', transposed' if s.is_mirrored else ''}" for s in shapes)
        return f"it is applied in different ways ({ways})"
    if len(facts.applied) < len(facts.calls) or not shapes:
        return "a module applies it, too"
    if len(facts.aliases) > 1:
        return "it is tied to another"
    if facts.dtype not in FLOATING or 0 in facts.shape:
        return f"it is {facts.dtype} of shape {facts.shape}"
    path, _, name = facts.name.rpartition(".")
    parameter = model.get_submodule(path)._parameters.get(name)
    if type(parameter) is not nn.Parameter:
        return f"it is a {type(parameter).__name__}, not a plain parameter"
    return shapes[0]


def piles(model: nn.Module, facts: Weight) -> bool:
    """Whether functions may apply a weight one matrix at a time (mixtures of experts)."""
    if len(facts.shape) != 3 or 0 in facts.shape or facts.dtype not in FLOATING:
        return False
    if len(facts.aliases) > 1 or not facts.applied:
        return False
    path, _, name = facts.name.rpartition(".")
    plain = type(model.get_submodule(path)._parameters.get(name)) is nn.Parameter
    return plain and all(isinstance(each, str) for each in facts.applied)


def _function_obstacle(model: nn.Module, operator: Operator, facts: Weight) -> str:
    found = applied_shape(model, facts)
    where = f"applied by a function call in {forward_of(operator.scope)}"
    if found == PART:
        return f"a part of its weight {operator.weight} is {where}"
    why = found if isinstance(found, str) else "the model does not run with an object in its place"
    return f"its weight {operator.weight} is {where}, and {why}"


def _module_obstacle(module: nn.Module, recording: Recording, operator: Operator) -> str | None:
    if parametrize.is_parametrized(module):
        return PARAMETRIZED
    kind = kind_of(module)
    if kind is None or not kind.is_plain(module):
        return f"its class {type(module).__name__} has a forward of its own"
    if reason := kind.obstacle(operator.attributes):
        return reason
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


def _scopes(strangers: tuple[str, ...]) -> str:
    return ", ".join(scope or "the model" for scope in strangers)
