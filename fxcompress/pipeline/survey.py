"""What is known of a model before any data is measured: its graph, matches, sites, and room."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from operator import length_hint
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from fxcompress.checkpoint import Checkpoint, mark_of
from fxcompress.collective import Processes, fingerprint
from fxcompress.errors import CalibrationError, RecordError, RuleError
from fxcompress.graph.eligible import obstacle
from fxcompress.graph.inputs import to_device
from fxcompress.graph.operator import Operator
from fxcompress.graph.paths import above
from fxcompress.graph.recorder import Recording, record, together
from fxcompress.graph.wrappers import replaced_forward, unwrapped
from fxcompress.metric import METRICS
from fxcompress.metric.output import Family, declared_by
from fxcompress.pipeline.data import Data, dealt
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.rigid import rigid_in
from fxcompress.pipeline.room import Needs, Room, make_room
from fxcompress.pipeline.sites import Group, Site, gather_sites
from fxcompress.plans.plan import Folded, Size, history
from fxcompress.processes import digest_of
from fxcompress.progress import Progress
from fxcompress.rewrite import (
    Factorized,
    find_batch_norms,
    fold_batch_norms,
    idle_matrices,
    prepared,
    record_operators,
)
from fxcompress.rules import Explanation, LoadedRules, MatchResult, match_rules


@dataclass(frozen=True, eq=False)
class Survey:
    """What is known of a model before any data is measured.

    Attributes:
        model: the working copy, batch norms folded.
        rules: what was asked for.
        recording, matched: of ``model``.
        before: operators of the model as it was given.
        folded: batch norms that became part of convolutions.
        sites: of ``model``.
        refused: of weights that a rule would narrow the input of, why that cannot be done.
        groups: one for each site, then those of several.
        examples: batches that graphs are recorded on.
        size: of the model as it was given.
        folded_size: of ``model``.
        request: that it is about.
        room: how the work on it keeps to a limit on memory.
        spread: how the data are spread over processes, in words; empty for a process by itself.
    """

    model: nn.Module
    rules: LoadedRules
    recording: Recording
    matched: MatchResult
    before: tuple[Operator, ...]
    folded: tuple[Folded, ...]
    sites: tuple[Site, ...]
    groups: tuple[Group, ...]
    refused: Mapping[str, str]
    examples: Sequence[Any]
    size: Size
    folded_size: Size
    request: Request
    room: Room
    spread: str

    @property
    def singles(self) -> tuple[Group, ...]:
        """The groups of one site, in graph order."""
        return tuple(group for group in self.groups if len(group.sites) == 1)

    @property
    def several(self) -> tuple[Group, ...]:
        """The groups of several sites."""
        return tuple(group for group in self.groups if len(group.sites) > 1)

    def group(self, name: str) -> Group:
        """The group of a name; that of a site has the site's."""
        return self._by_name[name]

    def groups_of(self, site: str) -> tuple[Group, ...]:
        """The groups that a site is in by its name, those of several sites first."""
        return self._by_site[site]

    @cached_property
    def _by_site(self) -> dict[str, tuple[Group, ...]]:
        found: dict[str, tuple[Group, ...]] = {}
        for group in self.groups:
            for site in group.sites:
                found[site.name] = (group, *found.get(site.name, ()))
        return found

    @cached_property
    def _by_name(self) -> dict[str, Group]:
        return {group.name: group for group in self.groups}

    @property
    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        return self.request.notes.all

    def showing(self, show: Progress) -> Self:
        """The findings, for stages that show their progress elsewhere."""
        return replace(self, request=replace(self.request, show=show))


