"""Hidden values on whose number of channels a model insists, found by running it with fewer.

A graph shows that ``x.view(-1, 96)`` was given the number of channels, and not whether 96 stands in
the source or comes from ``x.shape[-1]``; and not that a size was read to be used elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fxcompress.forms import Body, Shape
from fxcompress.forms.narrow import NARROW, rows_of
from fxcompress.graph.inputs import Forward, run_model
from fxcompress.operators.applied import operator_at
from fxcompress.operators.modules import canonical_weight, shape_of
from fxcompress.pipeline.equal import GIVEN, HiddenSites
from fxcompress.rewrite import skeleton
from fxcompress.rewrite.substitute import Provenance, substitute, substituting


def rigid_in(
    model: nn.Module, examples: Sequence[Any], forward: Forward | None
) -> Callable[[Sequence[HiddenSites]], Iterator[tuple[HiddenSites, str]]]:
    """Says which hidden values of a model cannot have fewer channels, and why.

    All of them together are tried first, and one by one only if that fails.

    Args:
        model: the working copy.
        examples: batches to run it on.
        forward: how to call it.
    """

    def rigid(hidden: Sequence[HiddenSites]) -> Iterator[tuple[HiddenSites, str]]:
        if not hidden or _failure(model, hidden, examples, forward) is None:
            return
        for each in hidden:
            if (error := _failure(model, [each], examples, forward)) is not None:
                yield each, f"the model {GIVEN}, and runs with no other: {error}"

    return rigid


def _failure(
    model: nn.Module,
    hidden: Sequence[HiddenSites],
    examples: Sequence[Any],
    forward: Forward | None,
) -> str | None:
    """What a model raises with fewer channels of hidden values; None if it runs.

    Every value has another number of them, so that none stands for that of another.
    """
    trial = skeleton(model)
    nn.Module.train(trial, False)
    with torch.no_grad():
        with substituting(trial) as places:
            for at, each in enumerate(hidden):
                shapes = [shape_of(operator_at(trial, path)) for path in each.paths]
                n = shapes[-1].in_features
                width = min(n - 1, 2 + at % max(n - 3, 1))  # one channel would be broadcast
                body = _some_channels(trial, each, shapes, width)
                rule, place = each.match.rule_id, each.match.location
                origins = [Provenance(rule, place, p, NARROW.name, width) for p in each.paths]
                substitute(trial, body, NARROW, origins, places, [h.name for h in each.held])
        try:
            for example in examples:
                run_model(trial, example, forward)
        except Exception as error:  # whatever the code of a model does
            return f"{type(error).__name__}: {error}".splitlines()[0]
    return None


def _some_channels(
    model: nn.Module, hidden: HiddenSites, shapes: Sequence[Shape], width: int
) -> Body:
    """The first channels of a hidden value, with the weights that they have."""
    layers = [operator_at(model, path) for path in hidden.paths]
    *made, read = [canonical_weight(layer).detach() for layer in layers]
    kept = torch.arange(width, device=read.device)
    n = shapes[-1].in_features
    rows = [
        shape.by_outputs(weight)[rows_of(kept, shape.out_features, n)]
        for shape, weight in zip(shapes, made, strict=False)
    ]
    body = NARROW.empty(shapes, width)
    biases = [getattr(layer, "bias", None) for layer in layers]
    NARROW.fill_from(
        shapes, body, (kept, read.index_select(shapes[-1].in_axis, kept), *rows), biases
    )
    return body
