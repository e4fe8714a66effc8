"""Weights that stay as they are because no rule gets them, each with the nearest reason."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import nn

from fxcompress.graph.eligible import MADE_BY_HOOK, PARAMETRIZED, forward_of, made_by_hook
from fxcompress.graph.paths import above
from fxcompress.graph.recorder import Weight
from fxcompress.operators.applied import displayed
from fxcompress.pipeline.survey import Survey
from fxcompress.plans.plan import Unmatched
from fxcompress.rewrite import planned_weight
from fxcompress.rules import STEPS


def unmatched(analysis: Survey) -> tuple[Unmatched, ...]:
    """Matrices and larger weights that stay as they are, each with the nearest reason."""
    matched = {site.weight for site in analysis.sites}
    # Of several rules that lost an operator, the one that it came furthest with.
    misses = sorted(analysis.matched.misses, key=lambda miss: -STEPS.index(miss.step))
    reasons = {miss.operator: miss.reason for miss in reversed(misses)}
    for kept in analysis.matched.protected:
        reasons[kept.operators[0]] = f"kept dense by rule {kept.rule_id} ({kept.location})"
    weights = analysis.recording.weights
    # A tied weight is shown as the operator that a rule was about.
    told = {o.weight: o.name for o in reversed(analysis.recording.operators) if o.name in reasons}
    seen: set[str] = set()
    out = []
    for operator in analysis.recording.operators:
        weight = operator.weight
        if weight is None or weight in matched or weight in seen:
            continue
        if told.get(weight, operator.name) != operator.name:
            continue
        if len(weights[weight].shape) < 2:
            continue  # norms and other vectors: nothing to factorize
        seen.add(weight)
        shape = weights[weight].shape
        if operator.op == "linear" and len(shape) == 2:  # (out x in), whichever way it is stored
            shape = tuple(int(operator.attributes[k]) for k in ("out_features", "in_features"))  # type: ignore[arg-type]
        out.append(
            Unmatched(
                name=operator.path or weight,
                op=operator.op,
                weight=weight,
                shape=shape,
                parameters=math.prod(weights[weight].shape),
                reason=reasons.get(operator.name, f"no rule is about operator {operator.op}"),
            )
        )
    return (*out, *_unseen(analysis))


def _unseen(analysis: Survey) -> list[Unmatched]:
    """Weights that no operator of the graph applies: rules cannot be about them."""
    ran = {o.path: o.op for o in analysis.recording.operators if o.module}
    out = []
    for name, facts in analysis.recording.weights.items():
        owner = name.rpartition(".")[0]
        if facts.calls or len(facts.shape) < 2:
            continue
        reason = _unseen_reason(analysis.model, name, facts, ran)
        out.append(
            Unmatched(
                name=displayed(analysis.model, owner) or name,
                op=ran.get(owner, "parameter"),
                weight=planned_weight(analysis.model, name)[0],
                shape=facts.shape,
                parameters=math.prod(facts.shape),
                reason=reason,
            )
        )
    return out


def _unseen_reason(model: nn.Module, name: str, facts: Weight, ran: Mapping[str, str]) -> str:
    """Why no operator has a weight.

    Args:
        model: as it was recorded.
        name: of the weight.
        facts: about it.
        ran: operators of the modules that were called as one, by path.
    """
    owner = name.rpartition(".")[0]
    if any(ran.get(path) == "script_module" for path in (owner, *above(owner))):
        return (
            "it is part of a TorchScript program, which hides its operators: compress the model "
            "before that is scripted"
        )
    if ".parametrizations." in name:
        return PARAMETRIZED.replace("its weight", "it")
    if owner in ran and made_by_hook(model.get_submodule(owner)):
        return MADE_BY_HOOK
    inside = [function for function, scope in facts.readers if owner in ran and scope == owner]
    if inside:
        return f"{ran[owner]} applies it inside, out of the reach of rules"
    if facts.readers:
        function, scope = facts.readers[0]
        return f"{function} in {forward_of(scope)} computes with it, out of the reach of rules"
    return "the example does not use it; if other inputs do, pass examples=[...] of both"