def survey(
    model: nn.Module, loaded: LoadedRules, request: Request, *, values: bool = True
) -> tuple[Survey, Data]:
    """Record and match.

    Args:
        model, loaded, request: as of :func:`fxcompress.pipeline.analysis.analyse`.
        values: whether weights have to have values; without, the model may be on the meta device.

    Returns:
        What was found, and the calibration batches.
    """
    # The plan goes to others together with the model: no paths of this machine.
    loaded = loaded.named(lambda name: Path(name).name)
    loaded = with_output(loaded, declared_by(model))
    metric = METRICS[loaded.rules.metric.kind]
    work = working_copy(model)
    if values:
        _require_values(work)
    examples = [] if request.examples is None else list(iterate("examples", request.examples))
    first, data = _data(request, bool(metric.needs), metric.name, examples)

    tick = request.show.stage("record", None)
    given = bool(examples)
    examples = [*_shared(examples or [first], request.processes)]
    recording = record_operators(work, examples, forward=request.forward)
    if not given and first is not None and request.processes.size == 1:
        recording, examples, batches = _with_experts(
            work, recording, examples, data.batches, request
        )
        data = replace(data, batches=batches)
    tick()

    request.show.stage("match", None)
    matched = match_model(work, loaded, recording)
    matched.check()
    before, size = recording.operators, _model_size(work, recording)
    asked = {match.weight: match.path for match in matched.matches if match.limits.fold_batch_norm}
    folded, reasons = find_batch_norms(work, recording, asked)
    if folded:
        fold_batch_norms(work, folded)
        recording = record(work, examples, forward=request.forward)
        matched = match_model(work, loaded, recording)
    templates = {template.name: template for template in loaded.templates.values()}
    sites, groups, refused = gather_sites(
        work, recording, matched, templates, legality_in(work, recording),
        rigid_in(work, examples, request.forward),
    )  # fmt: skip
    if not sites:
        raise RuleError(
            f"the rules of {loaded.filename} match nothing in {type(model).__name__}, so there is "
            f"nothing to compress\n{Explanation.of(matched)}"
        )
    for site in sites if values else ():
        if not bool(work.get_parameter(site.weight).isfinite().all()):
            raise CalibrationError(
                f"the weight {site.weight} has NaN or infinite values; repair or reload the model"
            )
    request.notes.add(*matched.warnings)
    request.notes.add(
        *(f"{asked[w]}: no batch norm was folded: {reason}" for w, reason in reasons.items())
    )
    found = Survey(
        work,
        loaded,
        recording,
        matched,
        before,
        folded,
        sites,
        groups,
        refused,
        examples,
        size,
        _model_size(work, recording),
        request,
        make_room(
            work, recording, sites, Needs(metric, data.total), loaded.rules.memory,
            request.processes,
        ),
        data.told,
    )  # fmt: skip
    return found, data


MOST_EXAMPLES = 8
"""Calibration batches that are recorded at most to see all experts of a model run."""


def _with_experts(
    model: nn.Module,
    recording: Recording,
    examples: list[Any],
    batches: Iterable[Any],
    request: Request,
) -> tuple[Recording, list[Any], Iterable[Any]]:
    """Record further batches while they reach experts that no batch reached before.

    Args:
        model: the working copy.
        recording: of the first batch.
        examples: the first batch.
        batches: all of them.
        request: says how to call the model.

    Returns:
        The recording, the batches that it is of, and all batches.
    """
    waiting = iter(batches)
    drawn = [next(waiting)]
    runs, recorded = [recording], [*examples]
    idle = idle_matrices(model, recording)
    while idle and len(drawn) < MOST_EXAMPLES and (more := [*itertools.islice(waiting, 1)]):
        drawn += more
        run = record(model, more, forward=request.forward)
        left = idle & idle_matrices(model, run)
        if left == idle:
            break
        runs.append(run)
        recorded += more
        idle = left
    return together(runs), recorded, itertools.chain(drawn, waiting)


def described(found: Survey) -> str:
    """Rules and parameters of a model in words, to know it again in another process."""
    shapes = [f"{name} {tuple(p.shape)}" for name, p in found.model.named_parameters()]
    return "\n".join([found.rules.rules.model_dump_json(), *shapes])


