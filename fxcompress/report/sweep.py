"""A sweep over budgets as a table, as a page with a plot, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from textwrap import wrap
from typing import Any

from fxcompress.notebook import Shown
from fxcompress.plans.plan import Plan
from fxcompress.plans.units import UNITS, CountedUnit
from fxcompress.report import summary
from fxcompress.report.html import render
from fxcompress.report.page_data import by_keep, plot_json
from fxcompress.report.plot import Line, Mark, Plot, decades, even
from fxcompress.report.quantities import (
    LOSS_IN_NATS,
    count,
    loss,
    loss_label,
    percent,
    short,
)

Values = Mapping[str, float]

WIDTH, HEIGHT = 560, 300
"""Size of one plot, in pixels."""

COLUMNS = 100
"""Width of a line of text, in characters."""


@dataclass(frozen=True)
class Point:
    """One budget.

    Attributes:
        keep: the fraction asked for.
        plan: what comes of it; None if it cannot be met.
        values: measured, by name.
        reason: why it cannot be met.
    """

    keep: float
    plan: Plan | None
    values: Values = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True, repr=False)
class Sweep(Shown):
    """What a sweep found.

    Attributes:
        points: by falling ``keep``.
        dense: values of the dense model.
        complete: whether it was not interrupted.
    """

    points: tuple[Point, ...]
    dense: Values
    complete: bool = True

    @property
    def plans(self) -> dict[float, Plan]:
        """The plans of the budgets that can be met."""
        return {point.keep: point.plan for point in self.points if point.plan is not None}

    @property
    def _first(self) -> Plan:
        return next(point.plan for point in self.points if point.plan is not None)

    @property
    def headline(self) -> str:
        """``LlamaForCausalLM, keep 0.9, 0.8, 0.7``."""
        keeps = ", ".join(f"{point.keep:g}" for point in self.points)
        return f"{summary.model_name(self._first)}, keep {keeps}"

    def __str__(self) -> str:
        """Measured values are the last columns; a short one keeps to 100 characters.

        ::

            sweep of LlamaForCausalLM: rules decoder.yaml, metric kfac
            keep is of the parameters of the matched operators, sizes are of the model
            MACs are per sample; the recorded batch: 2 samples of 512

              keep   parameters    kept   MACs  bytes   rewritten  predicted KL  perplexity
             dense  134,515,008  100.0%  68.9G   538M                               25.6466
               0.8  113,281,344   84.2%  58.0G   453M  210 of 210        0.0974     28.6889
        """
        rows = self._rows()
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        table = ["  ".join(map(str.rjust, row, widths)).rstrip() for row in rows]
        impossible = [
            line
            for point in self.points
            if point.plan is None
            for line in wrap(
                f"keep {point.keep:g}: {point.reason}", COLUMNS, subsequent_indent="    "
            )
        ]
        plan = self._first
        sections = [
            [
                f"sweep of {summary.model_name(plan)}: rules {plan.rules}, metric {plan.metric}",
                f"keep is of the {self.whole}, sizes are of the model",
                *self._per_row(),
            ],
            table,
            impossible,
            [
                f"predicted {loss_label(plan.loss_unit)} is in {plan.loss_unit}",
                *self._judged(),
            ],
        ]
        if self.warnings:
            sections.append(["warnings:", *(f"  {warning}" for warning in self.warnings)])
        if not self.complete:
            sections.append(["interrupted: the smaller budgets are missing"])
        return "\n\n".join("\n".join(lines) for lines in sections if lines)

    def _per_row(self) -> list[str]:
        """What the columns of amounts for rows of the recorded batch are for."""
        plan = self._first
        units = [unit for unit in plan.model_before.units if unit.per_row]
        return [
            f"{unit.text} are{summary.per(plan, unit)}; {line}"
            for unit in units
            for line in summary.batch_lines(plan)
        ]

    def _judged(self) -> list[str]:
        """What the column of measured losses is about."""
        found = [plan for plan in self.plans.values() if plan.held_back is not None]
        if not found or found[0].held_back is None:
            return []
        data = summary.held_back_data(found[0].held_back)
        return [f"held back: {summary.held_back_name(found[0])} in {LOSS_IN_NATS}, on {data}"]

    def _rows(self) -> list[tuple[str, ...]]:
        """Heads, the dense model, and every budget."""
        first, plans = self._first, [*self.plans.values()]
        size, budget = first.model_before, UNITS[first.budget.unit]
        columns = [["keep", "dense", *(f"{keep:g}" for keep in self.plans)]]

        def column(head: str, dense: str, cell: Callable[[Plan], str]) -> None:
            columns.append([head, dense, *map(cell, plans)])

        for unit in size.units:
            whole = (size[unit.word], *(plan.model_after[unit.word] for plan in plans))
            sizes = [summary.shown(first, unit, amount) for amount in whole]
            columns.append([unit.text, *map(count if unit.exact else short, sizes)])
            if unit.exact:
                columns.append(["kept", *(percent(after, sizes[0]) for after in sizes)])
        if not isinstance(budget, CountedUnit):
            dense = budget.amount(first.budget.dense)
            column("time", dense, lambda plan: budget.amount(plan.budget.cost))
        if any(plan.speed is not None for plan in plans):
            column("faster", "", lambda p: f"{p.speed.ratio:.2f}×" if p.speed else "")
        column("rewritten", "", lambda plan: f"{len(plan.rewritten)} of {len(plan.sites)}")
        if any(plan.held_back is not None for plan in plans):
            column("held back", "", lambda p: loss(p.held_back.measured) if p.held_back else "")
        label = f"predicted {loss_label(first.loss_unit)}"
        column(label, "", lambda plan: loss(plan.budget.predicted))
        for name, value in self.dense.items():
            values = (point.values[name] for point in self.points if point.plan is not None)
            columns.append([name, *(f"{each:.6g}" for each in (value, *values))])
        head, dense_row, *rows = zip(*columns, strict=True)
        made = iter(rows)
        return [
            head,
            dense_row,
            *(
                (f"{point.keep:g}", "impossible", *[""] * (len(head) - 2))
                if point.plan is None
                else next(made)
                for point in self.points
            ),
        ]

    @property
    def whole(self) -> str:
        """What ``keep`` is a fraction of: ``"parameters of the matched operators"``."""
        budget = self._first.budget
        users = "the matched operators" if budget.of == "matched" else "the model"
        return f"{UNITS[budget.unit].text} of {users}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Warnings of all plans, each once."""
        return tuple(dict.fromkeys(note for plan in self.plans.values() for note in plan.warnings))

    def to_json(self) -> dict[str, Any]:
        """Every point with its totals, losses and values; nothing but JSON's own types.

        A value that is not finite is null.  The keys of a plan are those of ``Diff.to_json``.
        """
        plan = self._first
        return {
            "model_class": plan.model_class,
            "rules": plan.rules,
            "metric": plan.metric,
            "loss_unit": plan.loss_unit,
            "calibration": dict(plan.calibration),
            "batch": plan.batch.model_dump(mode="json"),
            "dense": _finite(self.dense),
            "points": [_entry(point) for point in self.points],
            "complete": self.complete,
        }

    def to_html(self) -> str:
        """One page that needs nothing else: a plot of every quantity, and sortable tables."""
        head, *rows = self._rows()
        plan, plans = self._first, self.plans
        notes = [
            f"keep {point.keep:g}: {point.reason}" for point in self.points if point.plan is None
        ]
        notes += self._per_row() + self._judged()
        notes += [] if self.complete else ["interrupted: the smaller budgets are missing"]
        data = {
            "kind": "sweep",
            "title": summary.model_name(plan),
            "subtitle": f"{len(plans)} budgets; keep is of the {self.whole}",
            "source": f"rules {plan.rules}, metric {plan.metric}",
            "warnings": list(self.warnings),
            "heads": head,
            "rows": rows,
            "notes": notes,
            "plots": [plot_json(plot) for plot in self.plots()],
            "ranks": by_keep(plans),
            "text": str(self),
        }
        return render(data, str(self).splitlines())

    def plots(self) -> tuple[Plot, ...]:
        """Predicted loss on a logarithmic scale, and every measured value.

        Those of which nothing is finite, or nothing positive of the loss, cannot be drawn.
        """
        across = f"keep, of the {self.whole}"
        predicted = {keep: plan.budget.predicted for keep, plan in self.plans.items()}
        title = f"predicted {loss_label(self._first.loss_unit)}"
        drawn = [_plot(title, across, predicted, None)] if max(predicted.values()) > 0 else []
        for name, dense in self.dense.items():
            values = {point.keep: point.values[name] for point in self.points if point.plan}
            if any(map(math.isfinite, values.values())):
                drawn.append(_plot(name, across, values, dense))
        return tuple(drawn)


