"""What calibration can say of the influence of layers on the output, and where it can say nothing.

A layer whose gradient is zero and a layer that no gradient came back to look alike in sums, and
are different facts: nothing is known of the second (``no_grad``, ``detach``, ``argmax``, an output
that does not count).  Neither is rewritten unless its rule asks for it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import nn

from fxcompress.errors import CalibrationError
from fxcompress.graph.recorder import Recording
from fxcompress.metric import METRICS, Calibration
from fxcompress.metric.capture import HARDLY, UNANSWERED, UNREACHED, ZERO
from fxcompress.operators.applied import displayed
from fxcompress.operators.modules import shape_of
from fxcompress.pipeline.sites import Site
from fxcompress.rules import GraphNode, NodePattern, RuleSet, compile_globs

NAMED = 8
"""Layers that a note names; more of them are counted."""

_MORE_DATA = "give more data, or of more kinds"
_REMEDIES = {
    UNREACHED: _MORE_DATA,
    HARDLY: _MORE_DATA,
    UNANSWERED: (
        "it runs under no_grad, is detached, feeds a choice (argmax, round), or only outputs that "
        "do not count: name those that do (metric: {output: {...}}) or pass loss="
    ),
    ZERO: "dead units, a zero further on, or a model that is sure of every sample",
}


def require_influence(sites: Sequence[Site], found: Calibration) -> None:
    """Refuse a calibration that measured no influence of anything.

    Raises:
        CalibrationError: no site has a measured influence, and no rule asks for others.
    """
    if not sites or any(s.name not in found.unmeasured or s.match.limits.unmeasured for s in sites):
        return
    reasons = dict.fromkeys(found.unmeasured.values())
    remedy = "; ".join(dict.fromkeys(_remedy(reason) for reason in reasons))
    free = [f"{{kind: {name}}}" for name, metric in METRICS.items() if not metric.backward]
    raise CalibrationError(
        f"no influence on the output was measured of any matched layer "
        f"({_listed([site.name for site in sites])}): {', or '.join(reasons)} ({remedy}).  "
        f"metric: {' and '.join(free)} need no gradients"
    )


def reach_notes(sites: Sequence[Site], found: Calibration) -> Iterator[str]:
    """What a user should know of layers that calibration said little or nothing of."""
    kept = {site.name for site in sites if not site.match.limits.unmeasured}
    for reason in dict.fromkeys(found.unmeasured.values()):
        names = [name for name, each in found.unmeasured.items() if each == reason]
        rows = sum(found.reach[name].rows for name in names)
        those = [name for name in names if name in kept]
        cause = f"{reason} in {rows:,} rows ({_remedy(reason)})"
        if those:
            yield (
                f"{_listed(those)}: left dense, as no influence on the output was measured: "
                f"{cause}; exclude it (unless: [{{name: ...}}]), choose metric: {{kind: "
                "activation}, or have it rewritten all the same (rewrite: {unmeasured: true})"
            )
        if others := [name for name in names if name not in kept]:
            yield (
                f"{_listed(others)}: rewritten, as the rule asks, though no influence on the "
                f"output was measured: {cause}; its predicted loss is 0 at every rank"
            )
    yield from _partly_answered(found)
    yield from _few_rows(sites, found)
    if found.ran:
        yield (
            f"{_listed(found.ran)}: the calibration data runs through it, but the example that the "
            "graph was recorded on does not, so no rule can match it: pass examples=[...] that do"
        )


def _remedy(reason: str) -> str:
    return _REMEDIES.get(reason, _REMEDIES[ZERO])


def _partly_answered(found: Calibration) -> Iterator[str]:
    parts = [
        f"{name} ({reach.answered:,} of {reach.rows:,})"
        for name, reach in found.reach.items()
        if 0 < reach.answered < reach.rows
    ]
    if parts:
        yield (
            f"{_listed(parts)}: a gradient came back for a part of its rows only, so that the "
            "influence of the others is not counted"
        )


def _few_rows(sites: Sequence[Site], found: Calibration) -> Iterator[str]:
    few = []
    for site in sites:
        reach, width = found.reach.get(site.name), site.shape.informative_rows
        known = found.unmeasured.get(site.name) not in (UNREACHED, HARDLY)
        if reach is not None and known and reach.rows < width:
            few.append((reach.rows / width, f"{site.name} ({reach.rows:,} rows, {width:,} wide)"))
    if few:
        few.sort(key=lambda pair: pair[0])
        yield (
            f"{_listed([name for _, name in few])}: fewer calibration rows than the layer is wide; "
            "what they do not show counts for nothing: give more data, or exclude it"
        )


def unrecorded(model: nn.Module, recording: Recording, rules: RuleSet) -> tuple[str, ...]:
    """Modules that the example did not run, and that a rule could be about.

    Args:
        model: that was recorded.
        recording: of it.
        rules: whose patterns are asked.
    """
    ran = {operator.path for operator in recording.operators}
    found: dict[str, None] = {}
    for weight, facts in recording.weights.items():
        owner = weight.rpartition(".")[0]
        if facts.calls or not owner or owner in ran:
            continue
        try:
            module = model.get_submodule(owner)
            if isinstance(module, torch.jit.ScriptModule):
                continue  # it takes no hooks, and no rule reaches into it
            op = shape_of(module).op
        except (ValueError, AttributeError):
            continue
        if any(_names(node, op, displayed(model, owner)) for node in _nodes(rules)):
            found[owner] = None
    return tuple(found)


def _nodes(rules: RuleSet) -> Iterator[NodePattern | GraphNode]:
    for rule in rules.rules:
        for one in rule.match.alternatives if rule.rewrite != "none" else ():
            nodes: Mapping[str, GraphNode] = one.nodes or {}
            yield from nodes.values()
            yield from (each for each in (one.node, one.group) if each is not None)


def _names(node: NodePattern | GraphNode, op: str, path: str) -> bool:
    if op not in node.op:
        return False
    return node.name is None or bool(compile_globs(node.name).match(path))


def _listed(names: Sequence[str]) -> str:
    more = len(names) - NAMED
    return ", ".join(names[:NAMED]) + (f" and {more} others" if more > 0 else "")
