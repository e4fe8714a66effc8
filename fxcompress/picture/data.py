"""The picture of a plan as JSON, from which a page draws the graph before and after."""

from __future__ import annotations

from typing import Any

from fxcompress.picture.boxes import AFTER, BEFORE, STATUSES, Tree
from fxcompress.picture.build import tree_of_plan
from fxcompress.picture.folded import Entry, Kind, fold_tree
from fxcompress.picture.layout import layout
from fxcompress.plans.plan import Plan, SitePlan


class _Names:
    """Texts, each once, by their number."""

    def __init__(self) -> None:
        self.numbers: dict[str, int] = {}

    def __call__(self, text: str) -> int:
        return self.numbers.setdefault(text, len(self.numbers))


def graph_data(plan: Plan) -> dict[str, Any]:
    """What a page needs to draw the graph before and after; nothing but JSON's own types.

    ::

        {"model": "LlamaForCausalLM", "planned": false, "unit": "nats per prediction",
         "statuses": ["unchanged", "factorized", ...],
         "names": ["q_proj", "linear 64→64", ...],        # all texts below are places in here
         "root": 12,                                       # place in kinds
         "kinds": [{"entries": [{"label": 0, "before": 1, ...}], "edges": [[0, 1, 3], ...],
                    "rows": [[0], [1, -2], ...]}, ...],
         "sites": {"model.layers.0.self_attn.q_proj": [form, rank, full, ...], ...},
         "unmatched": {"lm_head": 17}}

    A kind is what is inside of alike boxes, whatever their ranks.  Its entries have, where that is
    not the usual: ``label``, or ``labels`` of several in a row; ``before`` and ``after``, the
    operator in words (none of a module); ``shape`` and ``now``, that of its value before and after;
    ``status``; ``sides`` (1 before, 2 after, 3 both); ``kind``, or ``kinds``, one for each of
    several; ``function`` and ``site``, each 1 where it is one; ``call``.  Status and sides are left
    out of what is in a site: factorized, and after.

    Edges are (source, target, sides), -1 for outside.  Rows hold places of entries, and -1 minus
    that of an edge that passes; they are left out where every entry has one of its own.  ``sites``
    are by path, with the values that :data:`SITE` names.
    """
    return tree_data(tree_of_plan(plan), plan.model_class.rpartition(".")[2], plan.loss_unit)


def tree_data(tree: Tree, title: str, unit: str) -> dict[str, Any]:
    """The picture of a graph as JSON: see :func:`graph_data`.

    Args:
        tree: the graph.
        title: name of the model.
        unit: of predicted losses.
    """
    names = _Names()
    folded = fold_tree(tree)
    bodies = {
        inner
        for kind in folded.kinds
        for entry in kind.entries
        if entry.site
        for inner in entry.kinds
    }
    kinds = [_kind(kind, names, at in bodies) for at, kind in enumerate(folded.kinds)]
    sites = {box.site.name: box.site for box in tree.root.walk() if box.site is not None}
    unmatched = {name: names(reason) for name, reason in tree.unmatched.items()}
    rows = {name: _site(site, names) for name, site in sites.items()}
    return {
        "model": title,
        "planned": tree.planned,
        "single": tree.single,
        "unit": unit,
        "statuses": list(STATUSES),
        "names": list(names.numbers),
        "root": folded.root,
        "kinds": kinds,
        "site": list(SITE),
        "sites": rows,
        "unmatched": unmatched,
    }


SITE = ("form", "ranks", "full", "predicted", "before", "after", "reason", "rule", "bundle")
"""What is told of a site: its form, ranks and those at which nothing would be lost, the predicted
loss, parameters before and after, why it stays dense, the rule and its place, and its bundle."""


def _site(site: SitePlan, names: _Names) -> list[Any]:
    reader = site.reader in ("", site.name)
    return [
        names(site.form_text if site.form else ""),
        list(site.ranks if site.then is None else (*site.ranks, *site.then.ranks)),
        list(site.full_ranks if site.then is None else (*site.full_ranks, *site.then.full_ranks)),
        float(f"{site.predicted:.4g}") if site.form and reader else None,
        site.before.parameters,
        site.after.parameters,
        names(site.reason),
        names(f"{site.rule} ({site.location})"),
        names(site.bundle),
    ]


def _kind(kind: Kind, names: _Names, body: bool) -> dict[str, Any]:
    placed = layout(len(kind.entries), kind.edges)
    in_a_row = placed.rows == tuple((place,) for place in range(len(kind.entries)))
    return {
        "entries": [_entry(entry, names, body) for entry in kind.entries],
        "edges": [[edge.source, edge.target, edge.sides] for edge in kind.edges],
        **({} if in_a_row else {"rows": [list(row) for row in placed.rows]}),
    }


def _entry(entry: Entry, names: _Names, body: bool) -> dict[str, Any]:
    labels = [names(label) for label in entry.labels]
    texts = {
        "before": entry.before,
        "after": entry.after if entry.after != entry.before else "",
        "shape": entry.shape,
        "now": entry.shape_after if entry.shape_after != entry.shape else "",
    }
    numbers = {
        "status": 0 if body else entry.status,
        "call": entry.call,
        "function": int(entry.function),
        "site": int(entry.site),
    }
    return {
        **({"label": labels[0]} if len(labels) == 1 else {"labels": labels}),
        **{key: names(text) for key, text in texts.items() if text},
        **{key: number for key, number in numbers.items() if number},
        **({} if body or entry.sides == BEFORE | AFTER else {"sides": entry.sides}),
        **({"kind": entry.kinds[0]} if len(entry.kinds) == 1 else {}),
        **({"kinds": list(entry.kinds)} if len(entry.kinds) > 1 else {}),
    }