def _entry(point: Point) -> dict[str, Any]:
    plan = point.plan
    if plan is None:
        return {"keep": point.keep, "reason": point.reason}
    return {
        "keep": point.keep,
        "budget": {**plan.budget.model_dump(mode="json"), "gap": plan.budget.gap},
        "totals": [{**asdict(total), "kept": total.kept} for total in summary.totals(plan)],
        "speed": summary.speed_json(plan),
        "rewritten": len(plan.rewritten),
        "forms": {site.name: site.form for site in plan.sites},
        "ranks": {site.name: site.model_dump(mode="json")["rank"] for site in plan.sites},
        "values": _finite(point.values),
        "warnings": list(plan.warnings),
    }


def _finite(values: Values) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _plot(title: str, across: str, values: Mapping[float, float], dense: float | None) -> Plot:
    """A drawing of the values by keep; without one of a dense model it is that of a loss."""
    finite = {keep: value for keep, value in values.items() if math.isfinite(value)}
    level = dense if dense is not None and math.isfinite(dense) else None
    drawn = [*finite.values(), *([] if level is None else [level])]
    # Perplexities of models that are compressed too far leave nothing to see of the others.
    logarithmic = dense is None or (min(drawn) > 0 and max(drawn) > 100 * min(drawn))
    y = decades(drawn, HEIGHT) if logarithmic else even(drawn, HEIGHT)
    x = even((min(values), 1.0), WIDTH, across, parts=7, text="{:.0%}".format)
    missing = ", ".join(f"{keep:g}" for keep in values if keep not in finite)
    return Plot(
        title,
        x,
        y,
        curve=tuple(finite.items()),
        marks=tuple(Mark(k, v, f"keep {k:g}: {v:.6g}") for k, v in finite.items()),
        lines=() if level is None else (Line("level", (x.low, x.high), (level, level), "dense"),),
        note=f"not finite at keep {missing}" if missing else "",
    )
