"""The lines that the diff and the table share: budget, totals, predicted loss, graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from fxcompress.plans.plan import NOT_TIMED, BudgetOutcome, HeldBack, Limit, Plan, Speed, total_size
from fxcompress.plans.units import UNITS, Unit
from fxcompress.report.quantities import (
    LOSS_IN_NATS,
    count,
    duration,
    loss,
    loss_label,
    percent,
    span,
    with_error,
)


@dataclass(frozen=True)
class Total:
    """Before and after of one unit.

    Attributes:
        unit: its word, ``"parameters"``.
        of: ``"model"`` or ``"matched"`` (operators that a rule matched, dense ones included).
        before, after: of the whole recorded batch, if the unit counts for its rows.
    """

    unit: str
    of: Literal["model", "matched"]
    before: int
    after: int

    @property
    def kept(self) -> float | None:
        return self.after / self.before if self.before else None


def totals(plan: Plan) -> tuple[Total, ...]:
    """Totals of the model and, if there are any, of the matched operators, in every unit."""
    before = total_size(site.before for site in plan.sites)
    after = total_size(site.after for site in plan.sites)
    found = []
    for unit in plan.model_before.units:
        word = unit.word
        found.append(Total(word, "model", plan.model_before[word], plan.model_after[word]))
        if plan.sites:
            found.append(Total(word, "matched", before[word], after[word]))
    return tuple(found)


def shown(plan: Plan, unit: Unit, amount: float) -> float:
    """An amount as it is shown: of one sample, if it is of all those of the recorded batch."""
    return amount / plan.batch.samples if unit.per_row and plan.batch.samples else amount


def per(plan: Plan, unit: Unit) -> str:
    """What amounts that are shown are for: `` per sample`` of what counts for the batch's rows."""
    if not unit.per_row:
        return ""
    return " per batch" if plan.batch.samples is None else " per sample"


def batch_text(plan: Plan) -> str:
    """``2 samples of 512``, ``tensors of 2×3×8 and 5`` if they have no first extent in common."""
    batch = plan.batch
    if batch.samples is None:
        return f"tensors of {_shapes(batch.shapes)}" if batch.shapes else "its shapes are not known"
    of = _shapes([shape[1:] for shape in batch.shapes])
    number = "1 sample" if batch.samples == 1 else f"{count(batch.samples)} samples"
    return f"{number} of {of}" if of else number


def _shapes(shapes: Sequence[tuple[int, ...]]) -> str:
    """``3×32×32 and 10``; not more than three."""
    texts = [*dict.fromkeys("×".join(map(str, shape)) for shape in shapes if shape)]
    return " and ".join(texts[:3]) + ", ..." * (len(texts) > 3)


def totals_lines(plan: Plan) -> list[str]:
    """::

                              before           after    kept
    parameters           134,515,008     113,281,344   84.2%  of the model
                         106,168,320      84,934,656   80.0%  of the matched operators
    MACs per sample   68,853,694,464  57,982,058,496   84.2%  of the model
    """
    labels = {unit.word: f"{unit.text}{per(plan, unit)}" for unit in plan.model_before.units}
    width = max(map(len, labels.values()))
    lines = [f"{'':{width}}  {'before':>19}  {'after':>19}  {'kept':>6}"]
    for total in totals(plan):
        first = total.of == "model"
        label = f"{labels[total.unit] if first else '':{width}}"
        of_what = "of the model" if first else "of the matched operators"
        kept = percent(total.after, total.before)
        unit = UNITS[total.unit]
        before, after = (count(shown(plan, unit, n)) for n in (total.before, total.after))
        lines.append(f"{label}  {before:>19}  {after:>19}  {kept:>6}  {of_what}")
    return lines


def batch_lines(plan: Plan) -> list[str]:
    """``the recorded batch: 2 samples of 512``, beside amounts that are for its rows."""
    shown_at_all = any(unit.per_row for unit in plan.model_before.units)
    return [f"the recorded batch: {batch_text(plan)}"] if shown_at_all else []


