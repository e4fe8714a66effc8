"""The plan as a table: what ``print(plan)`` shows."""

from __future__ import annotations

from fxcompress.plans.plan import Fidelity, Plan
from fxcompress.report.descent import rounds_lines
from fxcompress.report.diff import group_title, measured_text, ranks_of, unchanged_lines
from fxcompress.report.fold import Row, fold_blocks
from fxcompress.report.quantities import loss, loss_label, span, sparkline
from fxcompress.report.summary import (
    budget_lines,
    fidelity_lines,
    held_back_line,
    model_name,
    predicted_line,
    rewritten_text,
    totals_lines,
)
from fxcompress.report.unchanged import site_text, unchanged

WIDTHS = (17, 17, 9, 13, 16, 16)
BARS = 12
"""Bars of a sparkline here at most, so that a line keeps to 100 columns."""


def plan_table(plan: Plan) -> str:
    """The budget, the totals, and one line for alike sites.

    ::

        plan for LlamaForCausalLM: rules decoder.yaml, metric kfac
        210 of 211 linear operators to be rewritten
        ...
        site                operator          form      kept          KL               rank
        model.layers.{0..29}.mlp                            30 alike
          up_proj           linear 576→1536   pivoted   23.1%..44.8%  0.0004..0.0031   96..208 ▄▅█▇
    """
    head = [
        f"plan for {model_name(plan)}: rules {plan.rules}, metric {plan.metric}",
        rewritten_text(plan),
        held_back_line(plan),
    ]
    if plan.calibration:
        facts = ", ".join(f"{name} {value}" for name, value in plan.calibration.items())
        if plan.damping:
            facts += f", damping {' and '.join(f'{one:g}' for one in plan.damping)}"
        head.append(f"calibration: {facts}")
    lines = [*budget_lines(plan), predicted_line(plan), *fidelity_lines(plan), *rounds_lines(plan)]
    sections = [head, lines, totals_lines(plan)]
    groups = fold_blocks(plan.rewritten)
    if groups:
        label = loss_label(plan.loss_unit)
        extra = () if plan.fidelity is None else ("measured KL",)
        lines = [_columns("site", "operator", "form", "kept", label, *extra, "rank")]
        for group in groups:
            lines += [*group_title(group), *(_row(row, plan.fidelity) for row in group.rows)]
        sections.append(lines)
    rest = unchanged(plan)
    if rest:
        sections.append(["unchanged:", *unchanged_lines(rest)])
    if plan.warnings:
        sections.append(["warnings:", *(f"  {warning}" for warning in plan.warnings)])
    return "\n\n".join("\n".join(lines) for lines in sections)


def _row(row: Row, fidelity: Fidelity | None) -> str:
    site = row.sites[0]
    name = row.name or "(itself)"
    axes = ranks_of(row.sites)
    ranks = axes[0]
    text = "×".join(span(axis, "{:.0f}".format) for axis in axes)
    kept = [
        100 * one.after.parameters / one.before.parameters
        for one in row.sites
        if one.before.parameters
    ]
    return _columns(
        f"  {name}" + (f" ({row.per_block} alike)" if row.per_block > 1 else ""),
        site_text(site),
        str(site.form),
        span(kept, "{:.1f}%".format) if kept else "-",
        span((one.predicted for one in row.sites), loss),
        *(() if fidelity is None else (measured_text(row, fidelity),)),
        text if min(ranks) == max(ranks) else f"{text} {sparkline(ranks, BARS)}",
    )


def _columns(*cells: str) -> str:
    """Seven of them if there is a measured loss, the ranks last; six without."""
    *others, rank = cells
    padded = (f"{cell:{width}}" for cell, width in zip(others, WIDTHS, strict=False))
    return " ".join([*padded, rank]).rstrip()
