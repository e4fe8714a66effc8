"""Templates run once on random numbers, before there is a model.

A template is right if each of its outputs equals ``left @ right @ x + bias`` for the factors that
it was given: the solver predicts losses for that product, and what computes another one is of no
use in any match.  Two programs of these operators that agree on random numbers are the same
function, but for a chance of measure zero.  numpy is all that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fxcompress.forms.template import JOINT, Template

Array = NDArray[np.float64]

_ROWS = 4
_RANK = 3
_WIDTH = 7
_TOLERANCE = 1e-9
"""Relative to the largest entry; float64 rounds the sums of a template to about 1e-15 of it."""


_ERF = np.vectorize(math.erf)
_FUNCTIONS: Mapping[str, Callable[..., Array]] = {
    "relu": lambda x: np.maximum(x, 0),
    "gelu": lambda x: x * (1 + _ERF(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "tanh": np.tanh,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "cat": lambda *parts: np.concatenate(parts, -1),
}


@dataclass(frozen=True)
class Wrong:
    """An output of a template that is not the product of its factors; ``str()`` says so.

    Attributes:
        role: the matched operator whose place it takes.
        product: what it should compute, as text.
        sizes: of the trial, as text.
        error: largest difference, relative to the largest entry of the product.
    """

    role: str
    product: str
    sizes: str
    error: float

    def __str__(self) -> str:
        return f"does not compute {self.product}: off by {self.error:.0%} ({self.sizes})"


def try_template(template: Template) -> tuple[Wrong, ...]:
    """The outputs of a template that compute something else.

    A template that fits operators of certain widths only is tried on such: on square ones if not
    on any.  One that fits neither is not tried; every match compares its values once more.

    >>> from fxcompress.forms.template import build_template
    >>> graph = {
    ...     "down": {"op": "linear", "input": "$x", "weight": "fc.right"},
    ...     "bent": {"op": "relu", "input": "$down"},
    ...     "up": {"op": "linear", "input": "$bent", "weight": "fc.left"},
    ... }
    >>> template = build_template("graph:t", graph, None, {"fc": "x"})
    >>> [(wrong.role, wrong.product) for wrong in try_template(template)]
    [('fc', 'fc.left @ fc.right @ $x')]
    """
    roles = template.roles
    uneven = {role: _WIDTH + 2 + 2 * place for place, role in enumerate(roles)}
    for outs in (uneven, dict.fromkeys(roles, _WIDTH)):
        attributes = {
            role: {"in_features": _WIDTH, "out_features": out} for role, out in outs.items()
        }
        if template.misfit(attributes) is None:
            return tuple(_wrong(template, outs))
    return ()


def _wrong(template: Template, outs: Mapping[str, int]) -> Iterator[Wrong]:
    draw = np.random.default_rng(0)
    x, right = draw.normal(size=(_ROWS, _WIDTH)), draw.normal(size=(_RANK, _WIDTH))
    sources: dict[str, Array] = {f"{JOINT}.right": right}
    for role, out in outs.items():
        sources[f"{role}.right"] = right
        sources[f"{role}.left"] = draw.normal(size=(out, _RANK))
        sources[f"{role}.bias"] = draw.normal(size=out)
    values = {template.input: x}
    for step in template.steps:
        inputs = [values[name] for name in step.inputs]
        if step.op == "linear":
            found = inputs[0] @ sources[step.weight].T
            values[step.name] = found + sources[step.bias] if step.bias else found
        else:
            values[step.name] = _FUNCTIONS[step.op](*inputs)
    biases = {step.bias for step in template.steps}
    owner = JOINT if len(outs) > 1 else template.roles[0]
    for role, node in template.outputs:
        product = f"{role}.left @ {owner}.right @ ${template.input}"
        wanted = x @ right.T @ sources[f"{role}.left"].T
        if f"{role}.bias" in biases:
            product += f" + {role}.bias"
            wanted = wanted + sources[f"{role}.bias"]
        error = float(np.abs(values[node] - wanted).max() / np.abs(wanted).max())
        if not error <= _TOLERANCE:
            sizes = f"r = {_RANK}, {_WIDTH} to {outs[role]} features"
            yield Wrong(role, product, sizes, error)
