"""Two plans of one model beside each other, aligned by the names of sites."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fxcompress.plans.plan import Plan
from fxcompress.report.columns import rank_text
from fxcompress.report.quantities import count, loss


def compared(plan: Plan, other: Plan) -> dict[str, Any]:
    """What the page shows of another plan: its totals, and of every site of this plan its choice.

    A site that the other plan lacks has None there.
    """
    by_name = {site.name: site for site in other.sites}
    mine = {site.name for site in plan.sites}
    pairs = [by_name.get(site.name) for site in plan.sites]
    return {
        "here": _named(plan),
        "there": _named(other),
        "rows": _rows(plan, other),
        "form": [None if one is None else one.form_text for one in pairs],
        "rank": [None if one is None else rank_text(one) for one in pairs],
        "parameters": [None if one is None else one.after.parameters for one in pairs],
        "predicted": [None if one is None else one.predicted for one in pairs],
        "only": [site.name for site in other.sites if site.name not in mine],
    }


def comparison_text(plan: Plan, other: Plan) -> str:
    """The totals of both, and every site whose form or rank differs; None of what is not there."""
    lines = [f"{'':28}{_named(plan):36}{_named(other)}"]
    lines += [f"{name:28}{here:36}{there}" for name, here, there in _rows(plan, other)]
    here, there = (
        {site.name: f"{site.form_text} {rank_text(site)}".rstrip() for site in each.sites}
        for each in (plan, other)
    )
    differing = [name for name in here | there if here.get(name) != there.get(name)]
    lines += ["", f"{count(len(differing))} of {count(len(here | there))} operators differ"]
    lines += [
        f"  {name:45} {here.get(name, 'not matched'):25} {there.get(name, 'not matched')}"
        for name in differing
    ]
    return "\n".join(lines)


def _named(plan: Plan) -> str:
    return f"{plan.rules}, keep {plan.budget.keep:g}"


def _rows(plan: Plan, other: Plan) -> list[list[str]]:
    values: dict[str, Callable[[Plan], str]] = {
        "parameters of the model": lambda p: count(p.model_after.parameters),
        "predicted loss": lambda p: f"{loss(p.budget.predicted)} {p.loss_unit}",
        "measured, held back": lambda p: loss(p.held_back.measured) if p.held_back else "-",
        "forward pass": lambda p: f"{p.speed.ratio:.2f} times as fast" if p.speed else "-",
        "rewritten": lambda p: f"{len(p.rewritten)} of {len(p.sites)}",
    }
    return [[name, value(plan), value(other)] for name, value in values.items()]
