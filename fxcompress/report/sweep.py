"""A sweep over budgets as a table, as a page with a plot, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from importlib.resources import files
from textwrap import wrap
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from fxcompress.plans.plan import Plan, Size
from fxcompress.report.quantities import (
    LOSS_IN_NATS,
    amount,
    count,
    loss,
    loss_label,
    percent,
    short,
)
from fxcompress.report.summary import (
    BUDGET_TEXT,
    held_back_data,
    held_back_name,
    model_name,
    totals,
)

Values = Mapping[str, float]

WIDTH, HEIGHT = 560, 300
"""Of one plot, in pixels."""

DECADES = 8
"""Values that are smaller than the largest by more decades are drawn at the lower end."""

COLUMNS = 100
"""Of a line of text."""


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


@dataclass(frozen=True)
class Curve:
    """One quantity against the share that is kept, as a drawing.

    Attributes:
        title: what it is.
        marks: pixels, and the text of every point.
        rows: pixel and label of the ticks on the left.
        columns: pixel and label of the ticks below.
        dense: pixel of the dense model's value, None without one.
        note: what is not drawn.
    """

    title: str
    marks: tuple[tuple[float, float, str], ...]
    rows: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, str], ...]
    dense: float | None
    note: str = ""

    @property
    def line(self) -> str:
        """Points of the polyline."""
        return " ".join(f"{x},{y}" for x, y, _ in self.marks)


@dataclass(frozen=True)
class Sweep:
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

    def __str__(self) -> str:
        """Measured values are the last columns; two short ones keep to 100 characters.

        ::

            sweep of LlamaForCausalLM: rules decoder.yaml, metric kfac
            keep is of the parameters of the matched operators, sizes are of the model

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
                f"sweep of {model_name(plan)}: rules {plan.rules}, metric {plan.metric}",
                f"keep is of the {self.whole}, sizes are of the model",
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

    def _judged(self) -> list[str]:
        """What the column of measured losses is about."""
        found = [plan for plan in self.plans.values() if plan.held_back is not None]
        if not found or found[0].held_back is None:
            return []
        data = held_back_data(found[0].held_back)
        return [f"held back: {held_back_name(found[0])} in {LOSS_IN_NATS}, on {data}"]

    def _rows(self) -> list[tuple[str, ...]]:
        plan = self._first
        timed = plan.budget.unit == "latency"
        size, dense = plan.model_before, plan.budget.dense
        judged = any(made.held_back is not None for made in self.plans.values())
        head = (
            *("keep", "parameters", "kept", "MACs", "bytes"),
            *(("time",) if timed else ()),
            "rewritten",
            *(("held back",) if judged else ()),
            *(f"predicted {loss_label(plan.loss_unit)}", *self.dense),
        )
        rows = [head]

        def row(
            name: str, now: Size, cost: float, done: str, found: str, lost: str, values: Values
        ) -> None:
            rows.append(
                (
                    *(name, count(now.parameters), percent(now.parameters, size.parameters)),
                    *(short(now.macs), short(now.bytes)),
                    *((amount(cost, plan.budget.unit),) if timed else ()),
                    *(done, *((found,) if judged else ()), lost),
                    *(f"{value:.6g}" for value in values.values()),
                )
            )

        row("dense", size, dense, "", "", "", self.dense)
        for point in self.points:
            made = point.plan
            if made is None:
                rows.append((f"{point.keep:g}", "impossible", *[""] * (len(head) - 2)))
                continue
            done = f"{len(made.rewritten)} of {len(made.sites)}"
            lost = loss(made.budget.predicted)
            values = {name: point.values[name] for name in self.dense}
            found = "" if made.held_back is None else loss(made.held_back.measured)
            row(f"{point.keep:g}", made.model_after, made.budget.cost, done, found, lost, values)
        return rows

    @property
    def whole(self) -> str:
        """What ``keep`` is a fraction of: ``"parameters of the matched operators"``."""
        budget = self._first.budget
        users = "the matched operators" if budget.of == "matched" else "the model"
        return f"{BUDGET_TEXT[budget.unit]} of {users}"

    @property
    def warnings(self) -> tuple[str, ...]:
        """Of all plans, each once."""
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
            "dense": _finite(self.dense),
            "points": [_entry(point) for point in self.points],
            "complete": self.complete,
        }

    def to_html(self) -> str:
        """One page that needs nothing else: a plot of every quantity, and the table."""
        page: str = _template().render(
            title=model_name(self._first),
            text=str(self),
            curves=self.curves(),
            across=f"keep, of the {self.whole}",
            width=WIDTH,
            height=HEIGHT,
        )
        return page

    def curves(self) -> tuple[Curve, ...]:
        """Predicted loss on a logarithmic scale, and every measured value.

        Those of which nothing is finite, or nothing positive of the loss, cannot be drawn.
        """
        predicted = {keep: plan.budget.predicted for keep, plan in self.plans.items()}
        title = f"predicted {loss_label(self._first.loss_unit)}"
        drawn = [_curve(title, predicted, None)] if max(predicted.values()) > 0 else []
        for name, dense in self.dense.items():
            values = {point.keep: point.values[name] for point in self.points if point.plan}
            if any(map(math.isfinite, values.values())):
                drawn.append(_curve(name, values, dense))
        return tuple(drawn)


