"""Rewrite every linear layer of a model at the highest rank, where nothing may change.

The stages are called one by one, without calibration and without a budget.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxcompress.forms import Body, find_form
from fxcompress.graph.eligible import obstacle
from fxcompress.metric.spectrum import decompose
from fxcompress.operators.applied import displayed, operator_at
from fxcompress.operators.modules import canonical_weight
from fxcompress.operators.stacked import stack_at
from fxcompress.pipeline.sites import Site, gather_sites
from fxcompress.plans.plan import ZERO, BudgetOutcome, Plan, SitePlan
from fxcompress.rewrite import (
    Factorized,
    JointMember,
    apply_plan,
    own_parameters,
    planned_weight,
    prepared,
    record_operators,
    skeleton,
)
from fxcompress.rules import MatchResult, load_rules, match_rules


@dataclass(frozen=True, eq=False)
class Rewritten:
    """A model, and the same with all its linear layers factorized."""

    original: nn.Module
    model: nn.Module
    sites: tuple[Site, ...]


def match_every_linear(model: nn.Module, example: Any) -> tuple[MatchResult, tuple[Site, ...]]:
    """What the preset ``every-linear`` finds in a prepared model."""
    recording = record_operators(model, [example])
    legality = obstacle(model, recording, (Factorized,))
    matched = match_rules(load_rules("every-linear"), recording.operators, legality)
    return matched, gather_sites(model, recording, matched)[0]


def rewrite(
    model: nn.Module, example: Any, form: str = "low_rank", rank: int | None = None
) -> Rewritten:
    """Factorize all linear layers, at full rank unless a rank is given.

    With ``joint``, layers on one input are rewritten together, and the others as ``low_rank``.
    """
    work = prepared(model)
    _, sites = match_every_linear(work, example)
    together: dict[str, list[Site]] = defaultdict(list)
    if form == "joint":
        for site in sites:
            together[site.source].append(site)
    bundles = {those[0].name: those for those in together.values() if len(those) > 1}
    joined = {site.name for those in bundles.values() for site in those}
    alone = [site for site in sites if site.name not in joined]
    single = "low_rank" if form == "joint" else form
    bodies = {name: joint_body_of(work, those, rank) for name, those in bundles.items()}
    for site in alone:
        head = body_of(operator_at(work, site.name), site, single, rank)
        bodies[site.name] = Body(None, (head,))
    rewritten = skeleton(model)
    entries = [entry(site, single, rank or site.shape.full_rank) for site in alone]
    for name, those in bundles.items():
        full = find_form("joint").full_rank([site.shape for site in those])
        entries += [entry(site, "joint", rank or full, full, name) for site in those]
    for place, each in enumerate(entries):
        weight, applied = planned_weight(work, each.weight)
        entries[place] = each.model_copy(update={"weight": weight, "applied": applied})
    apply_plan(rewritten, plan_for(entries), bodies)
    return Rewritten(model, own_parameters(rewritten, model), sites)


def dense_weight(model: nn.Module, weight: str) -> Tensor:
    """A weight, or a matrix of a stack, of a model as it was given, by the name that plans have."""
    stack = stack_at(model, weight)
    if isinstance(stack, nn.Parameter):
        return stack[int(weight.rpartition(".")[2])]
    return model.get_parameter(weight)


def body_of(module: nn.Module, site: Site, form: str, rank: int | None = None) -> fx.GraphModule:
    """A filled body for a linear module, decomposed in a random metric."""
    spectrum = decompose(
        canonical_weight(module),
        random_spd(site.in_features),
        random_spd(site.out_features),
        damping=(0.0, 0.0),
    )
    rank = rank or site.shape.full_rank
    body = find_form(form).empty(site.shape, rank)
    bias: Any = getattr(module, "bias", None)
    find_form(form).fill(body, spectrum.factors(rank), bias)
    return body


def joint_body_of(model: nn.Module, sites: list[Site], rank: int | None = None) -> Body:
    """A filled joint body for linear modules on one input, decomposed in a random metric."""
    modules = [operator_at(model, site.name) for site in sites]
    spectrum = decompose(
        torch.cat([canonical_weight(module) for module in modules]),
        random_spd(sites[0].in_features),
        random_spd(sum(site.out_features for site in sites)),
        damping=(0.0, 0.0),
    )
    form = find_form("joint")
    rank = rank or form.full_rank([site.shape for site in sites])
    body = form.empty([site.shape for site in sites], rank)
    lefts = spectrum.left[:, :rank].split([site.out_features for site in sites])
    form.fill(body, lefts, spectrum.right[:rank], [getattr(m, "bias", None) for m in modules])
    return body


def random_spd(size: int) -> Tensor:
    """Symmetric, positive definite, with a condition number of at most 100."""
    basis, _ = torch.linalg.qr(torch.randn(size, size, dtype=torch.float64))
    return (basis * torch.logspace(-2, 0, size, dtype=torch.float64)) @ basis.T


def entry(
    site: Site, form: str, rank: int, full_rank: int | None = None, bundle: str = ""
) -> SitePlan:
    """What becomes of one site, without any figures."""
    return SitePlan(
        name=site.name, weight=site.weight, op=site.op, operator=str(site.shape),
        in_features=site.in_features,
        out_features=site.out_features, bias=site.shape.bias, dtype="float32",
        calls=site.calls, rule="every-linear", location="every-linear.yaml:13",
        forms=(form,), form=form, rank=rank, full_rank=full_rank or site.shape.full_rank,
        bundle=bundle, predicted=0, energy=1, before=ZERO, after=ZERO,
    )  # fmt: skip


def plan_for(entries: Sequence[SitePlan]) -> Plan:
    """A plan that says no more than what is needed to carry it out."""
    return Plan(
        model_class="",
        rules="every-linear.yaml",
        metric="euclidean",
        loss_unit="",
        calibration={},
        budget=BudgetOutcome(
            keep=1, of="matched", unit="parameters", allocation="global", limit=0, cost=0,
            dense=0, multiplier=None, predicted=0, bound=None,
        ),
        sites=tuple(entries),
        unmatched=(),
        model_before=ZERO,
        model_after=ZERO,
    )  # fmt: skip


def factorized(model: nn.Module) -> dict[str, Factorized]:
    """The rewritten operators of a model, by what they are called."""
    found = {name: m for name, m in model.named_modules() if isinstance(m, Factorized)}
    return {displayed(model, name): module for name, module in found.items()}


@contextmanager
def counted_calls(model: nn.Module) -> Iterator[dict[str, int]]:
    """How often the body of each rewritten layer runs.

    Not counted by forward hooks: ``nn.TransformerEncoderLayer`` leaves its fast path for a
    module with hooks, which is just what must not be disturbed.
    """
    names = {id(module.body): name for name, module in factorized(model).items()}
    counts = dict.fromkeys(names.values(), 0)
    classes = (Factorized, JointMember)
    forwards = [cls.forward for cls in classes]

    def counting(forward: Any) -> Any:
        def count(self: Factorized, *args: Any, **kwargs: Any) -> Tensor:
            counts[names[id(self.body)]] += 1
            return forward(self, *args, **kwargs)

        return count

    for cls, forward in zip(classes, forwards, strict=True):
        cls.forward = counting(forward)  # type: ignore[method-assign]
    try:
        yield counts
    finally:
        for cls, forward in zip(classes, forwards, strict=True):
            cls.forward = forward  # type: ignore[method-assign]
