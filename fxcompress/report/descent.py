"""The rounds of ISVT: how the objective fell, in words and as a drawing."""

from __future__ import annotations

from fxcompress.plans.plan import Plan, Round
from fxcompress.report.plot import Axis, Line, Mark, Plot, even
from fxcompress.report.quantities import loss

WIDTH, HEIGHT = 560, 240
"""Size of the drawing, in pixels."""

MOST_TICKS = 12
"""Rounds that have their number below the drawing at most."""

NAMES = {"kl": "KL to the dense model", "task": "loss"}


def rounds_lines(plan: Plan) -> list[str]:
    """Nothing without rounds::

    rounds: KL to the dense model 0.9500 → 0.4210 nats per prediction, on held-back batches
        1   keep 0.95   0.0123 → 0.0110
        2   keep 0.8    0.2010 → 0.2200  not accepted (rate 0.0005)

    A correction says how much of the way to it was gone.
    """
    if not plan.rounds:
        return []
    first, last = plan.rounds[0], _end(plan)
    kinds = {one.kind for one in plan.rounds}
    what = NAMES[plan.objective or "kl"]
    lines = [f"rounds: {what} {loss(first.before)} → {loss(last)} nats per prediction, held back"]
    if kinds == {"whitened"}:
        lines = [f"rounds: {what} {loss(first.before)} → {loss(last)} nats per prediction"]
    for one in _told(plan):
        after = "not finite" if one.after is None else loss(one.after)
        how = f" {one.kind}" if len(kinds) > 1 else ""
        if one.kind == "correction":
            how = f" {one.rate:.2g} of the correction"
        line = f"     {one.round:3}   keep {one.keep:<7.4g}{how}  {loss(one.before)} → {after}"
        lines.append(line if one.accepted else f"{line}  not accepted{_rate(one)}")
    return lines


def _rate(one: Round) -> str:
    return "" if one.kind == "correction" else f" (rate {one.rate:.2g})"


MOST_LINES = 24


def _told(plan: Plan) -> tuple[Round, ...]:
    """All attempts; the last accepted one of every round if these are too many to read."""
    if len(plan.rounds) <= MOST_LINES:
        return plan.rounds
    last = {one.round: one for one in plan.rounds if one.accepted}
    return tuple(last.values())


def _end(plan: Plan) -> float:
    """The objective at the end."""
    one = plan.rounds[-1]
    return one.after if one.accepted and one.after is not None else one.before


def descent(plan: Plan) -> Plot | None:
    """The objective before and after every accepted attempt; None if there was none."""
    steps = [(one, one.after) for one in plan.rounds if one.accepted and one.after is not None]
    if not steps:
        return None
    curve: list[tuple[float, float]] = []
    marks, jumps = [], []
    rounds: dict[int, float] = {}
    for at, (one, after) in enumerate(steps):
        rounds.setdefault(one.round, 2 * at)
        curve += [(2 * at, one.before), (2 * at + 1, after)]
        text = f"round {one.round}, keep {one.keep:.4g}: {loss(one.before)} → {loss(after)}"
        marks.append(Mark(2 * at + 1, after, text))
        if at and one.keep < steps[at - 1][0].keep:
            jumps.append(Line("equal", (2 * at, 2 * at), (steps[at - 1][1], one.before)))
    number = {place: str(round) for round, place in rounds.items()}
    stride = -(-len(number) // MOST_TICKS)
    x = Axis(
        0, 2 * len(steps) - 1, WIDTH, (*number,)[::stride], title="round", text=number.__getitem__
    )
    what = NAMES[plan.objective or "kl"]
    y = even((0, *(value for _, value in curve)), HEIGHT, "nats per prediction")
    title = f"{what} over the accepted steps of all rounds"
    note = "dashed where the budget fell" if jumps else ""
    return Plot(title, x, y, tuple(curve), tuple(marks), tuple(jumps), note=note)
