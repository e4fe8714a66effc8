"""Narrow hidden values of a model to channels at random, beside the dense model that says the same.

A consumer with columns of zeros does not see these channels, so the model without them has to say
the same: whatever the graph between is, and in whichever order rows and columns are stored.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.forms import find_form, fit
from fxcompress.forms.narrow import rows_of
from fxcompress.graph.eligible import obstacle
from fxcompress.operators.applied import operator_at
from fxcompress.pipeline.sites import Group, gather_sites
from fxcompress.plans.plan import Held
from fxcompress.rewrite import (
    Factorized,
    apply_plan,
    own_parameters,
    planned_weight,
    prepared,
    record_operators,
    skeleton,
)
from fxcompress.rules import LoadedRules, match_rules, parse_rules
from tests.full_rank import dense_weight, entry, plan_for

RULES = """
version: 1
budget: {keep: 1.0}
rules:
  - id: every
    match: {node: {op: OPERATORS}}
    rewrite: {form: narrow}
"""
ALL = "[linear, conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d]"


def hidden_groups(
    model: nn.Module, batch: Any, operators: str = ALL
) -> tuple[nn.Module, list[Group], dict[str, str]]:
    """The prepared model, hidden values that have no layer in common, and what is refused."""
    work = prepared(model)
    recording = record_operators(work, [batch])
    legality = obstacle(work, recording, (Factorized,))
    rules = parse_rules(RULES.replace("OPERATORS", operators), "every.yaml")
    matched = match_rules(rules, recording.operators, legality)
    _, groups, refused = gather_sites(work, recording, matched, legality=legality)
    return work, [*_disjoint(groups)], refused


def _disjoint(groups: Sequence[Group]) -> Iterator[Group]:
    taken: set[str] = set()
    for group in groups:
        names = {site.name for site in group.sites}
        if group.hidden and taken.isdisjoint(names):  # of two in a row, the first
            taken |= names
            yield group


def narrowed_pair(
    model: nn.Module, work: nn.Module, groups: Sequence[Group], share: float
) -> tuple[nn.Module, nn.Module]:
    """A model with fewer channels in its hidden values, and a dense one with columns of zeros.

    Args:
        model: as it is.
        work: the prepared model.
        groups: hidden values of it.
        share: of the channels that are kept; with all of them consumers stay as they are.
    """
    reference = copy.deepcopy(model)
    dense = prepared(reference)
    bodies, entries = {}, []
    for group in groups:
        form = fit(find_form("narrow"), group.shapes, group.held)
        *makers, consumer = group.sites
        weight, axis, n = consumer.weight_in(work), consumer.shape.in_axis, consumer.in_features
        rank = max(1, int(share * n))
        kept = torch.randperm(n)[:rank].sort().values
        own = weight.index_select(axis, kept)
        refitted = torch.randn_like(own) if share < 1 else own
        body = form.empty(rank)
        biases = [getattr(operator_at(work, site.name), "bias", None) for site in group.sites]
        rows = [
            site.shape.by_outputs(site.weight_in(work))[rows_of(kept, site.out_features, n)]
            for site in makers
        ]
        form.fill(body, [kept, refitted, *rows], biases)
        bodies[group.name] = body
        for member, site in enumerate(group.sites):
            made = entry(site, "narrow", rank, n, group.name)
            name, applied = planned_weight(work, site.weight)
            held = [Held(**asdict(each)) for each in group.held] if site is consumer else []
            more = {"member": member, "weight": name, "applied": applied, "held": tuple(held)}
            entries.append(made.model_copy(update=more))
        wide: Tensor = torch.zeros_like(weight).index_copy(axis, kept, refitted)
        with torch.no_grad():
            own = dense_weight(dense, planned_weight(work, consumer.weight)[0])
            own.copy_(consumer.shape.stored(wide))
    small = skeleton(model)
    apply_plan(small, plan_for(entries), bodies)
    return own_parameters(small, model), reference


def trained(model: nn.Module, rules: LoadedRules, batches: Sequence[Tensor]) -> nn.Module:
    """A model that was compressed while it was trained, for one step a batch."""
    isvt = fxcompress.ISVT(model, rules, batches, steps=len(batches), every=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for batch in batches:
        model(batch).square().mean().backward()
        optimizer.step()
        isvt.step()
        optimizer.zero_grad()
    small: nn.Module = isvt.finalize()
    return small