def require_same_model(found: Survey) -> None:
    """Require that all processes have the same model, and the same rules.

    Raises:
        ProcessError: they have not.
    """
    found.request.processes.require_same(
        lambda: (described(found), fingerprint(found.model)),
        "they were given other rules, or models with other weights or shapes. Load the same "
        "checkpoint in all of them, or pass alone=True in each that is to work by itself",
    )


def with_output(loaded: LoadedRules, family: Family | None) -> LoadedRules:
    """Rules in which a family stands for the output that was left to be found (``auto``)."""
    if family is None or loaded.rules.metric.output != "auto":
        return loaded
    metric = loaded.rules.metric.model_copy(update={"output": family})
    return replace(loaded, rules=loaded.rules.model_copy(update={"metric": metric}))


def match_model(model: nn.Module, loaded: LoadedRules, recording: Recording) -> MatchResult:
    """What each rule gets of a recorded model, and why not more.

    Args:
        model: the working copy that was recorded.
        loaded: the rules.
        recording: of ``model``.
    """

    def joint_legality(operators: Sequence[Operator]) -> str | None:
        weights = [recording.weights[o.weight] for o in operators if o.weight is not None]
        if len({weight.source for weight in weights}) > 1:
            return "they do not always read the same value"
        if len({(weight.dtype, weight.device) for weight in weights}) > 1:
            return "their weights have different types or are on different devices"
        if len({model.get_parameter(weight.name).requires_grad for weight in weights}) > 1:
            return "some of their weights learn and others are frozen"
        return None

    return match_rules(loaded, recording.operators, legality_in(model, recording), joint_legality)


def legality_in(model: nn.Module, recording: Recording) -> Callable[[Operator], str | None]:
    """Says why an operator of a recorded model cannot be rewritten; None if it can.

    Args:
        model: the working copy that was recorded.
        recording: of ``model``.
    """
    reason = obstacle(model, recording, (Factorized,))
    # In an fx.GraphModule a rewritten layer has no class of its own.
    before = {site.name for plan in history(model) for site in plan.rewritten}

    def legality(operator: Operator) -> str | None:
        if not before.isdisjoint(above(operator.path)):
            return "it is part of a layer that was factorized before"
        return reason(operator)

    return legality


def _shared(examples: Sequence[Any], processes: Processes) -> Sequence[Any]:
    """Examples of rank 0, as all processes have to record the same graph."""
    if processes.size == 1:
        return examples
    return processes.from_first(lambda: [to_device(each, torch.device("cpu")) for each in examples])


def _data(
    request: Request, needed: bool, metric: str, examples: Sequence[Any] | None
) -> tuple[Any, Data]:
    """The first of all batches, and the batches of this process."""
    calibration = request.calibration
    if request.processes.size > 1:
        given = [] if calibration is None else [*iterate("calibration", calibration)]
        first, data = dealt(given, request.processes)
        if data.total:
            return first, data
    if calibration is None:
        if needed:
            raise CalibrationError(
                f"metric {metric} needs calibration data: compile(model, rules, [batch, ...]) with "
                "a few hundred typical inputs (no labels), or choose metric: {kind: euclidean}"
            )
        if not examples:
            raise CalibrationError(
                "the model has to be run once to record its graph: give one batch as "
                "calibration=[batch] or examples=[batch]"
            )
        return None, Data([], 0)
    total = length_hint(calibration) or None
    iterator = iterate("calibration", calibration)
    try:
        first = next(iterator)
    except StopIteration:
        raise CalibrationError(
            "the calibration iterable is empty or exhausted; pass a list of batches or a "
            "fresh DataLoader"
        ) from None
    return first, Data(itertools.chain([first], iterator), total)


def iterate(name: str, batches: Iterable[Any]) -> Iterator[Any]:
    """Over batches, and not over the rows of one."""
    if not isinstance(batches, (Tensor, Mapping, str, bytes)):
        try:
            return iter(batches)
        except TypeError:
            pass
    if isinstance(batches, str):
        raise CalibrationError(
            f"{name} must be an iterable of batches, not the text {batches[:40]!r}: read the "
            'file, tokenize it, and pass [{"input_ids": part}, ...] (the command line does that: '
            "fxcompress compile --data text.txt)"
        )
    raise CalibrationError(
        f"{name} must be an iterable of batches, not one {type(batches).__name__}; "
        "for a single batch pass [batch]"
    )


