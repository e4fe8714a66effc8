"""The sites of a plan as rows, for tables of other programs."""

from __future__ import annotations

from typing import Any

from fxcompress.plans.plan import Plan
from fxcompress.report import summary
from fxcompress.report.quantities import loss, loss_label, percent


def site_rows(plan: Plan) -> list[dict[str, Any]]:
    """One row for each matched site, in graph order.

    ``kept`` is the share of its parameters; ``measured`` is None without
    :func:`fxcompress.measure`, and of sites that are rewritten together that of all of them.
    """
    measured = {} if plan.fidelity is None else plan.fidelity.by_site
    rows = []
    for site in plan.sites:
        found = measured.get(site.name)
        row: dict[str, Any] = {
            "name": site.name,
            "op": site.op,
            "rule": site.rule,
            "form": site.form,
            "rank": site.rank,
            "full_rank": site.full_rank,
            "group": site.group,
            "predicted": site.predicted,
            "measured": None if found is None else found.measured,
            "energy": site.energy,
            "kept": site.after.parameters / max(1, site.before.parameters),
            "reason": site.reason,
        }
        for unit in site.before.units:
            row[f"{unit.word}_before"] = site.before[unit.word]
            row[f"{unit.word}_after"] = site.after[unit.word]
        rows.append(row)
    return rows


def headline(plan: Plan) -> str:
    """``LlamaForCausalLM: 7 of 8 linear operators rewritten, 94.5% of the parameters, KL 0.13``."""
    kept = percent(plan.model_after.parameters, plan.model_before.parameters)
    text = f"{summary.model_name(plan)}: {summary.rewritten_text(plan)}, {kept} of the parameters"
    if plan.held_back is not None:
        return f"{text}, KL {loss(plan.held_back.measured)}"
    return f"{text}, predicted {loss_label(plan.loss_unit)} {loss(plan.budget.predicted)}"
