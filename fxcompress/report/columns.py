"""The columns of the tables, one object each, for the terminal and for the page alike.

A new column is one more object here, with its place in :data:`TERMINAL` or :data:`PAGE`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from fxcompress.plans.plan import MeasuredSite, Plan, SitePlan, Size, total_size
from fxcompress.plans.units import COUNTED, CountedUnit
from fxcompress.report.fold import below, child_name, common, parent
from fxcompress.report.quantities import count, loss, loss_label, percent, short, span, sparkline

BARS = 12
"""Bars of a sparkline in the terminal at most, so that a line keeps to 100 columns."""


@dataclass(frozen=True)
class Entry:
    """What one line of a table is about.

    Attributes:
        sites: in the terminal those that are alike, on the page all below a module; never empty.
        measured: what was measured, by the name of a site; a bundle's stands with each member.
    """

    sites: tuple[SitePlan, ...]
    measured: Mapping[str, MeasuredSite]

    @cached_property
    def before(self) -> Size:
        """Size before of all sites together."""
        return total_size(site.before for site in self.sites)

    @cached_property
    def after(self) -> Size:
        """Size after of all sites together."""
        return total_size(site.after for site in self.sites)

    @property
    def found(self) -> list[MeasuredSite]:
        """What was measured of these sites; a bundle counts for its first site.

        A hidden value counts for what reads it.
        """
        pairs = ((self.measured.get(site.name), site) for site in self.sites)
        return [
            one
            for one, site in pairs
            if one is not None and (site.reader or one.sites[0]) == site.name
        ]


@dataclass(frozen=True)
class Column:
    """A column of the table in the terminal, of that on the page, or of both.

    Attributes:
        head: at its top; ``{loss}`` stands for the name of the loss.
        alike: cell in the terminal, of sites that are alike.
        below: cell on the page, of all sites below a module.
        order: what the page sorts by, None if it does not.
        brief: head in the terminal, if that is another one.
        width: in the terminal, in characters.
        group: head above it and its neighbours of the same group.
        left: whether the page aligns it to the left.
        title: what the page shows when a cell is pointed at.
        share: of a bar beside the cell on the page.
        shown: whether a plan has it.
    """

    head: str
    alike: Callable[[Entry], str] = lambda entry: ""
    below: Callable[[Entry], str] = lambda entry: ""
    order: Callable[[Entry], float] | None = None
    brief: str = ""
    width: int = 0
    group: str = ""
    left: bool = False
    title: Callable[[Entry], str] = lambda entry: ""
    share: Callable[[Entry], float] | None = None
    shown: Callable[[Plan], bool] = lambda plan: True


def _kept(entry: Entry) -> float:
    before = entry.before.parameters
    return entry.after.parameters / before if before else 1.0


def _kept_alike(entry: Entry) -> str:
    sizes = [(site.before.parameters, site.after.parameters) for site in entry.sites]
    kept = [100 * after / before for before, after in sizes if before]
    return span(kept, "{:.1f}%".format) if kept else "-"


def _size(unit: CountedUnit, when: str) -> Column:
    """Column of an amount before or after."""

    def total(entry: Entry) -> int:
        return (entry.before if when == "before" else entry.after)[unit.word]

    return Column(
        head=when,
        group=unit.text,
        below=lambda entry: (count if unit.exact else short)(total(entry)),
        title=lambda entry: "" if unit.exact else count(total(entry)),
        order=total,
        shown=lambda plan: unit in plan.model_before.units,
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


def _rank_below(entry: Entry) -> str:
    if len(entry.sites) > 1:
        return f"mean {100 * _rank_share(entry):.0f}%"
    (site,) = entry.sites
    text = " / ".join("×".join(map(str, ranks)) for ranks in (site.ranks, site.full_ranks))
    if site.then is None:
        return text
    ranks, full = ("×".join(map(str, each)) for each in (site.then.ranks, site.then.full_ranks))
    return f"{text}, then {ranks} / {full}"


def _rank_share(entry: Entry) -> float:
    return sum(site.rank_share for site in entry.sites) / len(entry.sites)


def _form_below(entry: Entry) -> str:
    rewritten = [site for site in entry.sites if site.form is not None]
    if len(entry.sites) > 1:
        return f"{len(rewritten)} of {len(entry.sites)}"
    return entry.sites[0].form_text


def _predicted(entry: Entry) -> float:
    return math.fsum(site.predicted for site in entry.sites)


def _elsewhere(entry: Entry) -> str:
    """``with down_proj`` where the loss of a hidden value stands beside what reads it."""
    names = {
        "" if site.then or site.reader in ("", site.name) else _beside(site.reader, site.name)
        for site in entry.sites
    }
    first = names.pop()
    return f"with {first}" if first and not names else ""


def _beside(path: str, other: str) -> str:
    """A path as it is within the innermost module around two operators."""
    return below(path, common(parent(path), parent(other)))


def _measured(entry: Entry) -> float:
    return math.fsum(one.measured for one in entry.found)


def measured_text(entry: Entry) -> str:
    """``0.0005..0.0044``; that of a bundle stands beside its first site, ``with q_proj`` else.

    That of a hidden value stands beside what reads it.
    """
    if elsewhere := _elsewhere(entry):
        return elsewhere
    first = entry.sites[0].reader or entry.measured[entry.sites[0].name].sites[0]
    if first != entry.sites[0].name:
        return f"with {child_name(first)}"
    return span((entry.measured[site.name].measured for site in entry.sites), loss)


OPERATOR = Column("operator", alike=lambda entry: entry.sites[0].operator, width=17)
FORM = Column(
    "form", alike=lambda entry: entry.sites[0].form_text, below=_form_below, width=9, left=True
)
KEPT = Column(
    "parameters kept",
    alike=_kept_alike,
    below=lambda entry: percent(entry.after.parameters, entry.before.parameters),
    order=_kept,
    share=_kept,
    brief="kept",
    width=13,
)
PREDICTED = Column(
    "predicted {loss}",
    alike=lambda entry: _elsewhere(entry) or span((site.predicted for site in entry.sites), loss),
    below=lambda entry: _elsewhere(entry) or loss(_predicted(entry)),
    order=_predicted,
    brief="{loss}",
    width=16,
)
MEASURED = Column(
    "measured KL",
    alike=measured_text,
    below=lambda entry: loss(_measured(entry)) if entry.found else "–",
    order=_measured,
    width=16,
    shown=lambda plan: plan.fidelity is not None,
)
RANK = Column(
    "rank / full",
    alike=lambda entry: ranks_text(entry.sites, BARS),
    below=_rank_below,
    order=_rank_share,
    brief="rank",
)
SIZES = tuple(_size(unit, when) for unit in COUNTED for when in ("before", "after"))

TERMINAL = (OPERATOR, FORM, KEPT, PREDICTED, MEASURED, RANK)
"""In their order, after the name of the site."""

PAGE = (FORM, RANK, KEPT, *SIZES, PREDICTED, MEASURED)
"""In their order, after the module."""


def measured_sites(plan: Plan) -> Mapping[str, MeasuredSite]:
    """What was measured by the name of a site, if anything was."""
    return {} if plan.fidelity is None else plan.fidelity.by_site


def shown(columns: tuple[Column, ...], plan: Plan) -> tuple[Column, ...]:
    """The columns that a plan has."""
    return tuple(column for column in columns if column.shown(plan))


def head(column: Column, plan: Plan, *, brief: bool = False) -> str:
    """Head of a column, on the page or in the terminal."""
    text = column.brief if brief and column.brief else column.head
    return text.format(loss=loss_label(plan.loss_unit))
