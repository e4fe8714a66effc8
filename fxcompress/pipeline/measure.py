"""``measure``: the KL divergence that every rewritten site causes by itself, beside the prediction.

before::

    dense model:   ... → up → act → down → ...        # outputs p

for each site in turn::

    copy of it:    ... → up → act → down' → ...       # down' as in the compressed model, outputs q

``KL(p ‖ q)`` per prediction is what the plan predicted for ``down``.  Modules are exchanged in a
copy that shares the parameters; the models themselves are only read.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from operator import length_hint
from typing import Any, cast, get_args

import numpy as np
import torch
from torch import fx, nn

from fxcompress.errors import CalibrationError, FxcompressWarning, RewriteError
from fxcompress.graph.inputs import (
    Forward,
    device_of,
    run_model,
    to_device,
)
from fxcompress.graph.padding import follow_padding, settle
from fxcompress.graph.wrappers import unwrapped
from fxcompress.metric.output import (
    SEVERAL,
    Family,
    Loss,
    OutputKind,
    described,
    divergence,
    heads,
    loss_sum,
)
from fxcompress.operators.applied import operator_at
from fxcompress.pipeline.agreement import assess, mean_with_error, units
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.survey import iterate, working_copy
from fxcompress.plans.plan import (
    Fidelity,
    HeldBack,
    Plan,
    SitePlan,
    history,
    plan_of,
    update_plan,
)
from fxcompress.progress import stages
from fxcompress.rewrite import (
    apply_plan,
    empty_bodies,
    fold_batch_norms,
    hold_planned,
    mismatches,
    resident,
    skeleton,
)
from fxcompress.rewrite.replace import replace_module


@dataclass(frozen=True, eq=False)
class Exchange:
    """What takes the place of a part of the dense model.

    Attributes:
        modules: of the dense model, each with another one.
        parameters: by themselves: a module, the name in it, and another value.
    """

    modules: Sequence[tuple[nn.Module, nn.Module]]
    parameters: Sequence[tuple[nn.Module, str, nn.Parameter]] = ()


def measure(
    model: nn.Module,
    small: nn.Module,
    batches: Iterable[Any],
    *,
    output: OutputKind = "auto",
    forward: Forward | None = None,
    progress: bool | None = None,
) -> Fidelity:
    """Measure what every rewritten site loses by itself, and the compressed model as a whole.

    It takes a forward pass for each site and batch.  Afterwards the plan of ``small`` holds the
    result, so that ``plan_of(small)``, ``diff(model, small)`` and ``save(small, ...)`` have it.

    Args:
        model: the dense model, as it was given to :func:`fxcompress.compile`; only read.
        small: what :func:`fxcompress.compile` or :func:`fxcompress.load` returned.
        batches: as for calibration, but other data; gone through once.
        output: family of the output distribution, as in the rules; by default the one that the plan
            was made for.  Of several outputs it has to be given.
        forward: ``forward(model, batch)``, for batches of another kind.
        progress: show progress on stderr; by default if that is a terminal.

    Returns:
        Predicted and measured losses, their rank correlation, and warnings where they part.

    Raises:
        RewriteError: ``small`` carries no plan, nothing is rewritten in it, or ``model`` is not
            what the plan was made for.
        CalibrationError: no batches, or a batch on which a model fails or is not finite.
    """
    plan = plan_of(small)
    model, small = resident(unwrapped(model)), resident(unwrapped(small))
    _require_pair(model, small, plan)
    kind = _family(output, plan)
    with torch.inference_mode(False), torch.no_grad(), stages(progress) as show:
        dense = working_copy(model)
        hold_planned(dense, plan.sites)
        fold_batch_norms(dense, plan.folded)
        compressed = skeleton(small)
        for each in (dense, compressed):
            nn.Module.train(each, False)  # torch.export forbids .eval() on what it returns
        source, entries = _source(model, compressed, plan), {site.name: site for site in plan.sites}
        exchanges = {
            name: _exchange(dense, source, [entries[site] for site in sites])
            for name, sites in units(plan).items()
        }
        runs = len(exchanges) + 2
        total = length_hint(batches) * runs or None
        tick = show.stage("measure", total)
        found = [
            _measure_batch(dense, compressed, exchanges, batch, index, kind, forward, tick)
            for index, batch in enumerate(iterate("batches", batches))
        ]
    if not sum(batch.predictions for batch in found):
        raise CalibrationError(
            "there is nothing to measure on: the iterable of batches was empty or exhausted, or "
            "its batches hold no predictions; pass a list of batches or a fresh DataLoader"
        )
    fidelity = assess(
        plan,
        np.array([batch.singly for batch in found]),
        np.array([batch.whole for batch in found]),
        np.array([batch.predictions for batch in found]),
        found[0].output,
    )
    update_plan(small, plan.model_copy(update={"fidelity": fidelity}))
    for note in fidelity.warnings:
        warnings.warn(note, FxcompressWarning, stacklevel=2)
    return fidelity


def measure_whole(
    dense: nn.Module,
    small: nn.Module,
    batches: Sequence[Any],
    kind: OutputKind,
    request: Request,
) -> HeldBack | None:
    """A compressed model beside the dense one, on batches that it was not fitted to.

    Args:
        dense: a copy of ours, which is left in eval mode.
        small: the compressed model, in any mode; only read.
        batches: of this process; None is returned if there are none in any.
        kind: families of the outputs.
        request: with a loss of the user's the rise of its mean is measured, not the divergence.

    Raises:
        CalibrationError: a batch on which a model fails or is not finite.
    """
    if not any(request.processes.gathered(bool(batches))):
        return None
    loss, forward = request.loss, request.forward
    tick = request.show.stage("measure", 2 * len(batches))
    compressed = skeleton(small)
    for each in (dense, compressed):
        nn.Module.train(each, False)
    sums: list[float] = []
    counts: list[int] = []
    output = "loss"
    with torch.no_grad():
        for index, batch in enumerate(batches):
            if loss is None:
                one = _measure_batch(dense, compressed, {}, batch, index, kind, forward, tick)
                lost, count, output = one.whole, one.predictions, one.output
            else:
                before, count = _loss_on(dense, loss, batch, forward)
                tick()
                after, _ = _loss_on(compressed, loss, batch, forward)
                tick()
                lost = after - before
            sums.append(lost)
            counts.append(count)
    found = [part for part in request.processes.gathered((sums, counts, output)) if part[1]]
    sums, counts = [x for part in found for x in part[0]], [n for part in found for n in part[1]]
    mean, error = mean_with_error(np.array(sums), np.array(counts))
    return HeldBack(
        batches=len(counts),
        predictions=sum(counts),
        output=found[0][2],
        measured=mean,
        error=error,
    )


def _loss_on(
    model: nn.Module, loss: Loss, batch: Any, forward: Forward | None
) -> tuple[float, int]:
    with follow_padding(model, batch) as (batch, mask):
        result = run_model(model, batch, forward)
        total, count = loss_sum(loss, result, to_device(batch, device_of(model)), mask)
    return float(total), count


def _require_pair(model: nn.Module, small: nn.Module, plan: Plan) -> None:
    """Check that ``small`` is the compressed form of ``model``."""
    problems = mismatches(model, plan)
    if len(history(model)) != len(plan.earlier):
        problems = "it is compressed itself: pass the model that was given to compile"
    if problems:
        raise RewriteError(f"the plan was made for another model than this one: {problems}")
    if not plan.rewritten:
        raise RewriteError("nothing is rewritten in the compressed model, so nothing can be lost")
    devices = device_of(model), device_of(small)
    if devices[0] != devices[1]:
        raise RewriteError(
            f"the models are on two devices, {devices[0]} and {devices[1]}: move one of them"
        )


def _family(output: OutputKind, plan: Plan) -> OutputKind:
    """The family asked for, or else that of the calibration, which may have had none."""
    planned = plan.calibration.get("output", "none")
    if output != "auto" or planned in ("none", "loss") or str(planned).startswith(SEVERAL):
        return output
    for family in get_args(Family):
        if family == planned:
            return cast(Family, family)
    raise CalibrationError(
        f"the plan was made for several outputs ({planned}): name them as in the rules, "
        'output={"0": "categorical", ...}'
    )


def _source(model: nn.Module, compressed: nn.Module, plan: Plan) -> nn.Module:
    """A tree of modules with the rewritten layer of every site in its place.

    In an fx graph there are none, only nodes.  They come from a tree of the same modules that is
    rewritten by facades, with the parameters of the compressed model.
    """
    if not isinstance(compressed, fx.GraphModule):
        return compressed
    tree = nn.Module()
    for name, child in working_copy(model)._modules.items():
        tree.add_module(name, child)
    hold_planned(tree, plan.sites)
    fold_batch_norms(tree, plan.folded)
    apply_plan(tree, plan.model_copy(update={"folded": ()}), empty_bodies(plan, model))
    nn.Module.train(tree, False)
    for site in plan.rewritten:
        facade: Any = operator_at(tree, site.name)
        values = operator_at(compressed, site.name).state_dict()
        alone = not site.bundle or site.then is not None
        (facade.body if alone else facade).load_state_dict(values, assign=True)
        for held in site.held:
            if (module := _module(tree, held.name)) is not None:
                values = compressed.get_submodule(held.name).state_dict()
                module.load_state_dict(values, assign=True)
            else:
                owner, key = _owner(tree, held.name)
                owner._parameters[key] = compressed.get_parameter(held.name)
    return tree


def _exchange(dense: nn.Module, source: nn.Module, sites: Sequence[SitePlan]) -> Exchange:
    """The sites that are rewritten together, and what has entries of the channels between them."""
    modules: list[tuple[nn.Module, nn.Module]] = []
    parameters: list[tuple[nn.Module, str, nn.Parameter]] = []
    for site in sites:
        find = nn.Module.get_submodule if site.reader else operator_at
        modules.append((find(dense, site.name), find(source, site.name)))
        for held in site.held:
            if (module := _module(dense, held.name)) is not None:
                modules.append((module, source.get_submodule(held.name)))
            else:
                parameters.append((*_owner(dense, held.name), source.get_parameter(held.name)))
    return Exchange(modules, parameters)


def _module(model: nn.Module, name: str) -> nn.Module | None:
    """A module of a model; None if the name is that of a parameter."""
    try:
        return model.get_submodule(name)
    except AttributeError:
        return None


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    """The module that has a parameter, and its name there."""
    path, _, key = name.rpartition(".")
    return model.get_submodule(path), key


@dataclass(frozen=True)
class _Batch:
    """KL on one batch, in nats over all its predictions: of every exchange, and of the whole."""

    singly: list[float]
    whole: float
    predictions: int
    output: str


def _measure_batch(
    dense: nn.Module,
    compressed: nn.Module,
    exchanges: Mapping[str, Exchange],
    batch: Any,
    index: int,
    kind: OutputKind,
    forward: Forward | None,
    tick: Callable[[], None],
) -> _Batch:
    def run(model: nn.Module, what: str) -> Any:
        try:
            result = run_model(model, batch, forward)
        except Exception as error:
            raise CalibrationError(
                f"the {what} rejected batch {index}: {type(error).__name__}: {error}"
            ) from error
        tick()
        return result

    def lost(model: nn.Module, what: str) -> tuple[float, int]:
        result = run(model, what)
        try:
            return divergence(reference, result, kind, mask)
        except CalibrationError as error:
            raise CalibrationError(f"on batch {index}, the {what}: {error}") from error

    with follow_padding(dense, batch) as (batch, mask):
        reference = run(dense, "dense model")
    settle(mask, reference)
    singly = []
    for name, exchange in exchanges.items():
        with _exchanged(dense, exchange):
            singly.append(lost(dense, f"model with only {name} rewritten")[0])
    whole, predictions = lost(compressed, "compressed model")
    found = heads(reference, kind, mask)
    families = ", ".join(dict.fromkeys(head.family for head in found))
    name = described(found, kind) if kind == "auto" else families
    return _Batch(singly, whole, predictions, name)


@contextmanager
def _exchanged(model: nn.Module, exchange: Exchange) -> Iterator[None]:
    before = [(owner, key, owner._parameters[key]) for owner, key, _ in exchange.parameters]
    for old, new in exchange.modules:
        replace_module(model, old, new)
    for owner, key, value in exchange.parameters:
        owner._parameters[key] = value
    try:
        yield
    finally:
        for old, new in exchange.modules:
            replace_module(model, new, old)
        for owner, key, kept in before:
            owner._parameters[key] = kept
