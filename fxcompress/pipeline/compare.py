"""``diff``: what a rewrite changed, from its record."""

from __future__ import annotations

from torch import nn

from fxcompress.errors import RewriteError
from fxcompress.graph.wrappers import unwrapped
from fxcompress.plans.plan import history, plan_of
from fxcompress.report import Diff, diff_plan
from fxcompress.rewrite import mismatches, resident


def diff(before: nn.Module, after: nn.Module | None = None) -> Diff:
    """The difference between a model and its compressed form.

    It comes from the record of the rewrite and the graph recorded afterwards (what really
    runs), not from comparing two graphs.

    >>> print(fxcompress.diff(model, small))  # doctest: +SKIP
    >>> print(fxcompress.diff(small))  # doctest: +SKIP

    Args:
        before: the model that was given to :func:`fxcompress.compile`; or, by itself, ``after``.
        after: what it returned, or what :func:`fxcompress.load` returned.

    Returns:
        A value that prints as text, with ``to_json()`` and ``to_html()``.

    Raises:
        RewriteError: ``after`` carries no plan, or its plan was made for another model.
    """
    if after is None:
        return diff_plan(plan_of(before))
    if history(before) and not history(after):
        raise RewriteError(
            "the first model is the compressed one, and the second is not: diff(model, small)"
        )
    plan = plan_of(after)
    before, after = resident(unwrapped(before)), unwrapped(after)
    problems = mismatches(before, plan) if before is not after else ""
    if problems:
        raise RewriteError(f"the plan was made for another model than this one: {problems}")
    return diff_plan(plan)
