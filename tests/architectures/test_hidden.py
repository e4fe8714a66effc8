"""Hidden values of many architectures with fewer channels, against dense layers with zeros.

A consumer with columns of zeros does not see these channels, so the model without them has to say
the same: whatever the graph between is, and in whichever order rows and columns are stored.
"""

from __future__ import annotations

import copy
from dataclasses import asdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fxcompress.forms import find_form, fit
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
from fxcompress.rules import match_rules, parse_rules
from tests.architectures.test_every_operator import run
from tests.full_rank import entry, plan_for
from tests.zoo import ZOO

RULES = """
version: 1
budget: {keep: 1.0}
rules:
  - id: every
    match: {node: {op: [linear, conv1d, conv2d]}}
    rewrite: {form: narrow}
"""
NARROWED = {
    *("llama", "qwen2", "qwen3", "mistral", "gemma", "phi", "gpt2", "bert", "roberta", "vit"),
    *("swin", "whisper", "t5", "clip", "wav2vec2", "transformer_encoder"),
} & set(ZOO)
"""Architectures whose feed-forward blocks have to be found."""


def hidden_groups(model: nn.Module, batch: Any) -> tuple[nn.Module, list[Group]]:
    work = prepared(model)
    recording = record_operators(work, [batch])
    legality = obstacle(work, recording, (Factorized,))
    matched = match_rules(parse_rules(RULES, "every.yaml"), recording.operators, legality)
    _, groups, _ = gather_sites(work, recording, matched, legality=legality)
    taken: set[str] = set()
    chosen = []
    for group in groups:
        names = {site.name for site in group.sites}
        if group.hidden and taken.isdisjoint(names):  # of two in a row, the first
            taken |= names
            chosen.append(group)
    return work, chosen


@pytest.mark.parametrize("share", [0.5, 1.0])
@pytest.mark.parametrize("name", ZOO)
def test_as_with_columns_of_zeros(name: str, share: float) -> None:
    torch.manual_seed(0)
    case = ZOO[name]
    model, batch = case.build().double().eval(), case.batch(torch.float64)
    example = (batch["x"],) if isinstance(model, nn.Sequential) and "x" in batch else batch
    work, groups = hidden_groups(model, example)
    if not groups:
        assert name not in NARROWED
        pytest.skip("no hidden value")
    reference = copy.deepcopy(model)
    dense = dict(prepared(reference).named_parameters())
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
        rows = [site.shape.by_outputs(site.weight_in(work))[kept] for site in makers]
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
            dense[planned_weight(work, consumer.weight)[0]].copy_(consumer.shape.stored(wide))
    small = skeleton(model)
    apply_plan(small, plan_for(entries), bodies)
    small = own_parameters(small, model)
    with torch.no_grad():
        got, wanted = run(small, batch), run(reference, batch)
    bound = 1e-5 if case.single else 1e-9
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=bound * float(b.abs().max()))
    for group in groups:
        layer = small.get_submodule(group.sites[-1].name)
        assert type(layer) is type(work.get_submodule(group.sites[-1].name))