def working_copy(model: nn.Module) -> nn.Module:
    """The model to record and to calibrate on, with every operator that can be a module as one.

    Raises:
        RecordError: it is no module, or cannot be copied.
    """
    if not isinstance(model, nn.Module):
        named = f" ({model!r}): load it first, AutoModel....from_pretrained(...)"
        hint = named if isinstance(model, str) else ""
        raise RecordError(
            f"the model must be a torch.nn.Module, not a {type(model).__name__}{hint}"
        )
    model = unwrapped(model)
    if isinstance(model, torch.jit.ScriptModule):
        raise RecordError(
            "the model is a TorchScript program, which hides its operators: give the module that "
            "it was scripted or traced from"
        )
    for path, _ in model.named_modules():
        if not path.isprintable():  # a plan holds printable names only
            raise RecordError(f"a module is called {path!r}: give it a name that can be printed")
    if problem := replaced_forward(model):
        raise RecordError(f"this {type(model).__name__} cannot be copied: {problem}")
    _require_whole(model)
    try:
        for parameter in model.parameters():
            if type(parameter) not in (nn.Parameter, Tensor):
                copy.deepcopy(parameter)  # now, not when all the work is done
        return prepared(model)
    except Exception as error:
        raise RecordError(
            f"this {type(model).__name__} cannot be copied (copy.deepcopy), and the given model is "
            f"never changed: {error}; take what cannot be copied off the model meanwhile, or give "
            "its class a __deepcopy__"
        ) from error


def _require_whole(model: nn.Module) -> None:
    """Every parameter is there, and all of it."""
    named = itertools.chain(
        model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False)
    )
    for name, tensor in named:
        if is_lazy(tensor):
            raise RecordError(
                f"{name} has no shape yet (a lazy module): call the model on a batch once, then "
                "compress it"
            )
        if type(tensor).__name__ in ("DTensor", "FlatParameter"):
            raise RecordError(
                f"{name} is sharded over processes (a {type(tensor).__name__}, as of FSDP): "
                "compress the whole model in every process before it is sharded, each on its own "
                "batches, and shard the result; of a model that is sharded already, get a full "
                "state dict (torch.distributed.checkpoint.state_dict.get_model_state_dict with "
                "full_state_dict=True), and load it into a model that is not"
            )


def _require_values(model: nn.Module) -> None:
    for name, tensor in itertools.chain(model.named_parameters(), model.named_buffers()):
        if tensor.is_meta:
            raise CalibrationError(
                f"{name} is on the meta device, where tensors have no values: load the model's "
                "weights first"
            )


def _model_size(model: nn.Module, recording: Recording) -> Size:
    return Size.of(lambda unit: unit.of_model(model, recording))


def checkpoint_of(found: Survey, batches: Sequence[Any]) -> Checkpoint | None:
    """Where a run keeps what it found out so far; None if it was not asked to.

    Args:
        found: has the model, the rules and the directory.
        batches: all of the calibration data.
    """
    request = found.request
    if request.checkpoint is None:
        return None
    # A limit on memory counts as what it leads to.
    rules = found.rules.rules.model_dump_json(exclude={"memory"})
    mark = mark_of(rules, found.model, batches, request.loss, request.forward)
    sections = [(each.block, [site.name for site in each.sites]) for each in found.room.sections]
    directory, together = Path(request.checkpoint), request.processes
    if together.size > 1:  # each has gradients of its own
        directory /= f"process-{together.rank}-of-{together.size}"
    return Checkpoint(
        directory,
        {**mark, "limit on memory": digest_of([(*found.room.blocks,), repr(sections)])},
    )
