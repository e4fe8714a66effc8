"""The graph diff: what was rewritten and into what, and what was not and why.

It is computed from the plan, the record of the rewrite, never by comparing graphs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from typing import Any

from fxcompress.forms import find_form
from fxcompress.notebook import Shown
from fxcompress.plans.plan import MeasuredSite, Plan, SitePlan, Size
from fxcompress.report import columns, summary
from fxcompress.report.columns import MEASURED, PREDICTED, Entry, beside, measured_sites
from fxcompress.report.descent import rounds_lines
from fxcompress.report.fold import BlockGroup, Row, fold_blocks
from fxcompress.report.frame import headline
from fxcompress.report.quantities import (
    WIDEST,
    count,
    counts,
    loss,
    loss_label,
    short,
    span,
    sparkline,
)
from fxcompress.report.unchanged import Unchanged, unchanged
from fxcompress.rules.matching.folding import fold

LEGEND = (
    "The numbers beside operators are their parameters, biases included; r is the rank.\n"
    "A bar is the rank of one block, in graph order, from 0 to the largest of its line."
)


CHANNELS = (
    "k is the number of channels that a hidden value keeps: what makes it and what reads it\n"
    "change together, what is between them stays, and what that loses is told once."
)


SHARED = "shared."
"""Paths of layers that several operators have in common begin with this."""


@dataclass(frozen=True, repr=False)
class Diff(Shown):
    """What a plan changes in a model's graph.

    ``print(diff)`` shows alike blocks folded::

        LlamaForCausalLM: 210 of 211 linear operators rewritten (rules decoder.yaml, metric kfac)
        KL to the dense model 0.1729 ± 2.1% nats per prediction, on 4 batches held back (...)
        forward pass 1.42 s → 1.34 s, 1.06 times as fast (1.04..1.08; cpu, 2 threads, float32)

        model.layers.{0..29}.mlp                            30 alike
        - up_proj             linear 576→1536         884,736
        + up_proj.combine     linear 576-r→r          r 96..208 of 576 ▄▅█▇
        + up_proj             add_ (the pivots, as they are)
        + up_proj.pivot       linear r→1536           194k..396k    KL 0.0004..0.0031
          rule mlp (decoder.yaml:22)

    Attributes:
        plan: the record it is computed from.
        groups: rewritten sites, by alike blocks, in graph order.
        unchanged: the other operators with a weight, folded likewise.
    """

    plan: Plan
    groups: tuple[BlockGroup, ...]
    unchanged: tuple[Unchanged, ...]

    def __str__(self) -> str:
        plan = self.plan
        head = f"{summary.model_name(plan)}: {summary.rewritten_text(plan)}"
        sections = [
            [
                f"{head} (rules {plan.rules}, metric {plan.metric})",
                summary.held_back_line(plan),
                summary.speed_line(plan),
            ]
        ]
        measured = measured_sites(plan)
        sections += [_group_lines(group, plan, measured) for group in self.groups]
        if plan.expanded:
            sections.append(
                [
                    "split into projections:",
                    *(f"  {pattern}" for pattern in fold(plan.expanded)),
                ]
            )
        if self.unchanged:
            sections.append(["unchanged:", *unchanged_lines(self.unchanged)])
        sections.append([*summary.totals_lines(plan), *summary.batch_lines(plan)])
        losses = [summary.predicted_line(plan), *summary.fidelity_lines(plan), *rounds_lines(plan)]
        sections.append([*summary.budget_lines(plan), *losses, *summary.graph_lines(plan)])
        if self.groups:
            narrowed = any(site.reader for site in plan.rewritten)
            sections.append([LEGEND, CHANNELS] if narrowed else [LEGEND])
        return "\n\n".join("\n".join(lines) for lines in sections)

    @property
    def headline(self) -> str:
        """What was rewritten, how much is left, and the loss."""
        return headline(self.plan)

    def to_json(self) -> dict[str, Any]:
        """Every site by itself, and the totals; nothing but JSON's own types.

        ::

            {"model_class": ..., "totals": [{"unit": "parameters", "of": "model", ...}, ...],
             "sites": [{"name": "model.layers.0.mlp.up_proj", "rank": 96, ...}, ...],
             "unmatched": [...], "graph": {"before": 1123, "after": 1543, "operators": {...}}}

        With ``"rounds"`` if there were any, and ``"fidelity"`` once :func:`fxcompress.measure` was
        called.  Multiply-accumulates are those of all samples of ``"batch"``.
        """
        plan = self.plan
        found: dict[str, Any] = {
            "model_class": plan.model_class,
            "rules": plan.rules,
            "metric": plan.metric,
            "loss_unit": plan.loss_unit,
            "calibration": dict(plan.calibration),
            "damping": list(plan.damping),
            "held_back": None if plan.held_back is None else plan.held_back.model_dump(mode="json"),
            "speed": summary.speed_json(plan),
            "batch": plan.batch.model_dump(mode="json"),
            "budget": {**plan.budget.model_dump(mode="json"), "gap": plan.budget.gap},
            "rewritten": len(plan.rewritten),
            "totals": [{**asdict(total), "kept": total.kept} for total in summary.totals(plan)],
            "sites": [site.model_dump(mode="json") for site in plan.sites],
            "unmatched": [one.model_dump(mode="json") for one in plan.unmatched],
            "expanded": list(plan.expanded),
            "graph": {
                "before": len(plan.before),
                "after": len(plan.after) if plan.after else None,
                "operators": (
                    {op: list(pair) for op, pair in summary.operator_changes(plan).items()}
                    if plan.after
                    else {}
                ),
            },
            "warnings": list(plan.warnings),
        }
        if plan.rounds:
            found["objective"] = plan.objective
            found["rounds"] = [one.model_dump(mode="json") for one in plan.rounds]
        if plan.fidelity is not None:
            found["fidelity"] = plan.fidelity.model_dump(mode="json")
        return found

    def to_html(self, other: Plan | None = None) -> str:
        """One page that needs nothing else: styles, scripts and data are inside.

        Args:
            other: a plan of the same model to compare with, shown beside this one.
        """
        from fxcompress.report.html import render
        from fxcompress.report.page_data import page_data

        plan = self.plan
        totals = [
            f"{summary.model_name(plan)}: {summary.rewritten_text(plan)}",
            summary.held_back_line(plan),
            summary.speed_line(plan),
            *summary.totals_lines(plan),
            summary.predicted_line(plan),
        ]
        return render(page_data(plan, self.unchanged, str(self), other), totals)


def diff_plan(plan: Plan) -> Diff:
    """The diff that a plan, carried out or not, stands for."""
    return Diff(plan=plan, groups=fold_blocks(plan.rewritten), unchanged=unchanged(plan))


def group_title(group: BlockGroup) -> list[str]:
    """Folded paths, one a line; the last one says how many blocks they are."""
    titles = [pattern or "(root)" for pattern in group.patterns]
    if group.count > 1:
        titles[-1] = f"{titles[-1]:51} {group.count} alike"
    return titles


def unchanged_lines(those: tuple[Unchanged, ...]) -> list[str]:
    """``  lm_head    linear 576→49152    weight is tied to model.embed_tokens.weight``."""
    return [
        f"  {pattern or '(root)':45} {one.what:23} {one.reason}".rstrip()
        for one in those
        for pattern in one.patterns
    ]


def _group_lines(group: BlockGroup, plan: Plan, measured: Mapping[str, MeasuredSite]) -> list[str]:
    lines = group_title(group)
    chains: dict[str, list[Row]] = {}
    for row in group.rows:
        chains.setdefault(row.sites[0].reader, []).append(row)
    rest = chains.pop("", [])
    for chain in chains.values():
        lines += _chain_lines(chain, plan, measured)
    rules = [f"  rule {row.sites[0].rule} ({row.sites[0].location})" for row in rest]
    for row, rule, following in zip(rest, rules, [*rules, ""][1:], strict=True):
        partners = [other.name for other in rest if _together(other, row)]
        lines += _row_lines(row, _losses_text(Entry(row.sites, measured), plan), partners, plan)
        if rule != following:
            lines.append(rule)
    return lines


def _chain_lines(
    chain: Sequence[Row], plan: Plan, measured: Mapping[str, MeasuredSite]
) -> list[str]:
    """One hidden value: its channels, what it costs, and the operators that get smaller.

    ::

          gate_proj, up_proj: 1,536 → 896..1,200 channels ▅▆█▇, read by down_proj  KL 0.0004..0.0031
        - gate_proj           linear 576→1536         884,736
        + gate_proj           linear 576→k            516k..691k
        ...
        - down_proj           linear 1536→576         884,736
        + down_proj           linear k→576            516k..691k    refitted
          narrow, rule mlp (decoder.yaml:22)
    """
    *producers, reader = chain = [_alone(chain[0], chain[-1]), *chain[1:]]
    site = reader.sites[0]
    losses = _losses_text(Entry(reader.sites, measured), plan)
    made = ", ".join(row.label for row in producers)
    (widths,) = columns.ranks_of(reader.sites)
    channels = f"{site.full_rank:,} → {span(widths, count)} channels"
    if len({*widths}) > 1:
        channels += f" {sparkline(widths)}"
    lines = [f"  {made}: {channels}, read by {reader.label}  {losses}"]
    for row in chain:
        notes = ["refitted"] if row is reader else []
        if (then := row.sites[0].then) is not None:
            own = "×".join(span(axis, count) for axis in columns.ranks_of_then(row.sites))
            alone = "" if row is reader else f"  {loss_label(plan.loss_unit)} {_predicted(row)}"
            notes.append(f"then {then.form}, r {own}{alone}")
        lines += _row_lines(row, ", ".join(notes), (), plan)
    lines += _held_lines(reader)
    return [*lines, f"  {site.form}, rule {site.rule} ({site.location})"]


def _held_lines(reader: Row) -> list[str]:
    """What batch norms, scales and the like have of each channel, in alike blocks."""
    lines = []
    for each in zip(*(site.held for site in reader.sites), strict=True):
        if not each[0].parameters:
            continue
        pairs = [*zip(each, reader.sites, strict=True)]
        name = beside(each[0].name, reader.sites[0].name)
        dense = counts(held.parameters * int(site.full_ranks[0]) for held, site in pairs)
        left = counts(held.parameters * int(site.ranks[0]) for held, site in pairs)
        lines.append(_line("-", name, "entries of channels", dense))
        lines.append(_line("+", name, "entries of channels", left))
    return lines


def _alone(row: Row, reader: Row) -> Row:
    """A layer without what is counted with it: entries that others have of channels that go."""
    sites = []
    for site, last in zip(row.sites, reader.sites, strict=True):
        gone = int(last.full_ranks[0]) - int(last.ranks[0])
        more = gone * sum(held.parameters for held in last.held)
        after = Size({**site.after.root, "parameters": site.after.parameters + more})
        sites.append(site.model_copy(update={"after": after}))
    return replace(row, sites=tuple(sites))


def _ranks_text(row: Row) -> str:
    """``r 96..208 of 576 ▄▅█▇``, ``r 8..12×16 of 32×64`` of a form that has two ranks."""
    whole = "×".join(str(full) for full in row.sites[0].full_ranks)
    return f"r {columns.ranks_text(row.sites, WIDEST, f' of {whole}')}"


def _together(one: Row, other: Row) -> bool:
    """Whether two rows are rewritten together, in every block."""
    return bool(one.sites[0].bundle) and one.sites[0].bundle == other.sites[0].bundle


def _losses_text(entry: Entry, plan: Plan) -> str:
    """``KL 0.0004..0.0031``, ``KL 0.0004..0.0031, measured 0.0005..0.0044``."""
    text = f"{loss_label(plan.loss_unit)} {PREDICTED.alike(entry)}"
    return text if plan.fidelity is None else f"{text}, measured {MEASURED.alike(entry)}"


def _predicted(row: Row) -> str:
    return span((site.predicted for site in row.sites), loss)


def _remarks(site: SitePlan, plan: Plan) -> Mapping[str, str]:
    """What the form says of its functions; nothing if it is not registered here."""
    form = site.form if site.then is None else site.then.form
    try:
        return find_form(str(form), site.op, plan.templates).remarks
    except KeyError:
        return {}


def _row_lines(row: Row, losses: str, partners: Sequence[str], plan: Plan) -> list[str]:
    site = row.sites[0]
    remarks = _remarks(site, plan)
    name = row.label
    before = counts(site.before.parameters for site in row.sites)
    notes = [f"{row.per_block} alike"] * (row.per_block > 1)
    calls = {site.calls for site in row.sites}
    if max(calls) > 1:
        notes.append(f"called {span(calls, short)} times")
    what = site.operator + (", bias" if site.bias else "")
    after = counts(site.after.parameters for site in row.sites)
    lines = [_line("-", name, what, before, ", ".join(notes))]
    layers = [at for at, part in enumerate(site.parts) if part.path]
    if not layers:
        made = part_text(row, 0) if site.parts else str(site.form)
        note = losses if site.reader else f"{losses}  {_ranks_text(row)}"
        lines.append(_line("+", name, made, after, note))
        return lines
    # The rank stands beside the first layer, unless another operator holds what has it.
    first, last = layers[0], layers[-1]
    cells: dict[int, tuple[str, ...]] = {last: (after, losses)}
    if not site.bundle or site.parts[first].path.startswith(SHARED):
        ranks = _ranks_text(row)
        cells[first] = (after, f"{losses}  {ranks}") if first == last else (ranks,)
    shared = [at for at in layers if site.parts[at].path.startswith(SHARED)]
    if any(one.order for one in row.sites):
        lines.append(f"+ {name:19} {_order_text(row)}")
    for is_layer, run in groupby(enumerate(site.parts), key=lambda item: bool(item[1].path)):
        if not is_layer:
            ops = [part.op for _, part in run]
            said = ", ".join(remarks[op] for op in ops if op in remarks)
            lines.append(f"+ {name:19} {', '.join(ops)}" + (f" ({said})" if said else ""))
            continue
        for at, part in run:
            layer = f"{name}.{part.path}"
            lines.append(_line("+", layer, part_text(row, at), *cells.get(at, ("",))))
            if shared and at == shared[-1]:
                lines.append(f"  shared by {', '.join(partners)}")
    return lines


def _order_text(row: Row) -> str:
    """``channels in order, in 36..576 blocks (29 of 30)``."""
    orders = [site.order for site in row.sites if site.order]
    some = "" if len(orders) == len(row.sites) else f" ({len(orders)} of {len(row.sites)})"
    return f"channels in order, in {span(orders, '{:,}'.format)} blocks{some}"


def part_text(row: Row, index: int) -> str:
    """A layer of alike sites: ``linear r→1536-r``, or ``linear 128→1408`` if all are of one rank.

    What it is in terms of the rank follows from the sites themselves.
    """
    parts = [site.parts[index] for site in row.sites]
    if parts[0].in_features is None:
        return parts[0].op
    ends = ([part.in_features for part in parts], [part.out_features for part in parts])
    kernel = "×".join(map(str, parts[0].kernel))
    shown = "→".join(_features(end, row.sites) for end in ends)
    text = f"{parts[0].op} {shown} {kernel}"
    return text.rstrip()


def _features(sizes: Sequence[int | None], sites: Sequence[SitePlan]) -> str:
    """``r``, ``k``, ``1536-r`` or ``k-r`` where sizes are that in every site; else their range."""
    if len(set(sizes)) == 1:
        return str(sizes[0])
    axes = columns.ranks_of(sites)
    kept = axes.pop(0) if sites[0].reader else None
    axes += columns.ranks_of_then(sites)
    names = ["r"] if len(axes) == 1 else [f"r{axis + 1}" for axis in range(len(axes))]
    known = [*zip(names, axes, strict=True), *([("k", kept)] if kept else [])]
    wholes = [
        (str(sites[0].in_features), [site.in_features for site in sites]),
        (str(sites[0].out_features), [site.out_features for site in sites]),
        *known[len(axes) :],
    ]
    for name, values in known:
        if list(sizes) == values:
            return name
    for name, values in known:
        for text, whole in wholes:
            if text != name and list(sizes) == [m - r for m, r in zip(whole, values, strict=True)]:
                return f"{text}-{name}"
    return span((size or 0 for size in sizes), "{:.0f}".format)


def _line(sign: str, name: str, what: str, amount: str, note: str = "") -> str:
    """Columns of fixed width: a longer name moves its own line only."""
    return f"{sign} {name:19} {what:23} {amount:13} {note}".rstrip()
