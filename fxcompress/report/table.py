"""The plan as a table: what ``print(plan)`` shows."""

from __future__ import annotations

from collections.abc import Sequence

from fxcompress.plans.plan import Plan
from fxcompress.report import summary
from fxcompress.report.columns import TERMINAL, Column, Entry, head, measured_sites, shown
from fxcompress.report.descent import rounds_lines
from fxcompress.report.diff import group_title, unchanged_lines
from fxcompress.report.fold import fold_blocks
from fxcompress.report.unchanged import unchanged

SITE = 17
"""Width of the first column."""


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
    about = [
        f"plan for {summary.model_name(plan)}: rules {plan.rules}, metric {plan.metric}",
        summary.rewritten_text(plan),
        summary.held_back_line(plan),
        summary.speed_line(plan),
    ]
    if plan.calibration:
        facts = ", ".join(f"{name} {value}" for name, value in plan.calibration.items())
        if plan.damping:
            facts += f", damping {' and '.join(f'{one:g}' for one in plan.damping)}"
        about.append(f"calibration: {facts}")
    lines = [
        *summary.budget_lines(plan),
        summary.predicted_line(plan),
        *summary.fidelity_lines(plan),
        *rounds_lines(plan),
    ]
    sections = [about, lines, [*summary.totals_lines(plan), *summary.batch_lines(plan)]]
    groups = fold_blocks(plan.rewritten)
    if groups:
        columns, measured = shown(TERMINAL, plan), measured_sites(plan)
        lines = [_line("site", columns, [head(column, plan) for column in columns])]
        for group in groups:
            lines += group_title(group)
            for row in group.rows:
                entry = Entry(row.sites, measured)
                name = f"  {row.label}" + (f" ({row.per_block} alike)" * (row.per_block > 1))
                lines.append(_line(name, columns, [column.alike(entry) for column in columns]))
        sections.append(lines)
    rest = unchanged(plan)
    if rest:
        sections.append(["unchanged:", *unchanged_lines(rest)])
    if plan.warnings:
        sections.append(["warnings:", *(f"  {warning}" for warning in plan.warnings)])
    return "\n\n".join("\n".join(lines) for lines in sections)


def _line(name: str, columns: Sequence[Column], cells: Sequence[str]) -> str:
    padded = (f"{cell:{column.width}}" for column, cell in zip(columns, cells, strict=True))
    return " ".join([f"{name:{SITE}}", *padded]).rstrip()
