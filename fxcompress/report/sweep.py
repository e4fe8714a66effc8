"""A sweep over budgets as a table, as a page with a plot, and as JSON."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

from fxcompress.plan import Plan
from fxcompress.report.quantities import count, loss, loss_label, percent
from fxcompress.report.summary import BUDGET_TEXT, model_name

WIDTH, HEIGHT = 560, 300
"""Of one plot, in pixels."""


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
    values: Mapping[str, float] = field(default_factory=dict)
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
    """

    title: str
    marks: tuple[tuple[float, float, str], ...]
    rows: tuple[tuple[float, str], ...]
    columns: tuple[tuple[float, str], ...]
    dense: float | None

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
    dense: Mapping[str, float]
    complete: bool = True

    @property
    def plans(self) -> dict[float, Plan]:
        """The plans of the budgets that can be met."""
        return {point.keep: point.plan for point in self.points if point.plan is not None}

    @property
    def _first(self) -> Plan:
        return next(point.plan for point in self.points if point.plan is not None)

    def __str__(self) -> str:
        plan = self._first
        unit = BUDGET_TEXT[plan.budget.unit]
        whole = "the matched operators" if plan.budget.of == "matched" else "the model"
        names = [*self.dense]
        head = f"{'keep':>6}  {'parameters':>13} {'MACs':>16}  {'rewritten':>9}  {'predicted':>10}"
        lines = [
            f"sweep of {model_name(plan)}: rules {plan.rules}, metric {plan.metric}, "
            f"keep is of the {unit} of {whole}",
            "",
            head + "".join(f"  {name:>12}" for name in names),
        ]
        size = plan.model_before
        lines.append(
            f"{'dense':>6}  {count(size.parameters):>13} {count(size.macs):>16}  {'':>9}  {'':>10}"
            + "".join(f"  {value:>12.6g}" for value in self.dense.values())
        )
        for point in self.points:
            if point.plan is None:
                reason, _, _ = point.reason.partition(";")
                lines.append(f"{point.keep:>6g}  {reason}")
                continue
            after, budget = point.plan.model_after, point.plan.budget
            sites = f"{len(point.plan.rewritten)} of {len(point.plan.sites)}"
            lines.append(
                f"{point.keep:>6g}  {count(after.parameters):>13} {count(after.macs):>16}  "
                f"{sites:>9}  {loss(budget.predicted):>10}"
                + "".join(f"  {point.values[name]:>12.6g}" for name in names)
            )
        lines += ["", f"predicted: {loss_label(plan.loss_unit)} in {plan.loss_unit}"]
        if not self.complete:
            lines.append("interrupted: the smaller budgets are missing")
        return "\n".join(lines)

    def to_json(self) -> dict[str, Any]:
        """Plain data: every point with its totals, losses and values."""
        points = []
        for point in self.points:
            entry: dict[str, Any] = {"keep": point.keep, "values": dict(point.values)}
            if point.plan is None:
                entry["reason"] = point.reason
            else:
                entry["budget"] = point.plan.budget.model_dump(mode="json")
                entry["before"] = point.plan.model_before.model_dump()
                entry["after"] = point.plan.model_after.model_dump()
                entry["ranks"] = {site.name: site.rank for site in point.plan.sites}
                entry["forms"] = {site.name: site.form for site in point.plan.sites}
            points.append(entry)
        return {"points": points, "dense": dict(self.dense), "complete": self.complete}

    def to_html(self) -> str:
        """One page that needs nothing else: a table and a plot of every quantity."""
        plan = self._first
        page: str = _template().render(
            title=model_name(plan),
            text=str(self),
            curves=self.curves(),
            unit=BUDGET_TEXT[plan.budget.unit],
            width=WIDTH,
            height=HEIGHT,
        )
        return page

    def curves(self) -> tuple[Curve, ...]:
        """Predicted loss on a logarithmic scale, and every measured value."""
        met = [point for point in self.points if point.plan is not None]
        label = loss_label(self._first.loss_unit)
        predicted = [point.plan.budget.predicted for point in met if point.plan is not None]
        keeps = [point.keep for point in met]
        curves = []
        if max(predicted) > 0:
            curves.append(_curve(f"predicted {label}", keeps, predicted, None, logarithmic=True))
        for name, dense in self.dense.items():
            values = [point.values[name] for point in met]
            curves.append(_curve(name, keeps, values, dense, logarithmic=False))
        return tuple(curves)


def _curve(
    title: str,
    keeps: Sequence[float],
    values: Sequence[float],
    dense: float | None,
    *,
    logarithmic: bool,
) -> Curve:
    shown = [*values, *([] if dense is None else [dense])]
    if logarithmic:
        least = min((value for value in shown if value > 0), default=1.0)
        low, high = math.floor(math.log10(least)), math.ceil(math.log10(max(shown)))
        high = max(high, low + 1)
        ticks = [(float(at), f"1e{at}") for at in range(low, high + 1)]
        scaled = [math.log10(max(value, 10.0**low)) for value in values]
    else:
        step = _step(max(shown) - min(shown))
        low_at, high_at = math.floor(min(shown) / step), math.ceil(max(shown) / step)
        high_at = max(high_at, low_at + 1)
        ticks = [(at * step, f"{at * step:g}") for at in range(low_at, high_at + 1)]
        scaled = list(values)
    bottom, top = ticks[0][0], ticks[-1][0]
    left, right = min(keeps), max([1.0, *keeps])

    def x(keep: float) -> float:
        return round(WIDTH * (keep - left) / max(right - left, 1e-9), 1)

    def y(value: float) -> float:
        return round(HEIGHT * (top - value) / (top - bottom), 1)

    texts = (f"keep {k:g}: {v:.6g}" for k, v in zip(keeps, values, strict=True))
    return Curve(
        title=title,
        marks=tuple(
            (x(keep), y(at), text) for keep, at, text in zip(keeps, scaled, texts, strict=True)
        ),
        rows=tuple((y(at), text) for at, text in ticks),
        columns=tuple((x(keep), percent(keep, 1)) for keep in sorted({*keeps, right})),
        dense=None if dense is None or logarithmic else y(dense),
    )


def _step(span: float) -> float:
    """A round distance between ticks: 1, 2 or 5 times a power of ten, about five of them."""
    if span <= 0:
        return 1.0
    raw = span / 5
    power = 10.0 ** math.floor(math.log10(raw))
    return next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw)


@cache
def _template() -> Template:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    source = files("fxcompress.report").joinpath("sweep.html.j2").read_text(encoding="utf-8")
    return environment.from_string(source)