def _entry(point: Point) -> dict[str, Any]:
    plan = point.plan
    if plan is None:
        return {"keep": point.keep, "reason": point.reason}
    return {
        "keep": point.keep,
        "budget": {**plan.budget.model_dump(mode="json"), "gap": plan.budget.gap},
        "totals": [{**asdict(total), "kept": total.kept} for total in totals(plan)],
        "rewritten": len(plan.rewritten),
        "forms": {site.name: site.form for site in plan.sites},
        "ranks": {site.name: site.model_dump(mode="json")["rank"] for site in plan.sites},
        "values": _finite(point.values),
        "warnings": list(plan.warnings),
    }


def _finite(values: Values) -> dict[str, float | None]:
    return {name: value if math.isfinite(value) else None for name, value in values.items()}


def _curve(title: str, values: Mapping[float, float], dense: float | None) -> Curve:
    """A drawing of the values by keep; without one of a dense model it is that of a loss."""
    finite = {keep: value for keep, value in values.items() if math.isfinite(value)}
    level = dense if dense is not None and math.isfinite(dense) else None
    shown = [*finite.values(), *([] if level is None else [level])]
    # Perplexities of models that are compressed too far leave nothing to see of the others.
    logarithmic = dense is None or (min(shown) > 0 and max(shown) > 100 * min(shown))
    y, rows = _decades(shown) if logarithmic else _even(shown)
    left = min(math.floor(10 * min(values) + 1e-6), 9)

    def x(keep: float) -> float:
        return round(WIDTH * (10 * keep - left) / (10 - left), 1)

    missing = ", ".join(f"{keep:g}" for keep in values if keep not in finite)
    return Curve(
        title=title,
        marks=tuple((x(k), y(v), f"keep {k:g}: {v:.6g}") for k, v in finite.items()),
        rows=rows,
        columns=tuple((x(at / 10), f"{10 * at}%") for at in range(left, 11)),
        dense=None if level is None else y(level),
        note=f"not finite at keep {missing}" if missing else "",
    )


Axis = tuple[Callable[[float], float], tuple[tuple[float, str], ...]]
"""The place of a value in pixels from the top, and the ticks with their labels."""


def _decades(shown: Sequence[float]) -> Axis:
    """Whole powers of ten; what is smaller than all of them stands at the lower end."""
    logs = [math.log10(value) for value in shown if value > 0]
    high = math.ceil(max(logs))
    low = min(max(math.floor(min(logs)), high - DECADES), high - 1)

    def y(value: float) -> float:
        log = math.log10(value) if value > 0 else -math.inf
        return round(HEIGHT * (high - max(log, low)) / (high - low), 1)

    return y, tuple((y(10.0**at), f"1e{at}") for at in range(low, high + 1))


def _even(shown: Sequence[float]) -> Axis:
    """Even steps between round numbers."""
    step = _step(shown)
    low, high = math.floor(min(shown) / step), math.ceil(max(shown) / step)
    high = max(high, low + 1)

    def y(value: float) -> float:
        return round(HEIGHT * (high - value / step) / (high - low), 1)

    return y, tuple((y(at * step), f"{at * step:.10g}") for at in range(low, high + 1))


def _step(shown: Sequence[float]) -> float:
    """A round distance between ticks: 1, 2 or 5 times a power of ten, about five of them."""
    size = max(map(abs, shown)) or 1.0
    span = max(shown) - min(shown)
    raw = (span if span > 1e-9 * size else size) / 5  # alike: as if from zero
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = files("fxcompress.report").joinpath("sweep.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
