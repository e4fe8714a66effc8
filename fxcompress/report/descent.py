"""The rounds of ISVT: how the objective fell, in words and as a drawing."""

from __future__ import annotations

from dataclasses import dataclass

from fxcompress.plans.plan import Plan, Round
from fxcompress.report.quantities import loss

PLOT = WIDTH, HEIGHT = 560, 240
"""Width and height of the drawing, in pixels."""

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


@dataclass(frozen=True)
class Descent:
    """A drawing of the objective: one column for every accepted attempt.

    Attributes:
        name: of the objective.
        ticks: place from the top, and text, of values on the left axis.
        line: points of the curve, ``"x,y x,y"``.
        marks: place of each end of a round, with a text.
        jumps: where a lower budget raised it: x, y before and after.
    """

    name: str
    ticks: tuple[tuple[float, str], ...]
    line: str
    marks: tuple[tuple[float, float, str], ...]
    jumps: tuple[tuple[float, float, float], ...]


def descent(plan: Plan) -> Descent | None:
    """The drawing; None without an accepted step."""
    steps = [one for one in plan.rounds if one.accepted and one.after is not None]
    if not steps:
        return None
    values = [value for one in steps for value in (one.before, one.after or 0.0)]
    top = max(values) * 1.05 or 1.0

    def y(value: float) -> float:
        return round(HEIGHT * (1 - value / top), 1)

    width = WIDTH / (2 * len(steps) - 1)
    points, marks, jumps = [], [], []
    for at, one in enumerate(steps):
        x, end = round(2 * at * width, 1), round((2 * at + 1) * width, 1)
        assert one.after is not None
        points += [f"{x},{y(one.before)}", f"{end},{y(one.after)}"]
        text = f"round {one.round}, keep {one.keep:.4g}: {loss(one.before)} → {loss(one.after)}"
        marks.append((end, y(one.after), text))
        if at and one.keep < steps[at - 1].keep:
            jumps.append((x, y(steps[at - 1].after or 0.0), y(one.before)))
    ticks = tuple((y(top * share / 4), loss(top * share / 4)) for share in range(5))
    return Descent(
        NAMES[plan.objective or "kl"], ticks, " ".join(points), tuple(marks), tuple(jumps)
    )
