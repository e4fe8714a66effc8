"""What the page of a diff shows, as data: numbers and texts, no markup."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from fxcompress.picture import graph_data
from fxcompress.plans.plan import Plan, SitePlan
from fxcompress.plans.tradeoff import Tradeoff
from fxcompress.plans.units import PARAMETERS, UNITS
from fxcompress.report import summary
from fxcompress.report.columns import (
    Entry,
    elsewhere,
    group,
    head,
    measured_sites,
    rank_text,
    shown_on_page,
)
from fxcompress.report.comparison import compared
from fxcompress.report.descent import descent, rounds_lines
from fxcompress.report.plot import Plot
from fxcompress.report.quantities import count, duration, loss, loss_label, percent, with_error
from fxcompress.report.scatter import fidelity_scatter
from fxcompress.report.unchanged import Unchanged

Json = dict[str, Any]

VALUES = 32
"""Values of one spectrum on the page at most."""

MOVES = 100
"""Rows of the tables of what is bought and sold at most; the rest is summed up in one."""

LONGEST_TEXT = 1_000_000
"""Characters of the text form that a page takes along."""


def page_data(plan: Plan, unchanged: Sequence[Unchanged], text: str, other: Plan | None) -> Json:
    """Everything on the page, in JSON's own types.

    Args:
        plan: it is about.
        unchanged: operators that stay as they were, folded.
        text: the diff as text.
        other: a plan to compare with, aligned by the names of sites; None for none.
    """
    return {
        "kind": "diff",
        "title": summary.model_name(plan),
        "subtitle": summary.rewritten_text(plan),
        "source": f"rules {plan.rules}, metric {plan.metric}",
        "loss": {"label": loss_label(plan.loss_unit), "unit": plan.loss_unit},
        "cards": cards(plan),
        "warnings": [*plan.warnings, *(plan.fidelity.warnings if plan.fidelity else ())],
        "sites": sites(plan),
        "other": None if other is None else compared(plan, other),
        "budget": budget(plan),
        "prediction": prediction(plan),
        "rules": rules(plan),
        "rounds": rounds(plan),
        "unchanged": [
            {
                "names": list(one.patterns),
                "count": len(one.names),
                "what": one.what,
                "parameters": one.parameters,
                "reason": one.reason,
            }
            for one in unchanged
        ],
        "expanded": list(plan.expanded),
        "reproduce": reproduce(plan),
        "graph": graph_data(plan),
        "text": text if len(text) <= LONGEST_TEXT else "",
    }


def cards(plan: Plan) -> list[Json]:
    """The large numbers at the top: what it lost, what it is worth, what it weighs."""
    held, found, budget = plan.held_back, plan.fidelity, plan.budget
    label = loss_label(plan.loss_unit)
    lines = [
        f"nats per prediction, on {summary.held_back_data(held)}"
        if held
        else summary.not_held_back(plan)
    ]
    if found is not None:
        lines.append(f"on other data {with_error(found.measured, found.error)}")
    lines.append(f"predicted {label} {loss(budget.predicted)} {plan.loss_unit}")
    made: list[Json] = [
        {
            "title": summary.held_back_name(plan),
            "big": with_error(held.measured, held.error) if held else "not measured",
            "lines": lines,
        }
    ]
    speed = plan.speed
    if speed is None:
        made.append(
            {"title": "forward pass", "big": "not measured", "lines": [summary.not_timed(plan)]}
        )
    else:
        times = f"{duration(speed.before)} → {duration(speed.after)} for the recorded batch"
        made.append(
            {
                "title": "forward pass",
                "big": f"{speed.ratio:.2f} times as fast",
                "lines": [times, summary.speed_details(speed)],
            }
        )
    totals = summary.totals(plan)
    for unit in plan.model_before.units:
        model, *matched = (total for total in totals if total.unit == unit.word)
        write = [count(summary.shown(plan, unit, n)) for n in (model.before, model.after)]
        lines = [" → ".join(write)]
        for one in matched:
            own = [count(summary.shown(plan, unit, n)) for n in (one.before, one.after)]
            kept = percent(one.after, one.before)
            lines.append(f"matched operators: {kept} kept, {' → '.join(own)}")
        if unit.per_row:
            lines += summary.batch_lines(plan)
        title = f"{unit.text} of the model{summary.per(plan, unit)}"
        kept = f"{percent(model.after, model.before)} kept"
        made.append({"title": title, "big": kept, "share": model.kept, "lines": lines})
    return made


def sites(plan: Plan) -> Json:
    """Columns of everything about sites, in graph order; words that are repeated stand once."""
    rows, measured = plan.sites, measured_sites(plan)
    return {
        "name": [site.name for site in rows],
        "weight": [
            site.weight.removeprefix(f"{site.name}.") if site.name else site.weight for site in rows
        ],
        "operator": _words(f"{s.operator}{', bias' if s.bias else ''}, {s.dtype}" for s in rows),
        "op": _words(site.op for site in rows),
        "form": _words(site.form_text for site in rows),
        "forms": _words(", ".join(site.forms) for site in rows),
        "rule": _words(site.rule for site in rows),
        "location": _words(site.location for site in rows),
        "rank": [rank_text(site) for site in rows],
        "share": [round(site.rank_share, 4) for site in rows],
        "energy": [round(site.energy, 4) for site in rows],
        "dense": [int(site.form is None) for site in rows],
        "calls": _words(site.calls for site in rows),
        "reason": _words(site.reason for site in rows),
        "bundle": _words(site.bundle for site in rows),
        "bundles": {name: _bundle(those) for name, those in plan.bundles.items()},
        "elsewhere": _words(elsewhere(Entry((site,), measured)) for site in rows),
        "error": [
            None if (one := measured.get(site.name)) is None else _digits(one.error)
            for site in rows
        ],
        "spectrum": [_thinned(site) for site in rows],
        "first": [site.ranks[0] for site in rows],
        "full": [site.full_ranks[0] for site in rows],
        "columns": [
            {
                "head": head(column, plan),
                "group": group(column, plan),
                "write": column.write,
                "menu": column.menu,
                "values": [_digits(column.value(site, plan)) for site in rows],
            }
            for column in shown_on_page(plan)
        ],
        "parameters": {
            "before": [site.before.parameters for site in rows],
            "after": [site.after.parameters for site in rows],
        },
        "predicted": [site.predicted for site in rows],
    }


def _bundle(those: Sequence[SitePlan]) -> Json:
    """What sites that are rewritten together have in common; of a hidden value who reads it."""
    return {
        "sites": [site.name for site in those],
        "reader": those[-1].reader,
        "held": [held.name for held in those[-1].held if held.parameters],
    }


def _words(values: Iterable[str | int]) -> Json:
    """Values as places in a list of the different ones."""
    places: dict[str | int, int] = {}
    at = [places.setdefault(value, len(places)) for value in values]
    return {"words": list(places), "at": at}


def _digits(value: float | None) -> float | int | None:
    """A number to four digits, counts in full."""
    if value is None or isinstance(value, int) or float(value).is_integer():
        return None if value is None else int(value)
    return float(f"{value:.4g}")


def _thinned(site: SitePlan) -> list[float]:
    """Some of the singular values, evenly spaced, to three digits.

    None of what makes a hidden value, whose channels are chosen where it is read.
    """
    values = site.spectrum if site.reader in ("", site.name) else ()
    size = min(len(values), VALUES)
    places = [round(at * (len(values) - 1) / max(size - 1, 1)) for at in range(size)]
    return [float(f"{values[at]:.3g}") for at in places]


def budget(plan: Plan) -> Json:
    """The budget in words, the frontier, and what one percent more or less would change."""
    lines = [line.strip() for line in summary.budget_lines(plan)]
    lines.append(summary.predicted_line(plan))
    found: Json = {"lines": lines, "frontier": None}
    trade = plan.tradeoff
    if trade is None:
        why = "several budgets hold at the same time" if plan.limits else "the plan is an older one"
        if plan.budget.allocation == "uniform":
            why = "ranks are uniform: nothing was minimized"
        return {**found, "why": f"No frontier is known: {why}."}
    dense, word = plan.budget.dense, UNITS[plan.budget.unit].text
    return {
        **found,
        "frontier": {
            "keep": [_digits(cost / dense) if dense else 1.0 for cost in trade.costs],
            "loss": list(trade.losses),
            "now": trade.now,
            "today": [plan.budget.cost / dense if dense else 1.0, plan.budget.fitted],
            "x": f"kept of the matched operators' {word}",
            "y": f"fitted {loss_label(plan.loss_unit)}, {plan.loss_unit}",
        },
        "more": moves(plan, trade, trade.more),
        "less": moves(plan, trade, trade.less),
    }


def moves(plan: Plan, trade: Tradeoff, to: int) -> Json | None:
    """Who takes another choice where the budget goes to another point; None if nobody can.

    The rows add up to the totals.
    """
    if to == trade.now:
        return None
    rows = []
    for curve in trade.curves:
        before, after = (curve.offers[curve.taken[at]] for at in (trade.now, to))
        if before != after:
            name, *others = curve.sites
            label = f"{name} and {len(others)} more" if others else name
            cost, lost = after.cost - before.cost, after.loss - before.loss
            rows.append(_Move(label, before.text, after.text, cost, lost, name))
    rows.sort(key=lambda row: -abs(row.loss))
    if len(rows) > MOVES:
        rest = rows[MOVES:]
        cost, lost = math.fsum(row.cost for row in rest), math.fsum(row.loss for row in rest)
        rows = [*rows[:MOVES], _Move(f"{len(rest)} others", "", "", cost, lost, "")]
    cost, lost = math.fsum(row.cost for row in rows), math.fsum(row.loss for row in rows)
    unit, per = UNITS[plan.budget.unit], summary.per(plan, UNITS[plan.budget.unit])

    def amount(number: float) -> str:
        return unit.amount(summary.shown(plan, unit, number))

    share = percent(abs(cost), plan.budget.dense)
    what = f"{share} {'more' if cost > 0 else 'less'} {unit.text} ({amount(abs(cost))}{per})"
    how = f"{loss(abs(lost))} {plan.loss_unit} {'less' if lost < 0 else 'more'}"
    now = trade.losses[trade.now]
    of = f", {abs(lost) / now:.0%} of what is lost now" if now else ""
    return {
        "text": f"{what}: {how}{of}",
        "rows": [
            [row.label, row.now, row.then, amount(row.cost), row.loss, row.site] for row in rows
        ],
        "unit": f"{unit.text}{per}",
        "loss": lost,
    }


@dataclass(frozen=True)
class _Move:
    """A row of what is bought or sold: what sites take now and would take then."""

    label: str
    now: str
    then: str
    cost: float
    loss: float
    site: str


def prediction(plan: Plan) -> Json:
    """Whether the prediction is right: of the whole, and site by site if that was measured."""
    held, budget = plan.held_back, plan.budget
    rows = [
        ["predicted, summed over sites", loss(budget.predicted), plan.loss_unit],
        ["fitted: what was minimized, damping included", loss(budget.fitted), plan.loss_unit],
    ]
    if held is not None:
        value = with_error(held.measured, held.error)
        rows.insert(0, ["measured, the whole model on batches held back", value, "nats"])
        if budget.predicted > 0 and loss_label(plan.loss_unit) == "KL":
            ratio = f"{held.measured / budget.predicted:.2f}"
            rows.append(["measured / predicted", ratio, "1 would be exact"])
    found = plan.fidelity
    if found is not None:
        value = with_error(found.measured, found.error)
        rows.append(["measured, the whole model on other data", value, "nats"])
        rows.append(["measured, sites one at a time, in sum", loss(found.singly), "nats"])
    return {
        "rows": rows,
        "lines": [line.strip() for line in summary.fidelity_lines(plan)],
        "scatter": plot_json(fidelity_scatter(plan)),
    }


def rules(plan: Plan) -> list[Json]:
    """What every rule did; the sums over rules are those over sites."""
    found: dict[tuple[str, str], list[SitePlan]] = {}
    for site in plan.sites:
        found.setdefault((site.rule, site.location), []).append(site)
    measured = measured_sites(plan)
    timed = any(site.seconds for site in plan.sites)
    rows = []
    for (rule, location), those in found.items():
        own = {one.name: one.measured for s in those if (one := measured.get(s.name)) is not None}
        rows.append(
            {
                "rule": rule,
                "source": location,
                "matched": len(those),
                "rewritten": sum(site.form is not None for site in those),
                "before": sum(site.before.parameters for site in those),
                "after": sum(site.after.parameters for site in those),
                "predicted": math.fsum(site.predicted for site in those),
                "measured": math.fsum(own.values()) if own else None,
                "seconds": [math.fsum(s.seconds[at] for s in those if s.seconds) for at in (0, 1)]
                if timed
                else None,
            }
        )
    return rows


def rounds(plan: Plan) -> Json | None:
    """How the objective fell; None without rounds."""
    lines = rounds_lines(plan)
    if not lines:
        return None
    return {"big": lines[0], "lines": lines[1:], "plot": plot_json(descent(plan))}


def reproduce(plan: Plan) -> Json:
    """What to know to get this model again, and to load it."""
    budget, made = plan.budget, plan.made
    facts = [
        ["model", plan.model_class],
        ["rules", plan.rules],
        ["metric", plan.metric],
        ["budget", f"keep {budget.keep:g} of {budget.of}, {UNITS[budget.unit].text}"],
    ]
    if made is not None:
        facts += [["fxcompress", made.version], ["torch", made.torch], ["made on", made.date]]
    facts += [[name, f"{value}"] for name, value in plan.calibration.items()]
    if plan.damping:
        facts.append(["damping", " and ".join(f"{one:g}" for one in plan.damping)])
    facts.append(["recorded batch", summary.batch_text(plan)])
    if plan.speed is not None:
        facts.append(["timed on", plan.speed.machine])
    unit = "" if budget.unit == PARAMETERS.word else f', unit="{budget.unit}"'
    hugging = plan.model_class.startswith("transformers.")
    return {
        "facts": facts,
        "compile": f'fxcompress.compile(model, "{plan.rules}", calibration, keep={budget.keep:g}'
        f"{unit})",
        "load": f'fxcompress.load("DIRECTORY"{"" if hugging else ", model"})',
        "stages": [[name, seconds] for name, seconds in plan.seconds.items()],
        "graph": [line.strip() for line in summary.graph_lines(plan)],
        "earlier": [f"rules {one.rules}, keep {one.budget.keep:g}" for one in plan.earlier],
    }


def plot_json(plot: Plot | None) -> Json | None:
    """A drawing with everything in its place, in pixels; None if there is none."""
    if plot is None:
        return None
    x, y = plot.x, plot.y

    def axis(one: Any, ticks: Sequence[tuple[float, str]]) -> Json:
        return {"length": one.length, "title": one.title, "ticks": [list(tick) for tick in ticks]}

    return {
        "title": plot.title,
        "note": plot.note,
        "x": axis(x, x.ticks),
        "y": axis(y, y.ticks),
        "curve": [[x.place(a), plot.down(b)] for a, b in plot.curve],
        "marks": [
            {
                "at": [x.place(mark.x), plot.down(mark.y)],
                "spread": [plot.down(mark.y - mark.spread), plot.down(mark.y + mark.spread)]
                if mark.spread
                else None,
                "text": mark.text,
            }
            for mark in plot.marks
        ],
        "lines": [
            {
                "kind": line.kind,
                "text": line.text,
                "from": [x.place(line.x[0]), plot.down(line.y[0])],
                "to": [x.place(line.x[1]), plot.down(line.y[1])],
            }
            for line in plot.lines
        ],
    }


def by_keep(plans: Mapping[float, Plan]) -> Json:
    """Forms and ranks of every site at several budgets."""
    first = next(iter(plans.values()))
    sited = {keep: {s.name: s for s in plan.sites} for keep, plan in plans.items()}
    return {
        "names": [site.name for site in first.sites],
        "keeps": [f"{keep:g}" for keep in plans],
        "ranks": [[_brief(sited[keep].get(site.name)) for keep in plans] for site in first.sites],
    }


def _brief(site: SitePlan | None) -> str:
    if site is None:
        return "–"
    return site.form_text if site.form is None else f"{site.form_text} {rank_text(site)}"
