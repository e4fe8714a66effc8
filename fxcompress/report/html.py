"""The diff as one HTML page that needs no network, no server and no other file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import reduce
from importlib.resources import files
from operator import add

from jinja2 import Environment, StrictUndefined

from fxcompress.plans.plan import ZERO, MeasuredSite, Plan, SitePlan, Size
from fxcompress.report import summary
from fxcompress.report.descent import PLOT, descent, rounds_lines
from fxcompress.report.quantities import count, loss, loss_label, percent, short, with_error
from fxcompress.report.scatter import SIDE, fidelity_scatter
from fxcompress.report.unchanged import Unchanged, site_text

WIDTH, HEIGHT = 560, 190
"""Plot area of a spectrum, in pixels."""

DECADES = 8
"""Singular values that are smaller than the largest by more decades are drawn at the floor."""


@dataclass(frozen=True)
class Plot:
    """A spectrum in the coordinates of its drawing.

    Attributes:
        points: ``"0.0,3.2 8.9,7.1 ..."``.
        cut: x of the cut at the rank, None if the operator stays dense.
        decades: y and exponent of each horizontal grid line.
    """

    points: str
    cut: float | None
    decades: tuple[tuple[float, int], ...]


@dataclass
class Branch:
    """A module of the tree: a site, or what holds sites.

    Attributes:
        label: path relative to the branch above (``"model.layers"`` if nothing branches off).
        path: full path.
        sites: every site at or below it.
        measured: what was measured of them.
    """

    label: str
    path: str
    site: SitePlan | None = None
    sites: list[SitePlan] = field(default_factory=list)
    measured: list[MeasuredSite] = field(default_factory=list)
    children: dict[str, Branch] = field(default_factory=dict)


@dataclass(frozen=True)
class Line:
    """A row of the tree table; ``sort`` holds a number for each of its columns."""

    key: int
    above: int | None
    depth: int
    label: str
    path: str
    site: SitePlan | None
    open: bool
    branches: bool
    form: str
    rank: str
    before: Size
    after: Size
    predicted: float
    measured: float | None
    plot: Plot | None
    sort: tuple[float, ...]


def render(plan: Plan, unchanged: tuple[Unchanged, ...], text: str) -> str:
    """The page, with everything escaped that came from a model or a rule file."""
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(count=count, short=short, loss=loss, site_text=site_text)
    environment.globals.update(
        percent=percent, with_error=with_error, held_back_data=summary.held_back_data
    )
    source = files("fxcompress.report").joinpath("diff.html.j2").read_text("utf-8")
    return environment.from_string(source).render(
        plan=plan,
        title=summary.model_name(plan),
        rewritten=summary.rewritten_text(plan),
        label=loss_label(plan.loss_unit),
        budget=[*summary.budget_lines(plan), summary.predicted_line(plan)],
        held_back=plan.held_back,
        held_back_name=summary.held_back_name(plan),
        not_held_back=summary.not_held_back(plan),
        fidelity=plan.fidelity,
        fidelity_lines=summary.fidelity_lines(plan),
        scatter=fidelity_scatter(plan),
        side=SIDE,
        rounds_lines=rounds_lines(plan),
        descent=descent(plan),
        plot=PLOT,
        graph=summary.graph_lines(plan),
        totals=summary.totals(plan),
        unit_text=summary.UNIT_TEXT,
        lines=tree_lines(plan.sites, None if plan.fidelity is None else plan.fidelity.by_site),
        unchanged=unchanged,
        text=text,
        width=WIDTH,
        height=HEIGHT,
    )


def tree_lines(
    sites: tuple[SitePlan, ...], measured: Mapping[str, MeasuredSite] | None = None
) -> list[Line]:
    """The module tree of the sites, depth first, in graph order.

    It is open down to the first module that branches, so thirty blocks are thirty rows.

    Args:
        sites: of a plan.
        measured: by name of the site; None if nothing was.  A bundle's counts for its first site.
    """
    root = Branch("", "")
    for site in sites:
        one = None if measured is None else measured.get(site.name)
        own = [one] if one is not None and one.sites[0] == site.name else []
        branch = root
        branch.sites.append(site)
        for component in site.name.split("."):
            path = f"{branch.path}.{component}" if branch.path else component
            branch = branch.children.setdefault(component, Branch(component, path))
            branch.sites.append(site)
            branch.measured += own
        if branch.site is not None:  # a second weight of the same module
            branch = branch.children.setdefault(site.weight, Branch(site.weight, site.weight))
            branch.sites.append(site)
        branch.site = site
    lines: list[Line] = []
    _descend(root, lines, None, 0, True, measured is not None)
    return lines


def _descend(
    above: Branch, lines: list[Line], key: int | None, depth: int, opened: bool, measured: bool
) -> None:
    children = [_shortened(child) for child in above.children.values()]
    for child in children:
        alone = opened and len(children) == 1
        line = _line(child, len(lines), key, depth, alone, measured)
        lines.append(line)
        _descend(child, lines, line.key, depth + 1, alone, measured)


def _shortened(branch: Branch) -> Branch:
    """Skip modules that hold nothing but one other module."""
    label = branch.label
    while branch.site is None and len(branch.children) == 1:
        (branch,) = branch.children.values()
        label = f"{label}.{branch.label}"
    branch.label = label
    return branch


def _line(
    branch: Branch, key: int, above: int | None, depth: int, opened: bool, with_measured: bool
) -> Line:
    sites, site = branch.sites, branch.site
    before = reduce(add, (one.before for one in sites), ZERO)
    after = reduce(add, (one.after for one in sites), ZERO)
    predicted = math.fsum(one.predicted for one in sites)
    measured = math.fsum(one.measured for one in branch.measured)
    ratios = [one.rank_share for one in sites]
    ratio = sum(ratios) / len(ratios)
    rewritten = sum(one.form is not None for one in sites)
    if site is not None and len(sites) == 1:
        form = site.form or "dense"
        rank = " / ".join("×".join(map(str, each)) for each in (site.ranks, site.full_ranks))
    else:
        form = f"{rewritten} of {len(sites)}"
        rank = f"mean {100 * ratio:.0f}%"
    kept = after.parameters / before.parameters if before.parameters else 1.0
    sizes = ((getattr(before, unit), getattr(after, unit)) for unit in summary.UNITS)
    return Line(
        key=key,
        above=above,
        depth=depth,
        label=branch.label or "(root)",
        path=branch.path or "(root)",
        site=site,
        open=opened,
        branches=bool(branch.children),
        form=form,
        rank=rank,
        before=before,
        after=after,
        predicted=predicted,
        measured=measured if branch.measured else None,
        plot=None if site is None else spectrum_plot(site),
        sort=(
            *(key, ratio, kept),
            *(value for pair in sizes for value in pair),
            predicted,
            *((measured,) if with_measured else ()),
        ),
    )


def spectrum_plot(site: SitePlan) -> Plot | None:
    """Singular values against their index, on a logarithmic scale; None if there are none."""
    values = site.spectrum
    top = max(values, default=0.0)
    if top <= 0:
        return None
    floor = top * 10.0**-DECADES
    logs = [math.log10(max(value, floor)) for value in values]
    low, high = math.floor(min(logs)), math.ceil(max(logs))
    high = max(high, low + 1)

    def y(log: float) -> float:
        return round(HEIGHT * (high - log) / (high - low), 1)

    # The plan holds a selection that is spaced evenly from the first to the last value.
    step = WIDTH / max(len(values) - 1, 1)
    points = " ".join(f"{i * step:.1f},{y(log)}" for i, log in enumerate(logs))
    cut = None
    if site.rank is not None:
        # Between the last index that is kept and the first that is not; indices count from 0.
        place = max(site.ranks[0] - 0.5, 0) / max(site.full_ranks[0] - 1, 1)
        cut = min(WIDTH * place, float(WIDTH))
    stride = math.ceil((high - low) / 6)
    return Plot(
        points=points,
        cut=None if cut is None else round(cut, 1),
        decades=tuple((y(exponent), exponent) for exponent in range(low, high + 1, stride)),
    )
