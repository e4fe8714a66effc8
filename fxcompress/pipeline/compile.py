"""``compile`` and ``plan``: the stages in order.

record → match → calibrate → spectrum → budget → rewrite, each a function over frozen values
(docs/how-it-works.md).  The model that was given is only read;
all work happens on a copy of its structure that shares its parameters until the end.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Sequence
from os import PathLike
from typing import Any, TypeVar

import torch
from torch import nn

from fxcompress.collective import fingerprint, joined
from fxcompress.errors import FxcompressWarning, RecordError, RuleError
from fxcompress.graph.inputs import Forward
from fxcompress.graph.wrappers import unwrapped
from fxcompress.isvt.rounds import iterate
from fxcompress.metric import Loss
from fxcompress.pipeline.analysis import analyse
from fxcompress.pipeline.build import rewrite
from fxcompress.pipeline.decide import foreseen, make_plan
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.rigid import rigid_in
from fxcompress.pipeline.sites import Group, gather_sites
from fxcompress.pipeline.survey import legality_in, match_model, working_copy
from fxcompress.plans.plan import Plan, attach_plan
from fxcompress.progress import stages
from fxcompress.rewrite import is_offloaded, record_operators, resident
from fxcompress.rules import Explanation, Rules, choices, read_rules, suggest

M = TypeVar("M", bound=nn.Module)

DIFFERENT = (
    "from equal sums they computed other results, as on different hardware or with another number "
    "of threads. Make these equal, or compress in one process (alone=True), save there, and load "
    "in the others"
)


def compile(
    model: M,
    rules: Rules,
    calibration: Iterable[Any] | None = None,
    *,
    keep: float | None = None,
    unit: str | None = None,
    memory: int | str | None = None,
    exclude: str | Iterable[str] | None = None,
    metric: str | None = None,
    seed: int | None = None,
    inplace: bool = False,
    examples: Sequence[Any] | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
    alone: bool = False,
    checkpoint: str | PathLike[str] | None = None,
) -> M:
    """Compress a model: same class, same ``forward``, same ``generate()``, fewer parameters.

    Args:
        model: any module that runs; unchanged unless ``inplace``.  What ``torch.compile``,
            ``DataParallel`` or ``DistributedDataParallel`` made of one is taken out of its wrapper;
            the result is not wrapped.
        rules: a rule file, the name of a preset (``"decoder"``, ``"encoder"``,
            ``"every-linear"``), or a rule set.
        calibration: batches of inputs, gone through once; a batch is a tensor (one positional
            argument), a tuple (several) or a mapping (keyword arguments).  The Fisher metric
            draws its own labels, so none are needed.
        keep: overrides ``budget.keep`` of the rules.
        unit: overrides ``budget.unit``: ``"parameters"``, ``"macs"``, ``"bytes"`` or ``"latency"``,
            which is of the matched operators.
        memory: what the work may take beside the model and the data: bytes, or text as ``"8GiB"``;
            most of what is free if neither this nor the rules say.  The result is the same: with
            less memory the model is run more often, and what has to wait is written to files.
        exclude: globs on module paths (``"*.lm_head"``), one or several: what they match stays
            dense, whatever the rules say.
        metric: overrides ``metric.kind``: ``"kfac"``, ``"activation"``, ...
        seed: overrides ``metric.seed``, of the labels that the Fisher metric draws.
        inplace: change ``model`` itself and return it.
        examples: batches to record the graph on, if the first calibration batch does not show
            all that the model can do.
        loss: ``loss(output, batch)``, one negative log-likelihood per prediction, in place of
            labels sampled from the model's own output.
        forward: ``forward(model, batch)``, for batches of another kind.
        progress: show progress on stderr; by default if that is a terminal.
        alone: whether this process of ``torch.distributed`` works by itself.  Otherwise all of them
            call this, each with its own batches, which are one set of data together, and all get
            the same result.
        checkpoint: a directory for what was found out so far: the moments of every block that was
            measured, or the state after every round (``solver: {rounds: 5, steps: 20}``).  A run
            that was interrupted goes on from there, to the same numbers.

    Returns:
        A new model (an ``fx.GraphModule`` for an ``fx.GraphModule``, with the matched nodes
        substituted in its graph).  :func:`fxcompress.plan_of` tells what was done to it.

    Raises:
        RuleError: the rules cannot be used, or match nothing at all.
        RecordError: the model does not run on the example.
        CalibrationError: calibration data is missing, rejected or not finite.
        BudgetError: the budget cannot be met; the message says the least that can.
        MemoryLimitError: ``memory`` is too little; the message says what would do.
        ProcessError: another process stops, does not answer, or has another model.
        RewriteError: the rewritten model does not run.
        CheckpointError: ``checkpoint`` holds another run.
    """
    given = unwrapped(model)
    model = resident(given)
    if inplace and model is not given:
        raise RecordError(
            f"accelerate put hooks on this {type(model).__name__}, so it cannot be compressed in "
            "place: leave inplace out; what is returned takes no memory for weights that are not "
            "there"
        )
    loaded = read_rules(
        rules, keep=keep, unit=unit, memory=memory, exclude=exclude, metric=metric, seed=seed
    )
    by_itself = alone or loaded.rules.solver.iterative  # training needs the same data everywhere
    with torch.inference_mode(False), joined(by_itself) as processes, stages(progress) as show:
        request = Request(
            show, calibration, examples, loss, forward, checkpoint, processes=processes
        )
        if loaded.rules.solver.iterative:
            rewritten, planned = iterate(model, loaded, request, inplace=inplace)
        else:
            analysis = analyse(model, loaded, request)
            inplace = inplace or is_offloaded(given)  # of the copy, which holds no memory itself
            rewritten, planned = rewrite(model, analysis, inplace=inplace)
        processes.require_same(
            lambda: (planned.model_dump_json(), fingerprint(rewritten)), DIFFERENT
        )
    planned = planned.model_copy(update={"seconds": dict(show.seconds)})
    attach_plan(rewritten, planned)
    for note in planned.warnings:
        warnings.warn(note, FxcompressWarning, stacklevel=2)
    return rewritten


def plan(
    model: nn.Module,
    rules: Rules,
    calibration: Iterable[Any] | None = None,
    *,
    keep: float | None = None,
    unit: str | None = None,
    memory: int | str | None = None,
    exclude: str | Iterable[str] | None = None,
    metric: str | None = None,
    seed: int | None = None,
    examples: Sequence[Any] | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
    alone: bool = False,
) -> Plan:
    """The ranks that :func:`compile` would choose, without touching the model.

    Arguments and errors as there.
    """
    model = resident(unwrapped(model))
    loaded = read_rules(
        rules, keep=keep, unit=unit, memory=memory, exclude=exclude, metric=metric, seed=seed
    )
    with torch.inference_mode(False), joined(alone) as processes, stages(progress) as show:
        request = Request(show, calibration, examples, loss, forward, processes=processes)
        analysis = analyse(model, loaded, request)
        planned = foreseen(analysis, make_plan(analysis, {}))
        processes.require_same(planned.model_dump_json, DIFFERENT)
    return planned.model_copy(update={"seconds": dict(show.seconds), "warnings": analysis.notes})


def explain(
    model: nn.Module,
    rules: Rules,
    example: Any = None,
    *,
    rule: str | None = None,
    calibration: Iterable[Any] | None = None,
    keep: float | None = None,
    unit: str | None = None,
    memory: int | str | None = None,
    exclude: str | Iterable[str] | None = None,
    metric: str | None = None,
    seed: int | None = None,
    loss: Loss | None = None,
    forward: Forward | None = None,
    progress: bool | None = None,
    alone: bool = False,
) -> Explanation:
    """Which operators each rule matches, and why the others not, from the real matcher.

    Args:
        model: any module that runs.
        rules: as in :func:`compile`.
        example: one batch to record the graph on; the first of ``calibration`` if left out.
        rule: explain the rule with this id only.
        calibration: as in :func:`compile`.  With it the budget is solved as well, and the
            explanation tells what is left dense and why.
        keep, unit, memory, exclude, metric, seed, loss, forward, progress, alone: as in
            :func:`compile`.

    Raises:
        RuleError: the rules cannot be used, or none has the id.
        RecordError, CalibrationError, BudgetError: as in :func:`compile`.
    """
    model = resident(unwrapped(model))
    loaded = read_rules(
        rules, keep=keep, unit=unit, memory=memory, exclude=exclude, metric=metric, seed=seed
    )
    ids = [each.id for each in loaded.rules.rules]
    if rule is not None and rule not in ids:
        raise RuleError(f"no rule has the id '{rule}'; {suggest(rule, ids) or choices(ids)}")
    if calibration is None:
        if example is None:
            raise RecordError("explain runs the model once: give it an example batch")
        work = working_copy(model)
        recording = record_operators(work, [example], forward=forward)
        matched = match_model(work, loaded, recording)
        templates = {template.name: template for template in loaded.templates.values()}
        _, groups, refused = gather_sites(
            work, recording, matched, templates, legality_in(work, recording),
            rigid_in(work, [example], forward),
        )  # fmt: skip
        return Explanation.of(matched, rule=rule, refused=refused, hidden=_hidden(groups))
    examples = None if example is None else [example]
    with torch.inference_mode(False), joined(alone) as processes, stages(progress) as show:
        request = Request(show, calibration, examples, loss, forward, processes=processes)
        analysis = analyse(model, loaded, request)
        planned = make_plan(analysis, {})
    dense = {site.weight: site.reason for site in planned.sites if site.form is None}
    return Explanation.of(
        analysis.matched,
        dense,
        rule=rule,
        refused=analysis.refused,
        hidden=_hidden(analysis.groups),
    )


def _hidden(groups: Iterable[Group]) -> dict[str, dict[str, str]]:
    """Weights of what reads hidden values, with those that make them, and their paths."""
    return {
        group.sites[-1].weight: {site.weight: site.name for site in group.sites[:-1]}
        for group in groups
        if group.hidden
    }
