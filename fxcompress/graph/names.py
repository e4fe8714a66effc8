"""Names of operators: ``nn.ReLU``, ``F.relu``, ``Tensor.relu_`` and ``relu`` are all ``relu``."""

from __future__ import annotations

import re
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

MODULES: Mapping[str, str] = MappingProxyType(
    {
        "Conv1d": "conv1d",
        "Conv2d": "conv2d",
        "Conv3d": "conv3d",
        "ConvTranspose1d": "conv_transpose1d",
        "ConvTranspose2d": "conv_transpose2d",
        "ConvTranspose3d": "conv_transpose3d",
        "BatchNorm1d": "batch_norm",
        "BatchNorm2d": "batch_norm",
        "BatchNorm3d": "batch_norm",
        "InstanceNorm1d": "instance_norm",
        "InstanceNorm2d": "instance_norm",
        "InstanceNorm3d": "instance_norm",
        "ReLU": "relu",
        "ReLU6": "relu6",
        "LeakyReLU": "leaky_relu",
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

_TANH = {
    *("NewGELUActivation", "FastGELUActivation", "AccurateGELUActivation"),
    *("GELUTanh", "PytorchGELUTanh"),
}
# Torch has two names for some functions.
_ALIASES = {
    "absolute": "abs",
    "clip": "clamp",
    "concat": "cat",
    "concatenate": "cat",
    "divide": "div",
    "floordiv": "floor_divide",
    "multiply": "mul",
    "negative": "neg",
    "subtract": "sub",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "true_divide": "div",
}


def module_operator(name: str) -> str:
    """The operator of a leaf module, by the name of its class.

    >>> [module_operator(name) for name in ("GELU", "LlamaRMSNorm", "MaxPool2d", "MyTopKRouter")]
    ['gelu', 'rms_norm', 'max_pool2d', 'my_top_k_router']
    """
    if name in MODULES:
        return MODULES[name]
    if name.endswith("RMSNorm"):
        return "rms_norm"
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name)
    return words.lower().strip("_") or name


def is_tanh_gelu(name: str) -> bool:
    """Whether a class of Hugging Face, by its name, is GELU in its approximation by tanh."""
    return name in _TANH


def function_name(function: Any) -> str:
    """Name of a torch function; of the attribute for ``Tensor.T.__get__``."""
    packet = getattr(function, "overloadpacket", None)
    name = getattr(packet or function, "__name__", str(function)).split(".")[0]
    if name in ("__get__", "__set__"):
        descriptor = getattr(function, "__self__", None)
        return getattr(getattr(descriptor, "fget", descriptor), "__name__", "attribute")
    return name


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
    special = name.startswith("__") and name.endswith("__") and word[1:]
    return word[0] if special and word[0] in "ir" and hasattr(torch, word[1:]) else ""


def _is_matrix(args: tuple[Any, ...]) -> bool:
    return bool(args) and isinstance(args[0], Tensor) and args[0].dim() == 2
