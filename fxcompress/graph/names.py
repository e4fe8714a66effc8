"""Names of operators: ``nn.ReLU``, ``F.relu``, ``Tensor.relu_`` and ``relu`` are all ``relu``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from fxcompress.operators.words import OPERATORS

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "BatchNorm1d": "batch_norm",
        "BatchNorm2d": "batch_norm",
        "BatchNorm3d": "batch_norm",
        "InstanceNorm1d": "instance_norm",
        "InstanceNorm2d": "instance_norm",
        "InstanceNorm3d": "instance_norm",
        "ReLU": "relu",
        "ReLU6": "relu6",
        "LeakyReLU": "leaky_relu",
        "LogSigmoid": "logsigmoid",
        "PReLU": "prelu",
        "RReLU": "rrelu",
        "SiLU": "silu",
        # Hugging Face's own activations and norms.
        "GELUActivation": "gelu",
        "NewGELUActivation": "gelu",
        "FastGELUActivation": "gelu",
        "AccurateGELUActivation": "gelu",
        "GELUTanh": "gelu",
        "PytorchGELUTanh": "gelu",
        "QuickGELUActivation": "quick_gelu",
        "MishActivation": "mish",
        "SiLUActivation": "silu",
        "ReLUSquaredActivation": "relu_squared",
        "T5LayerNorm": "rms_norm",
    }
)
"""Operators of module classes whose name is not that of the operator in another spelling."""

_GELU = {
    "GELUActivation": "none",
    **dict.fromkeys(("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation"), "tanh"),
    **dict.fromkeys(("GELUTanh", "PytorchGELUTanh"), "tanh"),
}
# These promise their attributes to a rule, so a class that only has the name is not one.
_WEIGHTED = OPERATORS.keys()
# Torch has two names for some functions.
_ALIASES = {
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "floordiv": "floor_divide",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "log_sigmoid": "logsigmoid",
    "mod": "remainder",
    "multiply": "mul",
    "negative": "neg",
    "not_equal": "ne",
    "special_expit": "sigmoid",
    "special_log_softmax": "log_softmax",
    "special_softmax": "softmax",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "true_divide": "div",
}


def module_operator(name: str) -> str:
    """The operator of a leaf module, by the name of its class.

    Not of torch's own modules with a weight to rewrite; another class of such a name is custom.

    >>> [module_operator(name) for name in ("GELU", "LlamaRMSNorm", "MaxPool2d", "Linear")]
    ['gelu', 'rms_norm', 'max_pool2d', 'custom_linear']
    """
    if name.endswith("RMSNorm"):
        return "rms_norm"
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    op = MODULES.get(name) or words.lower().strip("_") or name
    return f"custom_{op}" if op in _WEIGHTED else op


def gelu_approximation(name: str) -> str | None:
    """``approximate`` of a class of Hugging Face that is a GELU; None for any other class.

    >>> gelu_approximation("NewGELUActivation"), gelu_approximation("GELU")
    ('tanh', None)
    """
    return _GELU.get(name)


def function_operator(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> str:
    """The operator of a call of a torch function.

    >>> names = ("__iadd__", "__radd__", "add_", "add", "multiply")
    >>> [function_operator(name, (), {}) for name in names]
    ['add', 'add', 'add', 'add', 'mul']

    Arguments that make another operator of it are part of the name:

    >>> function_operator("div", (), {"rounding_mode": "trunc"})
    'div_trunc'
    """
    op = name.strip("_") or name
    if _prefix(name):
        op = op[1:]
    op = _ALIASES.get(op, op)
    if op == "div" and kwargs.get("rounding_mode"):
        floor = kwargs["rounding_mode"] == "floor"
        return "floor_divide" if floor else f"div_{kwargs['rounding_mode']}"
    if op in ("add", "sub") and kwargs.get("alpha", 1) != 1:
        return f"{op}_multiple"
    if op == "mT" or (op in ("t", "T") and _is_matrix(args)):
        return "transpose"
    return op


def is_reflected(name: str) -> bool:
    """Whether a function takes its operands the other way round: ``1 - x`` is ``__rsub__``."""
    return _prefix(name) == "r"


def _prefix(name: str) -> str:
    """The ``i`` of ``__iadd__`` and the ``r`` of ``__radd__``; empty for any other name."""
    word = name.strip("_")
    special = name.startswith("__") and name.endswith("__") and word[:1] in ("i", "r")
    return word[0] if special and hasattr(Tensor, f"__{word[1:]}__") else ""


def _is_matrix(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].dim() == 2