def budget_lines(plan: Plan) -> list[str]:
    """::

    budget: keep 0.8 of the matched operators' parameters, ranks global
            84,934,120 of 84,934,656 parameters used by the matched operators (dense 106,168,320)
    """
    budget = plan.budget
    lines = _budget(plan, budget, f", ranks {budget.allocation}", "budget: ")
    for limit in plan.limits:
        lines += _budget(plan, limit, "", "   and: ")
    return lines


def _budget(plan: Plan, budget: BudgetOutcome | Limit, how: str, label: str) -> list[str]:
    whole = "the model's" if budget.of == "model" else "the matched operators'"
    users = "the matched operators"
    if isinstance(budget, Limit) and budget.rule:
        whole, users = f"the operators' of rule {budget.rule}", f"rule {budget.rule}"
    unit = UNITS[budget.unit]
    used, dense = (unit.amount(shown(plan, unit, n)) for n in (budget.cost, budget.dense))
    allowed = f"{unit.named(shown(plan, unit, budget.limit))}{per(plan, unit)}"
    return [
        f"{label}keep {budget.keep:g} of {whole} {unit.text}{how}",
        f"        {used} of {allowed} used by {users} (dense {dense})",
    ]


def held_back_line(plan: Plan) -> str:
    """``KL to the dense model 0.1729 ± 2.1% nats per prediction, on 4 batches held back (...)``.

    The first number that is shown; it says so where nothing was measured.
    """
    found = plan.held_back
    if found is None:
        return f"{held_back_name(plan)}: not measured ({not_held_back(plan)})"
    value = with_error(found.measured, found.error)
    return f"{held_back_name(plan)} {value} {LOSS_IN_NATS}, on {held_back_data(found)}"


def speed_line(plan: Plan) -> str:
    """``forward pass 1.42 s → 1.34 s, 1.06 times as fast (1.04..1.08; cpu, 2 threads, float32)``.

    It is over the recorded batch.  In brackets the quartiles over pairs of passes come first.
    """
    speed = plan.speed
    if speed is None:
        return f"forward pass: not measured ({not_timed(plan)})"
    times = f"{duration(speed.before)} → {duration(speed.after)}"
    return f"forward pass {times}, {speed.ratio:.2f} times as fast ({speed_details(speed)})"


def speed_details(speed: Speed) -> str:
    """``1.04..1.08; cpu, 2 threads, float32``: how sure a time is, and what it holds for."""
    threads = "1 thread" if speed.threads == 1 else f"{speed.threads} threads"
    place = f"cpu, {threads}" if speed.device == "cpu" else speed.device
    return f"{span(speed.spread, '{:.2f}'.format)}; {place}, {speed.dtype}"


def speed_json(plan: Plan) -> dict[str, Any] | None:
    """The times with their ratio, as JSON has them; None if nothing was measured."""
    speed = plan.speed
    return None if speed is None else {**speed.model_dump(mode="json"), "ratio": speed.ratio}


def not_timed(plan: Plan) -> str:
    """Why the forward pass was not timed."""
    if not plan.after:
        return "nothing is rewritten yet"
    if not plan.rewritten:
        return "nothing is rewritten"
    if any(warning.startswith(NOT_TIMED) for warning in plan.warnings):
        return "a warning says why"
    return "no time was taken when it was compressed"


def not_held_back(plan: Plan) -> str:
    """Why nothing was measured on batches held back."""
    return "no calibration batch was held back" if plan.after else "nothing is rewritten yet"


def held_back_name(plan: Plan) -> str:
    """What is measured on the batches held back."""
    own = plan.held_back is not None and plan.held_back.output == "loss"
    return "rise of the loss" if own else "KL to the dense model"


def held_back_data(found: HeldBack) -> str:
    """``4 batches held back (4,096 predictions)``."""
    batches = "1 batch" if found.batches == 1 else f"{count(found.batches)} batches"
    return f"{batches} held back ({count(found.predictions)} predictions)"


