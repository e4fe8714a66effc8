"""Which operators can be replaced in the module tree, and why the others cannot."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from fxcompress.graph.operator import Operator
from fxcompress.graph.paths import above
from fxcompress.graph.recorder import Recording, Weight
from fxcompress.operators.modules import kind_of

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
            return _function_obstacle(operator, facts)
        if not operator.path:
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
        return _module_obstacle(model.get_submodule(operator.path), recording, operator)

    return reason


def made_by_hook(module: nn.Module) -> bool:
    """Whether a hook makes the weight of a module before every call."""
    held = module._parameters
    return bool(module._forward_pre_hooks) and "weight" not in held and "weight" in vars(module)


def forward_of(scope: str) -> str:
    """What messages call the place where a function was called."""
    return f"the forward of {scope}" if scope else "the model's forward"


def _function_obstacle(operator: Operator, facts: Weight) -> str:
    whole = operator.op != "linear" or math.prod(facts.shape) == (
        cast("int", operator.attributes["in_features"])
        * cast("int", operator.attributes["out_features"])
    )
    return (
        f"{'its weight' if whole else 'a part of its weight'} {operator.weight} is applied by a "
        f"function call in {forward_of(operator.scope)}, not by a module that could be replaced"
        f"{_REMEDIES.get(operator.op, '') if whole else ''}"
    )


_REMEDIES = {
    "linear": "; use nn.Linear there, or give compile() an fx.GraphModule",
    "embedding": "; use nn.Embedding there",
    **{f"conv{n}d": f"; use nn.Conv{n}d there" for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": f"; use nn.ConvTranspose{n}d there" for n in (1, 2, 3)},
}


def _module_obstacle(module: nn.Module, recording: Recording, operator: Operator) -> str | None:
    if parametrize.is_parametrized(module):
        return PARAMETRIZED
    inside = recording.inside.get(operator.path, frozenset())
    if not _runs_as_usual(module) and not computes_the_same(module, inside):
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


# What a linear map, a convolution and a look-up can be written with.
_PARTS: dict[type[nn.Module], set[str]] = {
    nn.Linear: {"linear", "matmul", "mm", "transpose", "add", "addmm"},
    nn.Embedding: {"embedding"},
    **{cls: {cls.__name__.lower(), "pad"} for cls in (nn.Conv1d, nn.Conv2d, nn.Conv3d)},
}


def computes_the_same(module: nn.Module, inside: frozenset[str]) -> bool:
    """Whether a class with a forward of its own computes what its base class does.

    ``x @ W.T + b`` does.  It has to be made of the operators of the plain one, so that it is a
    polynomial in input, weight and bias, and to agree with it on random values of all of them, in
    evaluation and in training.

    Args:
        module: of a subclass.
        inside: operators that its forward was seen to consist of.
    """
    plain = next((cls for cls in _PARTS if isinstance(module, cls)), None)
    if plain is None or not inside or not inside <= _PARTS[plain]:
        return False
    if "forward" in module.__dict__:
        return False
    draw = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            return all(
                own.shape == usual.shape and torch.allclose(own, usual, rtol=1e-9, atol=1e-9)
                for own, usual in _trials(module, plain, draw)
            )
    except Exception:
        return False  # it is particular about sizes or types


def _trials(
    module: nn.Module, plain: type[nn.Module], draw: torch.Generator
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """What both forwards make of random inputs, on a small copy in float64 on the CPU."""
    small = {
        id(p): nn.Parameter(torch.randn(_few(plain, p), generator=draw, dtype=torch.float64))
        for p in module.parameters()
    }
    trial: Any = copy.deepcopy(module, small)
    if plain is nn.Linear:
        trial.out_features, trial.in_features = trial.weight.shape
    elif plain is nn.Embedding:
        trial.num_embeddings, trial.embedding_dim = trial.weight.shape
    for training in (False, True):
        trial.train(training)
        for x in _inputs(trial, draw):
            yield trial.forward(x), plain.forward(trial, x)


def _few(plain: type[nn.Module], parameter: torch.Tensor) -> tuple[int, ...]:
    """Sizes of a parameter for the trial: of a matrix, rows and columns at most."""
    most = (5, 7) if plain in (nn.Linear, nn.Embedding) else parameter.shape
    return tuple(map(min, parameter.shape, most))


def _inputs(module: Any, draw: torch.Generator) -> list[torch.Tensor]:
    """Random inputs of the ranks that a plain operator takes."""
    sizes: list[tuple[int, ...]]
    if isinstance(module, nn.Embedding):
        high = module.num_embeddings
        return [torch.randint(high, size, generator=draw) for size in ((5,), (2, 3))]
    if isinstance(module, nn.Linear):
        sizes = [(module.in_features,), (3, module.in_features), (2, 3, module.in_features)]
    else:
        pairs = zip(module.dilation, module.kernel_size, strict=True)
        sizes = [(2, module.in_channels, *(d * (k - 1) + 3 for d, k in pairs))]
    return [torch.randn(size, generator=draw, dtype=torch.float64) for size in sizes]


def _runs_as_usual(module: nn.Module) -> bool:
    """Whether a module computes what its base class does, in the same way."""
    kind = kind_of(module)
    return kind is not None and kind.is_plain(module)


def _scopes(strangers: tuple[str, ...]) -> str:
    return ", ".join(scope or "the model" for scope in strangers)
