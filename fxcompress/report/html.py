"""The diff as one HTML page that needs no network, no server and no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby

from fxcompress.plans.plan import MeasuredSite, Plan, SitePlan
from fxcompress.report.columns import PAGE, Column, Entry, head, measured_sites, shown
from fxcompress.report.descent import descent, rounds_lines
from fxcompress.report.plot import DECADES, Line, Plot, decades, indices, template
from fxcompress.report.quantities import loss_label
from fxcompress.report.scatter import fidelity_scatter
from fxcompress.report.unchanged import Unchanged

WIDTH, HEIGHT = 560, 190
"""Plot area of a spectrum, in pixels."""


@dataclass
class Row:
    """A module of the tree: a site, or what holds sites.

    Attributes:
        label: path relative to the row above (``"model.layers"`` if nothing branches off).
        path: full path.
        measured: by name of a site, as :class:`Entry` has it.
        site: what it is itself, None if it only holds others.
        sites: every site at or below it.
        children: by the next component of the path.
        key, above: its number, and that of the row above, -1 of none.
        depth: rows above it.
        open: whether what is below is shown at first.
    """

    label: str
    path: str
    measured: Mapping[str, MeasuredSite]
    site: SitePlan | None = None
    sites: list[SitePlan] = field(default_factory=list)
    children: dict[str, Row] = field(default_factory=dict)
    key: int = -1
    above: int = -1
    depth: int = 0
    open: bool = True

    @cached_property
    def entry(self) -> Entry:
        """What the columns are about."""
        return Entry(tuple(self.sites), self.measured)

    def child(self, name: str, path: str) -> Row:
        """The row of this name, made if there is none."""
        return self.children.setdefault(name, Row(name, path, self.measured))


@dataclass(frozen=True)
class Head:
    """Head of a column; ``css`` are its classes, ``at`` is its place among those to sort by."""

    text: str
    column: Column
    css: str
    at: int | None


def render(plan: Plan, unchanged: tuple[Unchanged, ...], text: str) -> str:
    """The page, with everything escaped that came from a model or a rule file."""
    columns, measured = shown(PAGE, plan), measured_sites(plan)
    page: str = template("diff.html.j2").render(
        plan=plan,
        label=loss_label(plan.loss_unit),
        measured=measured,
        scatter=fidelity_scatter(plan),
        rounds_lines=rounds_lines(plan),
        descent=descent(plan),
        heads=_heads(columns, plan),
        groups=[(name, len([*each])) for name, each in groupby(each.group for each in columns)],
        rows=tree_rows(plan.sites, measured),
        spectrum=spectrum_plot,
        unchanged=unchanged,
        text=text,
    )
    return page


def _heads(columns: Sequence[Column], plan: Plan) -> list[Head]:
    """Heads of all columns but the first, which has the names of modules."""
    heads, sortable, group = [], 0, ""
    for column in columns:
        sortable += column.order is not None
        at = sortable if column.order is not None else None
        edge, left = "edge " * (column.group != group), "left" * column.left
        heads.append(Head(head(column, plan), column, edge + left, at))
        group = column.group
    return heads


def tree_rows(sites: Sequence[SitePlan], measured: Mapping[str, MeasuredSite]) -> list[Row]:
    """The module tree of the sites, depth first, in graph order.

    It is open down to the first module that branches, so thirty blocks are thirty rows.
    """
    root = Row("", "", measured)
    for site in sites:
        row = root
        for component in site.name.split("."):
            row = row.child(component, f"{row.path}.{component}" if row.path else component)
            row.sites.append(site)
        if row.site is not None:  # a second weight of the same module
            row = row.child(site.weight, site.weight)
            row.sites.append(site)
        row.site = site
    rows: list[Row] = []

    def descend(above: Row) -> None:
        for row in map(_shortened, above.children.values()):
            row.key, row.above, row.depth = len(rows), above.key, above.depth + 1
            row.open = above.open and len(above.children) == 1
            rows.append(row)
            descend(row)

    descend(root)
    return rows


def _shortened(row: Row) -> Row:
    """Skip modules that hold nothing but one other module."""
    label = row.label
    while row.site is None and len(row.children) == 1:
        (row,) = row.children.values()
        label = f"{label}.{row.label}"
    row.label = label
    return row


def spectrum_plot(site: SitePlan) -> Plot | None:
    """Singular values by their number, cut between the last that is kept and the next.

    Returns:
        None if there are none but zeros, and for what makes a hidden value, whose channels are
        chosen where it is read.
    """
    top, full = max(site.spectrum, default=0.0), site.full_ranks[0]
    if top <= 0 or site.reader not in ("", site.name):
        return None
    values = [max(value, top * 10.0**-DECADES) for value in site.spectrum]
    component = "channel" if site.reader else "component"
    x, y = indices(full, WIDTH, component), decades(values, HEIGHT)
    # The plan holds a selection that is spaced evenly from the first to the last value.
    step = (full - 1) / max(len(values) - 1, 1)
    curve = tuple((1 + step * at, value) for at, value in enumerate(values))
    title, cut = f"{'Channels' if site.reader else 'Spectrum'} of {site.name}", None
    lines: tuple[Line, ...] = ()
    if site.rank is not None:
        rank, whole = ("×".join(map(str, ranks)) for ranks in (site.ranks, site.full_ranks))
        kept = f"{rank} channels" if site.reader else f"rank {rank}"
        title += f", cut at {kept} of {whole}"
        cut = site.ranks[0] + 0.5
        lines = (Line("cut", (cut, cut), (y.high, y.low), kept),)
    return Plot(title, x, y, curve, lines=lines, shade=cut)