def predicted_line(plan: Plan) -> str:
    """``predicted KL 0.1231 nats per prediction (fitted 0.1120, gap 0.0001), λ = ...``."""
    budget = plan.budget
    line = f"predicted {loss_label(plan.loss_unit)} {loss(budget.predicted)} {plan.loss_unit}"
    if budget.bound is not None and budget.gap is not None:
        line += f" (fitted {loss(budget.fitted)}, gap {loss(budget.gap)})"
    if budget.multiplier is not None:
        line += f", λ = {_multiplier(plan, budget.unit, budget.multiplier)}"
    for limit in plan.limits:
        if limit.multiplier is not None:
            line += f" and {_multiplier(plan, limit.unit, limit.multiplier)}"
            line += f" of rule {limit.rule}" if limit.rule else ""
    return line


def _multiplier(plan: Plan, word: str, value: float) -> str:
    """``3.25e-09 per parameter``; of an amount per sample, as amounts are shown."""
    unit = UNITS[word]
    return f"{value / shown(plan, unit, 1):.3g} per {unit.one}{per(plan, unit)}"


def fidelity_lines(plan: Plan) -> list[str]:
    """Nothing before :func:`fxcompress.measure` was called::

    measured KL 0.1480 ± 2.1% nats per prediction (8 batches, 4,096 predictions)
             one site at a time: 0.1312 in sum, median measured / predicted 1.24
             rank correlation of predicted and measured 0.93 over 210 sites
    """
    fidelity = plan.fidelity
    if fidelity is None:
        return []
    number = count(len(fidelity.sites))
    batches = "1 batch" if fidelity.batches == 1 else f"{count(fidelity.batches)} batches"
    data = f"{batches}, {count(fidelity.predictions)} predictions"
    notes = [f"one site at a time: {loss(fidelity.singly)} in sum"]
    if fidelity.ratio is not None:
        notes[0] += f", median measured / predicted {fidelity.ratio:.3g}"
    if fidelity.rank_correlation is not None:
        correlation = f"{fidelity.rank_correlation:.2f} over {number} sites"
        notes.append(f"rank correlation of predicted and measured {correlation}")
    notes += [f"warning: {warning}" for warning in fidelity.warnings]
    return [
        f"measured KL {with_error(fidelity.measured, fidelity.error)} {LOSS_IN_NATS} ({data})",
        *(f"         {note}" for note in notes),
    ]


def model_name(plan: Plan) -> str:
    """``LlamaForCausalLM``."""
    return plan.model_class.rpartition(".")[2]


def rewritten_text(plan: Plan) -> str:
    """``210 of 211 linear operators rewritten``, ``to be rewritten`` while it is only a plan."""
    verb = "rewritten" if plan.after or not plan.rewritten else "to be rewritten"
    rewritten = Counter(site.op for site in plan.rewritten)
    present = Counter(site.op for site in plan.sites)
    matched = list(present)
    present.update(one.op for one in plan.unmatched)
    if not matched:
        return f"0 of {count(present.total())} operators with a weight {verb}"
    parts = [f"{count(rewritten[op])} of {count(present[op])} {op}" for op in matched]
    return f"{', '.join(parts)} operators {verb}"


def operator_changes(plan: Plan) -> dict[str, tuple[int, int]]:
    """Number of nodes before and after, for each operator whose number changes."""
    before = Counter(node.op for node in plan.before)
    after = Counter(node.op for node in plan.after)
    return {op: (before[op], after[op]) for op in before | after if before[op] != after[op]}


def graph_lines(plan: Plan) -> list[str]:
    """``graph: 1,123 nodes → 1,543 nodes``, then which operators became more or fewer."""
    if not plan.before:
        return []
    line = f"graph: {count(len(plan.before))} nodes"
    if not plan.after:
        return [f"{line} (not rewritten yet)"]
    lines = [f"{line} → {count(len(plan.after))} nodes"]
    changes = operator_changes(plan)
    if changes:
        texts = (f"{op} {count(a)} → {count(b)}" for op, (a, b) in changes.items())
        lines.append("       " + ", ".join(texts))
    return lines
