"""Operators of all kinds: told from modules and calls, and read from text."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fxcompress.operators.calls import Application, Call
from fxcompress.operators.kind import Kind
from fxcompress.operators.shape import CPU, Shape
from fxcompress.operators.words import KINDS as WORDS

KINDS: tuple[Kind, ...] = tuple(
    importlib.import_module(f"fxcompress.operators.{words.name}").KIND for words in WORDS
)
"""All kinds of operators."""


def kind_of(module: nn.Module) -> Kind | None:
    """The kind that a module is an operator of, itself or by the class it was made from."""
    return next((kind for kind in KINDS if kind.owns(module)), None)


def shape_of(module: nn.Module) -> Shape:
    """Shape, type and device of a module that is, or looks like, an operator with a weight.

    Raises:
        ValueError: it does not.
    """
    return (kind_of(module) or KINDS[0]).shape(module)


def canonical_weight(module: nn.Module) -> Tensor:
    """The weight of a module in canonical layout, whichever way it is stored."""
    weight: Tensor = module.weight  # type: ignore[assignment]
    return shape_of(module).canonical(weight)


def application(
    name: str, args: tuple[Any, ...], kwargs: dict[str, Any], is_weight: Callable[[Any], bool]
) -> Application | None:
    """What a call of a torch function applies to what; None if it applies no weight.

    Args:
        name: of the function.
        args, kwargs: what it is called with.
        is_weight: whether an argument is a weight.
    """
    call = Call(name, args, kwargs)
    found = (kind.application(call, is_weight) for kind in KINDS)
    return next((each for each in found if each is not None), None)


MOST_CHANNELS = 2**28
"""Features, channels, rows or taps of an operator that is read from a text."""

MOST_WEIGHTS = 2**42
"""Entries of its weight."""


def parse_shape(text: str, bias: bool, dtype: torch.dtype, device: torch.device = CPU) -> Shape:
    """The operator that ``str()`` describes.

    >>> parse_shape("conv1d 6→4 3, padding same, groups 2", True, torch.float32).matrix
    (2, 2, 9)

    Args:
        text: as of ``str()``.
        bias: whether it has one.
        dtype: of the weight.
        device: of the weight.

    Raises:
        ValueError: there is no such operator, or it is larger than any that fits into memory.
    """
    parsed = (kind.parse(text, bias, dtype, device) for kind in KINDS)
    made = next((each for each in parsed if each is not None), None)
    if made is None or str(made) != text or (bias and not made.bias):
        raise ValueError(f"'{text}' describes no operator")
    sizes = (made.in_features, made.out_features, *made.kernel_size)
    taps = torch.Size(made.kernel_size).numel()
    if min(*sizes, taps) < 1 or max(*sizes, taps) > MOST_CHANNELS or made.weights > MOST_WEIGHTS:
        raise ValueError(f"'{text}' is out of all bounds")
    return made
