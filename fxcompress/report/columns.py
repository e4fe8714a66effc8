"""The columns of the tables, one object each: those of the terminal, and those of the page.

A new column is one more object here, with its place in :data:`TERMINAL` or :data:`PAGE`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from fxcompress.plans.plan import MeasuredSite, Plan, SitePlan
from fxcompress.plans.units import COUNTED, CountedUnit
from fxcompress.report.fold import below, child_name, common, parent
from fxcompress.report.quantities import loss, loss_label, span, sparkline

BARS = 12
"""Bars of a sparkline in the terminal at most, so that a line keeps to 100 columns."""


@dataclass(frozen=True)
class Entry:
    """What one line of the table in the terminal is about.

    Attributes:
        sites: those that are alike; never empty.
        measured: what was measured, by the name of a site; a bundle's stands with each member.
    """

    sites: tuple[SitePlan, ...]
    measured: Mapping[str, MeasuredSite]


@dataclass(frozen=True)
class Column:
    """A column of the table in the terminal.

    Attributes:
        head: at its top; ``{loss}`` stands for the name of the loss.
        alike: cell of sites that are alike.
        width: in characters.
        shown: whether a plan has it.
    """

    head: str
    alike: Callable[[Entry], str]
    width: int = 0
    shown: Callable[[Plan], bool] = lambda plan: True


@dataclass(frozen=True)
class PageColumn:
    """A column of numbers on the page, which are summed up over modules.

    Attributes:
        head: at its top; ``{loss}`` stands for the name of the loss.
        value: of a site; None where it has none, or stands with another site.
        write: how the page writes it: exactly, to three digits, as a loss, or as a time.
        group: head above it and its neighbours of the same group; ``{per}`` stands for what
            amounts of the recorded batch are shown for.
        menu: whether it is behind the menu of columns at first.
        shown: whether a plan has it.
    """

    head: str
    value: Callable[[SitePlan, Plan], float | None]
    write: Literal["count", "short", "loss", "seconds"]
    group: str = ""
    menu: bool = False
    shown: Callable[[Plan], bool] = lambda plan: True


def _kept_alike(entry: Entry) -> str:
    sizes = [(site.before.parameters, site.after.parameters) for site in entry.sites]
    kept = [100 * after / before for before, after in sizes if before]
    return span(kept, "{:.1f}%".format) if kept else "-"


def _size(unit: CountedUnit, when: str) -> PageColumn:
    """Column of an amount before or after."""

    def amount(site: SitePlan, plan: Plan) -> float:
        whole = (site.before if when == "before" else site.after)[unit.word]
        return whole / (plan.batch.samples or 1) if unit.per_row else whole

    return PageColumn(
        head=when,
        value=amount,
        write="count" if unit.exact else "short",
        group=f"{unit.text}{{per}}" if unit.per_row else unit.text,
        menu=not unit.exact,
        shown=lambda plan: unit in plan.model_before.units,
    )


def _seconds(at: int) -> PageColumn:
    return PageColumn(
        head=("before", "after")[at],
        value=lambda site, plan: site.seconds[at] if site.seconds else None,
        write="seconds",
        group="time per batch",
        shown=lambda plan: any(site.seconds for site in plan.sites),
    )


def ranks_of(sites: Sequence[SitePlan]) -> list[list[int]]:
    """Ranks of rewritten sites, one list for each rank that their form has."""
    return [list(axis) for axis in zip(*(site.ranks for site in sites), strict=True)]


def ranks_of_then(sites: Sequence[SitePlan]) -> list[list[int]]:
    """Ranks of the forms beside a narrowing, one list for each; none if there are none."""
    after = [site.then.ranks for site in sites if site.then is not None]
    return [list(axis) for axis in zip(*after, strict=True)]


def ranks_text(sites: tuple[SitePlan, ...], bars: int, whole: str = "") -> str:
    """``96..208 ▄▅█▇``, ``8..12×16`` of two; no bars if there is nothing to compare.

    Of a narrowed hidden value with another form the width stands first: ``1024, then 96..208``.

    Args:
        sites: that are alike.
        bars: at most.
        whole: stands between both, `` of 576``.
    """
    axes = ranks_of(sites)
    if after := ranks_of_then(sites):
        then = "×".join(span(axis, "{:.0f}".format) for axis in after)
        return f"{span(axes[0], '{:.0f}'.format)}{whole}, then {then}"
    text = "×".join(span(axis, "{:.0f}".format) for axis in axes) + whole
    first = axes[0]
    return text if min(first) == max(first) else f"{text} {sparkline(first, bars)}"


def rank_text(site: SitePlan) -> str:
    """``96 of 576``, ``8×16 of 32×64``, ``1024 of 1536, then 96 of 576``; empty if dense."""
    if site.form is None:
        return ""
    text = " of ".join("×".join(map(str, ranks)) for ranks in (site.ranks, site.full_ranks))
    if site.then is None:
        return text
    then = " of ".join("×".join(map(str, r)) for r in (site.then.ranks, site.then.full_ranks))
    return f"{text}, then {then}"


def elsewhere(entry: Entry) -> str:
    """``with down_proj`` where the loss of a hidden value stands beside what reads it."""
    names = {
        "" if site.then or site.reader in ("", site.name) else beside(site.reader, site.name)
        for site in entry.sites
    }
    first = names.pop()
    return f"with {first}" if first and not names else ""


def beside(path: str, other: str) -> str:
    """A path as it is within the innermost module around two operators."""
    return below(path, common(parent(path), parent(other)))


def measured_alone(site: SitePlan, plan: Plan) -> float | None:
    """What was measured of a site; of a bundle with its first one, or with what reads it."""
    one = None if plan.fidelity is None else plan.fidelity.by_site.get(site.name)
    own = one is not None and (site.reader or one.sites[0]) == site.name
    return one.measured if own and one is not None else None


def measured_text(entry: Entry) -> str:
    """``0.0005..0.0044``; that of a bundle stands beside its first site, ``with q_proj`` else.

    That of a hidden value stands beside what reads it.
    """
    if told := elsewhere(entry):
        return told
    first = entry.sites[0].reader or entry.measured[entry.sites[0].name].sites[0]
    if first != entry.sites[0].name:
        return f"with {child_name(first)}"
    return span((entry.measured[site.name].measured for site in entry.sites), loss)


OPERATOR = Column("operator", lambda entry: entry.sites[0].operator, 17)
FORM = Column("form", lambda entry: entry.sites[0].form_text, 9)
KEPT = Column("kept", _kept_alike, 13)
PREDICTED = Column(
    "{loss}",
    lambda entry: elsewhere(entry) or span((site.predicted for site in entry.sites), loss),
    16,
)
MEASURED = Column("measured KL", measured_text, 16, lambda plan: plan.fidelity is not None)
RANK = Column("rank", lambda entry: ranks_text(entry.sites, BARS))

TERMINAL = (OPERATOR, FORM, KEPT, PREDICTED, MEASURED, RANK)
"""In their order, after the name of the site."""

SIZES = tuple(_size(unit, when) for unit in COUNTED for when in ("before", "after"))
LOST = PageColumn("predicted {loss}", lambda site, plan: site.predicted, "loss")
MEASURED_ALONE = PageColumn(
    "measured KL, alone", measured_alone, "loss", shown=lambda plan: plan.fidelity is not None
)

PAGE = (LOST, MEASURED_ALONE, *SIZES, _seconds(0), _seconds(1))
"""In their order, after module, form, rank, what is kept, and the share of the loss."""


def measured_sites(plan: Plan) -> Mapping[str, MeasuredSite]:
    """What was measured by the name of a site, if anything was."""
    return {} if plan.fidelity is None else plan.fidelity.by_site


def shown(columns: tuple[Column, ...], plan: Plan) -> tuple[Column, ...]:
    """The columns of the terminal that a plan has."""
    return tuple(column for column in columns if column.shown(plan))


def shown_on_page(plan: Plan) -> tuple[PageColumn, ...]:
    """The columns of the page that a plan has."""
    return tuple(column for column in PAGE if column.shown(plan))


def head(column: Column | PageColumn, plan: Plan) -> str:
    """Head of a column."""
    return column.head.format(loss=loss_label(plan.loss_unit))


def group(column: PageColumn, plan: Plan) -> str:
    """Head above a column and its neighbours, on the page."""
    return column.group.format(per=" per batch" if plan.batch.samples is None else " per sample")
