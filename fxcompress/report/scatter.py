"""Measured against predicted losses, as a drawing on two logarithmic scales."""

from __future__ import annotations

from fxcompress.plans.plan import Plan
from fxcompress.report.plot import Line, Mark, Plot, decades
from fxcompress.report.quantities import LOSS_IN_NATS, loss, loss_label, with_error

SIDE = 380
"""Length of both axes, in pixels."""


def fidelity_scatter(plan: Plan) -> Plot | None:
    """What :func:`fxcompress.measure` found, with two standard errors either way.

    Where both losses have one unit the axes are the same, and equality is a diagonal.

    Returns:
        None if nothing was measured, or if nothing was lost anywhere.
    """
    sites = () if plan.fidelity is None else plan.fidelity.sites
    predicted, measured = [one.predicted for one in sites], [one.measured for one in sites]
    alike = plan.loss_unit == LOSS_IN_NATS
    if max(predicted, default=0) <= 0 or max(measured) <= 0:
        return None
    both = [*predicted, *measured]
    x = decades(
        both if alike else predicted,
        SIDE,
        f"predicted {loss_label(plan.loss_unit)}, {plan.loss_unit}",
    )
    y = decades(both if alike else measured, SIDE, f"measured KL, {LOSS_IN_NATS}")
    marks = tuple(
        Mark(
            one.predicted,
            one.measured,
            f"{one.name}: predicted {loss(one.predicted)}, "
            f"measured {with_error(one.measured, one.error)}",
            2 * (one.error or 0.0),
        )
        for one in sites
    )
    diagonal = (Line("equal", (x.low, x.high), (y.low, y.high)),) if alike else ()
    title = f"Measured against predicted loss of {len(marks)} sites"
    return Plot(title, x, y, marks=marks, lines=diagonal)
