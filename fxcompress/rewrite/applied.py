"""Weights that functions apply become operators: objects in their places run these.

See :mod:`fxcompress.operators.applied` for before and after.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from typing import Any, Literal

import torch
from torch import nn

from fxcompress.errors import RecordError
from fxcompress.graph.eligible import applied_shape, piles
from fxcompress.graph.inputs import Forward
from fxcompress.graph.recorder import Recording, record
from fxcompress.operators.applied import PRODUCT, Applied, hold, release
from fxcompress.operators.modules import parse_shape
from fxcompress.operators.shape import Shape
from fxcompress.operators.stacked import Stack, pile, restore, stack_at, ways
from fxcompress.plans.plan import SitePlan


def record_operators(
    model: nn.Module, examples: Sequence[Any], *, forward: Forward | None = None
) -> Recording:
    """Record a model in which all that can be an operator is one.

    Args:
        model: objects are put in the places of weights that its forwards apply by functions.
        examples, forward: as of :func:`fxcompress.graph.recorder.record`.

    Raises:
        RecordError: as there.
    """
    recording = _piled(model, record(model, examples, forward=forward), examples, forward)
    found = {
        name: shape
        for name, facts in recording.weights.items()
        if facts.applied and not isinstance(shape := applied_shape(model, facts), str)
    }
    if not found:
        return recording
    try:
        held = _held(model, examples, forward, found)
    except RecordError:  # a forward takes nothing but a tensor: that of which class?
        held = None
        classes: dict[type, dict[str, Shape]] = defaultdict(dict)
        for name, shape in found.items():
            classes[type(model.get_submodule(name.rpartition(".")[0]))][name] = shape
        for these in classes.values():
            try:
                held = _held(model, examples, forward, these)
            except RecordError:
                continue
    return held or record(model, examples, forward=forward)


def _piled(
    model: nn.Module, recording: Recording, examples: Sequence[Any], forward: Forward | None
) -> Recording:
    """The recording with objects in the places of stacks, of which one matrix at a time is applied.

    Args:
        model: objects are put in.
        recording: of it without them.
        examples, forward: that it was recorded on.
    """
    stacks = {
        name: model.get_parameter(name)
        for name, facts in recording.weights.items()
        if piles(model, facts)
    }
    for way in (0, 1):
        if not stacks:
            break
        for name, parameter in stacks.items():
            pile(model, name, ways(parameter)[way])
        try:
            recording = record(model, examples, forward=forward)
            idle = {name for name in stacks if not _runs(recording, name)}
        except RecordError:
            idle = {*stacks}
        for name in idle:
            restore(model, name, stacks[name])
        stacks = {name: stacks[name] for name in idle}
        if idle:
            recording = record(model, examples, forward=forward)
    return recording


def _runs(recording: Recording, stack: str) -> bool:
    """Whether a matrix of a stack is applied, and none of them otherwise."""
    facts = [each for name, each in recording.weights.items() if name.startswith(f"{stack}.")]
    return any(each.calls for each in facts) and not any(each.strangers for each in facts)


def _held(
    model: nn.Module, examples: Sequence[Any], forward: Forward | None, found: dict[str, Shape]
) -> Recording:
    """The recording with objects in the places of these weights, of which each is of use.

    Raises:
        RecordError: the model does not run with them; they are taken out again.
    """
    for name, shape in found.items():
        hold(model, name, shape)
    try:
        recording = record(model, examples, forward=forward)
    except RecordError:
        for name in found:
            release(model, name)
        raise
    idle = [name for name in found if not recording.weights[f"{name}.{PRODUCT}.weight"].calls]
    for name in idle:
        release(model, name)
    return record(model, examples, forward=forward) if idle else recording


def idle_matrices(model: nn.Module, recording: Recording) -> frozenset[str]:
    """Names of the matrices of stacks that no recorded batch reached: experts without a row."""
    return frozenset(
        name
        for name, facts in recording.weights.items()
        if not facts.calls
        and isinstance(stack_at(model, name.removesuffix(f".{PRODUCT}.weight")), Stack)
    )


AppliedAs = Literal["", "as stored", "transposed"]


def planned_weight(model: nn.Module, weight: str) -> tuple[str, AppliedAs]:
    """What a plan says of a weight: its name in the model as it was given, and how it is applied.

    Args:
        model: with objects in the places of weights.
        weight: its name there.
    """
    holder = weight.removesuffix(f".{PRODUCT}.weight")
    held = model.get_submodule(holder) if holder != weight else None
    if not isinstance(held, Applied):
        return weight, ""
    return holder, "transposed" if held.applies.is_mirrored else "as stored"


def hold_planned(
    model: nn.Module, sites: Iterable[SitePlan], only: Collection[str] | None = None
) -> list[str]:
    """Put objects in the places of weights that a plan has as operators; changes ``model``.

    Args:
        model: as it was given.
        sites: of the plan.
        only: names of sites; None for all of them.

    Returns:
        What is not there.
    """
    problems = []
    for site in sites:
        if not site.applied or (only is not None and site.name not in only):
            continue
        shape = parse_shape(site.operator, site.bias, getattr(torch, site.dtype))
        mirrored = shape.mirrored() if site.applied == "transposed" else shape
        try:
            if mirrored is None:
                raise ValueError(f"{shape} is not stored transposed")
            _hold(model, site.weight, mirrored)
        except (AttributeError, ValueError) as error:
            problems.append(str(error))
    return problems


def hold_like(model: nn.Module, other: nn.Module) -> None:
    """Put objects where another copy of the same model has them; changes ``model``."""
    for path, module in other.named_modules():
        if isinstance(module, Applied):
            _hold(model, path, module.applies)


def _hold(model: nn.Module, weight: str, shape: Shape) -> None:
    """Put an object in the place of a weight, or of the stack that it is a matrix of."""
    found = stack_at(model, weight)
    if isinstance(found, nn.Parameter):
        pile(model, weight.rpartition(".")[0], shape)
    elif found is None:
        hold(model, weight, shape)
