"""How much faster a compressed model is: forward passes by both models, and what costs time.

before, after, after, before, ... on the recorded batch, in evaluation mode and without gradients.
Passes that follow each other make a pair, and a machine that is busy for a while slows both of
them.  Where the compressed model turns out to be slower, its operators are timed one by one
(:mod:`fxcompress.pipeline.latency`), so that a warning can name those that are to blame.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from fxcompress.graph.inputs import run_model, to_device
from fxcompress.pipeline.analysis import Analysis
from fxcompress.pipeline.latency import Table, Timing, machine, now
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.sites import Group
from fxcompress.plans.plan import NOT_TIMED, NOTICED, Batch, Plan, SitePlan, Speed
from fxcompress.processes import several
from fxcompress.report.quantities import duration
from fxcompress.rewrite import skeleton
from fxcompress.rules.matching.folding import fold

FEWEST = 3
"""Pairs of passes that are timed, however long they take."""

MOST = 15
"""Pairs that are enough, however fast they are."""

SHARE = 0.03
"""Of the time that the compilation took until then, what more pairs than those may take."""

LONGEST = 3.0
"""Seconds that they may take at most, and then the operators."""

NAMED = 3
"""Kinds of operators that a warning names."""


def batch_of(examples: Sequence[Any]) -> Batch:
    """How many samples the recorded batches hold, and the shapes of their tensors.

    >>> batch_of([{"ids": torch.zeros(2, 512), "mask": torch.zeros(2, 512)}])
    Batch(samples=2, shapes=((2, 512),))
    """
    shapes: dict[tuple[int, ...], None] = {}
    samples = 0
    alike = True
    for example in examples:
        # tree_leaves knows dicts, and not every mapping.
        leaves = tree_leaves(dict(example) if isinstance(example, Mapping) else example)
        own = [tuple(leaf.shape) for leaf in leaves if isinstance(leaf, Tensor)]
        firsts = {shape[0] for shape in own if shape}
        alike &= len(firsts) == 1
        samples += min(firsts, default=0)
        shapes.update(dict.fromkeys(own))
    return Batch(samples=samples or None if alike else None, shapes=tuple(shapes))


def measured_speed(
    dense: nn.Module, rewritten: nn.Module, planned: Plan, analysis: Analysis
) -> tuple[Speed | None, list[str]]:
    """Time both models, and find out what is slower if the compressed one is.

    Args:
        dense: a skeleton of the model as it was given; left in evaluation mode.
        rewritten: the compressed model, in any mode; only read.
        planned: what was done to it.
        analysis: with the recorded batches.

    Returns:
        None if they cannot be timed, and what the user should know.
    """
    if not planned.rewritten:
        return None, []
    try:
        speed = time_models(dense, rewritten, analysis.examples, analysis.request)
    except Exception as error:  # whatever a model does that is run once more
        return None, [f"{NOT_TIMED}{type(error).__name__}: {error}"]
    if speed is None or not speed.slower:
        return speed, []
    try:
        kinds = _slower(planned, analysis)
    except RuntimeError:  # out of memory, say: no reason to lose a model that is done
        kinds = []
    return speed, [_warning(speed, planned, kinds)]


@torch.no_grad()
def time_models(
    dense: nn.Module, rewritten: nn.Module, examples: Sequence[Any], request: Request
) -> Speed | None:
    """Time two models in turns.

    Args:
        dense: a skeleton, which is left in evaluation mode.
        rewritten: in any mode; only read.
        examples: batches, all of which are one pass.
        request: how a model is called on a batch.

    Returns:
        None on the meta device, where nothing is computed.
    """
    tensors = [t for each in (dense, rewritten) for t in (*each.parameters(), *each.buffers())]
    devices = {tensor.device for tensor in tensors}
    if not tensors or torch.device("meta") in devices:
        return None
    spent = sum(request.show.seconds.values())
    tick = request.show.stage("speed", None)
    small = skeleton(rewritten)
    for each in (dense, small):
        nn.Module.train(each, False)
    first = tensors[0]
    batches = [_copied(example, first.device) for example in examples]

    def seconds(model: nn.Module) -> float:
        start = now(*devices)
        for batch in batches:
            run_model(model, batch, request.forward)
        tick()
        return max(now(*devices) - start, 1e-9)

    def summary() -> Speed:
        times = np.array(pairs)
        before, after = np.median(times, axis=0).tolist()
        low, high = np.quantile(times[:, 0] / times[:, 1], [0.25, 0.75]).tolist()
        return Speed(
            before=before,
            after=after,
            spread=(low, high),
            pairs=len(pairs),
            machine=machine(first.device),
            device=first.device.type,
            threads=torch.get_num_threads(),
            dtype=str(first.dtype).removeprefix("torch."),
        )

    # All of several processes take as many passes: a forward may wait for the others.
    longest = 0.0 if several() else LONGEST
    usual = min(longest, SHARE * spent)
    one = seconds(dense) + seconds(small)  # the first passes allocate, and are not counted
    used = 0.0
    pairs: list[tuple[float, float]] = []
    while True:
        if len(pairs) % 2:
            after, before = seconds(small), seconds(dense)
        else:
            before, after = seconds(dense), seconds(small)
        pairs.append((before, after))
        used += before + after
        if len(pairs) < FEWEST:
            continue
        found = summary()
        # What would be warned of is looked at for longer.
        if len(pairs) == MOST or used + one > (longest if found.slower else usual):
            return found


def _copied(example: Any, device: torch.device) -> Any:
    """A batch on a device, with tensors of its own: a model may write to its input."""

    def copy(leaf: Any) -> Any:
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return tree_map(copy, to_device(example, device))


@dataclass(frozen=True)
class _Kind:
    """Operators of equal shapes and of one form that take longer than before.

    Attributes:
        names: of their sites.
        form: that they have now.
        before, after: seconds, of all of them together.
    """

    names: tuple[str, ...]
    form: str
    before: float
    after: float

    def __str__(self) -> str:
        times = f"{duration(self.before)} → {duration(self.after)}"
        return f"{', '.join(fold(self.names))} ({self.form}) {times}"


def _slower(planned: Plan, analysis: Analysis) -> list[_Kind]:
    """What takes longer than before by itself, the worst first.

    The highest ranks are timed first: they save least.  What no time is left for is not told.
    """
    table, begun = Table(None), now()
    device = next(analysis.model.parameters()).device
    tick = analysis.request.show.stage("speed", None)
    found: dict[tuple[str, ...], _Kind] = {}
    for name, entries in sorted(planned.groups.items(), key=lambda item: -item[1][0].rank_share):
        if now() - begun > LONGEST:
            break
        group = analysis.group(name)
        dense = [Timing((shape,)) for shape in group.shapes]
        bodies = _bodies(group, entries)
        times = table.measure([*dense, *bodies], device, tick)
        before, after = (sum(times[each.key] for each in those) for those in (dense, bodies))
        if after * NOTICED > before:
            form = max((entry.form_text for entry in entries), key=len)
            key = (form, *map(str, group.shapes))
            kind = found.get(key, _Kind((), form, 0.0, 0.0))
            names = (*kind.names, *(entry.name for entry in entries))
            found[key] = _Kind(names, form, kind.before + before, kind.after + after)
    return sorted(found.values(), key=lambda kind: kind.before - kind.after)


def _bodies(group: Group, entries: Sequence[SitePlan]) -> list[Timing]:
    """What stands where the operators of a group stood."""
    if all(entry.then is None for entry in entries):
        form, rank = entries[0].choice
        return [Timing(group.shapes, group.forms[form].form, rank)]
    found = []
    for entry in entries:
        left = group.left_of(*entry.narrowing)
        if entry.then is None:
            found.append(Timing(left.shapes))
        else:
            found.append(Timing(left.shapes, left.forms[entry.then.form].form, entry.then.rank))
    return found


def _warning(speed: Speed, planned: Plan, kinds: Sequence[_Kind]) -> str:
    """That a model is slower, which operators are, and what to do about it."""
    times = f"{duration(speed.before)} → {duration(speed.after)}"
    text = f"the compressed model is slower than the dense one: {times} on the recorded batch"
    if kinds:
        text += f"; these take longer than before: {'; '.join(map(str, kinds[:NAMED]))}"
        text += f"; and {len(kinds) - NAMED} more kinds" * (len(kinds) > NAMED)
        dense = "or keep these dense (unless: [{name: ...}])"
    else:
        text += "; no operator that was timed takes longer by itself, it is the calls between them"
        dense = "or rewrite fewer of them"
    timed = "latency" in {planned.budget.unit, *(limit.unit for limit in planned.limits)}
    return (
        f"{text}. What helps: {'' if timed else 'a budget of time (unit: latency), '}form: narrow "
        "before other forms, ranks that suit the machine (multiple_of: 8), only what saves enough "
        f"(min_saving: 0.2), {dense}"
    )
