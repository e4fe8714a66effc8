"""The diff as one HTML page that needs no network, no server and no other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby

from fxcompress.plans.plan import MeasuredSite, Plan, SitePlan
from fxcompress.report import summary
from fxcompress.report.columns import PAGE, Column, Entry, head, measured_sites, shown
from fxcompress.report.descent import descent, rounds_lines
from fxcompress.report.plot import DECADES, Line, Plot, decades, indices, template
from fxcompress.report.quantities import loss_label
from fxcompress.report.scatter import fidelity_scatter
from fxcompress.report.unchanged import Unchanged

WIDTH, HEIGHT = 560, 190
"""Plot area of a spectrum, in pixels."""


@dataclass
class Branch:
    """A module of the tree: a site, or what holds sites.

    Attributes:
        label: path relative to the branch above (``"model.layers"`` if nothing branches off).
        path: full path.
        site: what it is itself, None if it only holds others.
        sites: every site at or below it.
    """

    label: str
    path: str
    site: SitePlan | None = None
    sites: list[SitePlan] = field(default_factory=list)
    children: dict[str, Branch] = field(default_factory=dict)


@dataclass(frozen=True)
class Head:
    """The head of a column; ``edge`` where another group begins, ``at`` its place in ``sort``."""

    text: str
    column: Column
    edge: bool
    at: int | None


@dataclass(frozen=True)
class Row:
    """A row of the tree table.

    Attributes:
        key, above: its number, and that of the module that it is in.
        depth: modules above it.
        site: the operator that it is itself.
        open: whether what is below is shown at first.
        branches: whether anything is.
        entry: what the columns are about.
        sort: a number for the graph order, and for every column that can be sorted by.
    """

    key: int
    above: int | None
    depth: int
    label: str
    path: str
    site: SitePlan | None
    open: bool
    branches: bool
    entry: Entry
    sort: tuple[float, ...]


def render(plan: Plan, unchanged: tuple[Unchanged, ...], text: str) -> str:
    """The page, with everything escaped that came from a model or a rule file."""
    columns = shown(PAGE, plan)
    page: str = template("diff.html.j2").render(
        plan=plan,
        title=summary.model_name(plan),
        rewritten=summary.rewritten_text(plan),
        label=loss_label(plan.loss_unit),
        budget=[*summary.budget_lines(plan), summary.predicted_line(plan)],
        held_back=plan.held_back,
        held_back_name=summary.held_back_name(plan),
        held_back_data=summary.held_back_data,
        not_held_back=summary.not_held_back(plan),
        fidelity=plan.fidelity,
        measured=measured_sites(plan),
        fidelity_lines=summary.fidelity_lines(plan),
        scatter=fidelity_scatter(plan),
        rounds_lines=rounds_lines(plan),
        descent=descent(plan),
        graph=summary.graph_lines(plan),
        totals=summary.totals(plan),
        units=plan.model_before.units,
        heads=_heads(columns, plan),
        groups=[(name, len([*each])) for name, each in groupby(each.group for each in columns)],
        rows=tree_rows(plan.sites, measured_sites(plan), columns),
        spectrum=spectrum_plot,
        unchanged=unchanged,
        text=text,
    )
    return page


def _heads(columns: Sequence[Column], plan: Plan) -> list[Head]:
    """Of all columns but the first, which has the names of modules."""
    heads, sortable, group = [], 0, ""
    for column in columns:
        sortable += column.order is not None
        at = sortable if column.order is not None else None
        heads.append(Head(head(column, plan), column, column.group != group, at))
        group = column.group
    return heads


def tree_rows(
    sites: Sequence[SitePlan], measured: Mapping[str, MeasuredSite], columns: Sequence[Column]
) -> list[Row]:
    """The module tree of the sites, depth first, in graph order.

    It is open down to the first module that branches, so thirty blocks are thirty rows.

    Args:
        sites: of a plan.
        measured: by name of the site, as :class:`Entry` has it.
        columns: of the table.
    """
    root = Branch("", "")
    for site in sites:
        branch = root
        branch.sites.append(site)
        for component in site.name.split("."):
            path = f"{branch.path}.{component}" if branch.path else component
            branch = branch.children.setdefault(component, Branch(component, path))
            branch.sites.append(site)
        if branch.site is not None:  # a second weight of the same module
            branch = branch.children.setdefault(site.weight, Branch(site.weight, site.weight))
            branch.sites.append(site)
        branch.site = site
    rows: list[Row] = []
    orders = [column.order for column in columns if column.order is not None]

    def descend(above: Branch, key: int | None, depth: int, opened: bool) -> None:
        children = [_shortened(child) for child in above.children.values()]
        opened = opened and len(children) == 1
        for child in children:
            entry, at = Entry(tuple(child.sites), measured), len(rows)
            rows.append(
                Row(
                    key=at,
                    above=key,
                    depth=depth,
                    label=child.label or "(root)",
                    path=child.path or "(root)",
                    site=child.site,
                    open=opened,
                    branches=bool(child.children),
                    entry=entry,
                    sort=(at, *(order(entry) for order in orders)),
                )
            )
            descend(child, at, depth + 1, opened)

    descend(root, None, 0, True)
    return rows


def _shortened(branch: Branch) -> Branch:
    """Skip modules that hold nothing but one other module."""
    label = branch.label
    while branch.site is None and len(branch.children) == 1:
        (branch,) = branch.children.values()
        label = f"{label}.{branch.label}"
    branch.label = label
    return branch


def spectrum_plot(site: SitePlan) -> Plot | None:
    """Singular values by their number, cut between the last that is kept and the next.

    Returns:
        None if there are none but zeros.
    """
    top, full = max(site.spectrum, default=0.0), site.full_ranks[0]
    if top <= 0:
        return None
    values = [max(value, top * 10.0**-DECADES) for value in site.spectrum]
    x, y = indices(full, WIDTH, "component"), decades(values, HEIGHT)
    # The plan holds a selection that is spaced evenly from the first to the last value.
    step = (full - 1) / max(len(values) - 1, 1)
    curve = tuple((1 + step * at, value) for at, value in enumerate(values))
    title, cut = f"Spectrum of {site.name}", None
    lines: tuple[Line, ...] = ()
    if site.rank is not None:
        rank, whole = ("×".join(map(str, ranks)) for ranks in (site.ranks, site.full_ranks))
        title += f", cut at rank {rank} of {whole}"
        cut = site.ranks[0] + 0.5
        lines = (Line("cut", (cut, cut), (y.high, y.low), f"rank {rank}"),)
    return Plot(title, x, y, curve, lines=lines, shade=cut)
