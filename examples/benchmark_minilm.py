"""A sentence encoder under every metric and allocation, and under the algorithms of others.

    python examples/benchmark_minilm.py      # writes examples/results/minilm.md

Every row has the same calibration sentences and the same number of parameters, and is a rewritten
model, measured on other sentences (:class:`minilm.Fidelity`).  The algorithms of others are
settings of this package where these are identical:

- SVD: ``euclidean``, ``uniform``, ``low_rank``;
- FWSVD (arXiv 2207.00112): ``diagonal``, ``uniform``, ``low_rank``;
- TFWSVD (arXiv 2211.09718): ``elementwise``, ``uniform``, ``low_rank``;
- SVD-LLM (arXiv 2403.07378), whitening only: ``activation``, ``uniform``, ``low_rank``.

BALF (arXiv 2509.25136) whitens in the same way, and solves for all ranks at once, with "leave it
dense" as a choice, by the retained *share* of every layer's energy: :func:`relative`.  Its
bisection ends at a multiplier; the solver used here goes on to the budget, to BALF's advantage.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from minilm import (
    CALIBRATION,
    HELD_OUT,
    Fidelity,
    Reference,
    batches,
    by_length,
    embed,
    load_model,
    sentences,
)
from torch import Tensor, nn

from fxcompress.metric import METRICS
from fxcompress.pipeline.analysis import Analysis, analyse
from fxcompress.pipeline.build import rewrite
from fxcompress.pipeline.decomposition import Decomposed, Decomposition
from fxcompress.pipeline.request import Request
from fxcompress.plans.plan import Plan
from fxcompress.report import stages
from fxcompress.rules import LoadedRules, parse_rules

RESULTS = Path(__file__).parent / "results"
KEEPS = (0.9, 0.8, 0.7, 0.6, 0.5)


@dataclass(frozen=True)
class Method:
    """What one row of the tables does.

    Attributes:
        metric, allocation: as in a rule file.
        form: of the linear layers; several, between which the budget chooses, with commas.
        known: name of the algorithm of others that this is.
        words: whether the word embedding is compressed, too (form ``embedding``).
        relative: whether the solver is told shares of every layer's energy (BALF).
    """

    metric: str
    allocation: str
    form: str
    known: str = ""
    words: bool = False
    relative: bool = False

    @property
    def forms(self) -> list[str]:
        """Of the linear layers."""
        return self.form.split(", ")


METHODS = (
    Method("euclidean", "uniform", "low_rank", "SVD"),
    Method("euclidean", "global", "low_rank"),
    Method("diagonal", "uniform", "low_rank", "FWSVD"),
    Method("diagonal", "global", "low_rank"),
    Method("elementwise", "uniform", "low_rank", "TFWSVD"),
    Method("elementwise", "global", "low_rank"),
    Method("activation", "uniform", "low_rank", "SVD-LLM"),
    Method("activation", "global", "low_rank"),
    Method("activation", "global", "low_rank", "BALF", relative=True),
    Method("kfac", "uniform", "low_rank"),
    Method("kfac", "global", "low_rank"),
    Method("kfac", "global", "pivoted"),
    Method("kfac", "global", "narrow, pivoted"),
    Method("ekfac", "uniform", "low_rank"),
    Method("ekfac", "global", "low_rank"),
    Method("ekfac", "global", "pivoted"),
    Method("activation", "uniform", "low_rank", "SVD-LLM", words=True),
    Method("activation", "global", "low_rank", "BALF", words=True, relative=True),
    Method("kfac", "global", "low_rank", words=True),
    Method("kfac", "global", "pivoted", words=True),
    Method("kfac", "global", "narrow, pivoted", words=True),
)


@dataclass(frozen=True)
class Row:
    """One method at one size."""

    method: Method
    keep: float
    plan: Plan
    fidelity: Fidelity


def rules(method: Method, keep: float, forms: Sequence[str]) -> LoadedRules:
    """A rule file for the encoder's linear layers, and the word embedding where asked for."""
    words = """
  - id: words
    match: {node: {op: embedding, name: embeddings.word_embeddings}}
    rewrite: {form: embedding}"""
    text = f"""
budget: {{keep: {keep}, of: matched, unit: parameters}}
metric: {{kind: {method.metric}, output: gaussian}}
solver: {{allocation: {method.allocation}}}
rules:{words if method.words else ""}
  - id: encoder-linears
    match: {{node: {{op: linear, name: "encoder.layer.*"}}}}
    rewrite: {{any_of: [{", ".join(forms)}]}}
"""
    return parse_rules(text, "minilm.yaml")


def relative(decomposed: Decomposition) -> Decomposition:
    """Losses as shares of what is lost at rank 0 (``½ Σ σ_i²``): what BALF's solver is told."""

    def shares(site: Decomposed) -> Decomposed:
        whole = 0.5 * float(site.sigma.square().sum())
        losses = {name: loss / whole for name, loss in site.losses.items()}
        return replace(site, losses=losses)

    groups = {name: shares(group) for name, group in decomposed.groups.items()}
    return replace(decomposed, groups=groups)


def compress(
    model: nn.Module, analysis: Analysis, method: Method, keep: float
) -> tuple[nn.Module, Plan]:
    """What ``compile`` does with :func:`rules`, from an analysis that offers more forms."""
    offered = {*method.forms, "embedding"}
    groups = tuple(
        replace(group, forms={name: form for name, form in group.forms.items() if name in offered})
        for group in analysis.groups
    )
    found = analysis.decomposed
    analysis = replace(
        analysis,
        rules=rules(method, keep, method.forms),
        groups=groups,
        decomposed=relative(found) if method.relative else found,
    )
    with stages(False) as silent:
        return rewrite(model, analysis.showing(silent))


def measure(
    model: nn.Module,
    data: Sequence[dict[str, Tensor]],
    reference: Reference,
    methods: Sequence[Method],
    keeps: Sequence[float],
) -> list[Row]:
    """All rows; methods that differ in allocation and form only share one analysis."""
    rows = []
    analysis: dict[tuple[str, bool], Analysis] = {}
    for method in methods:
        key = (method.metric, method.words)
        if key not in analysis:
            forms = sorted({f for m in methods if (m.metric, m.words) == key for f in m.forms})
            with stages(True) as show:
                found = analyse(
                    model, rules(method, 1.0, forms), Request(show, data, forward=embed)
                )
            analysis = {key: found}  # the one before is not needed again
        for keep in keeps:
            small, plan = compress(model, analysis[key], method, keep)
            rows.append(Row(method, keep, plan, reference.compare(small)))
            print(rows[-1].method, keep, rows[-1].fidelity, flush=True)
    return rows


def grid(rows: Sequence[Row], title: str, cell: Callable[[Row], str]) -> list[str]:
    """A Markdown table, a line for every method and a column for every size."""
    keeps = sorted({row.keep for row in rows}, reverse=True)
    lines = [
        f"| {title} | metric | ranks | form | " + " | ".join(f"{k:g}" for k in keeps) + " |",
        "|---|---|---|---|" + "---:|" * len(keeps),
    ]
    for method in dict.fromkeys(row.method for row in rows):
        cells = {row.keep: cell(row) for row in rows if row.method == method}
        names = f"{method.known} | `{method.metric}` | `{method.allocation}`"
        lines.append(
            f"| {names}{', relative' if method.relative else ''} | `{method.form}` | "
            + " | ".join(cells[keep] for keep in keeps)
            + " |"
        )
    return [*lines, ""]


def section(rows: Sequence[Row], title: str) -> list[str]:
    """The tables of the methods that compress the same operators."""
    first = rows[0].plan
    matched, whole = first.budget.dense, first.model_before.parameters
    sizes = {row.keep: row.plan.model_after.parameters / whole for row in rows}
    spent = [row.plan.budget.cost / row.plan.budget.dense - row.keep for row in rows]
    fisher = [row for row in rows if METRICS[row.method.metric].backward]
    return [
        f"## {title}",
        "",
        f"{matched:,.0f} of the model's {whole:,} parameters ({matched / whole:.1%}) are in these "
        "operators. Columns are the share of them that is kept; of the whole model that is "
        + ", ".join(f"{size:.1%}" for _, size in sorted(sizes.items(), reverse=True))
        + f". Parameters kept differ from the budget by {min(spent):+.2%} to {max(spent):+.2%}.",
        "",
        *grid(
            rows,
            "Cosine of the embeddings: 1 − mean / 5th percentile",
            lambda row: f"{1 - row.fidelity.cosine:.4f} / {row.fidelity.low:.3f}",
        ),
        *grid(
            rows,
            "Ranking of the dense model: recall@10 / Kendall's τ of its first 100",
            lambda row: f"{row.fidelity.recall:.3f} / {row.fidelity.kendall:.3f}",
        ),
        *grid(
            rows,
            "Finding a neighbouring sentence: MRR",
            lambda row: f"{row.fidelity.mrr:.4f}",
        ),
        *grid(
            fisher,
            "Predicted loss, and 1 − mean cosine over it",
            lambda row: f"{row.plan.budget.predicted:.4f} / {_ratio(row):.1f}",
        ),
    ]


def _ratio(row: Row) -> float:
    return (1 - row.fidelity.cosine) / row.plan.budget.predicted


def report(rows: Sequence[Row], reference: Reference, calibration: int) -> str:
    """The figures as Markdown."""
    reciprocal = reference.reciprocal_ranks(reference.embeddings)
    error = float(reciprocal.std()) / len(reciprocal) ** 0.5
    lines = [
        "# all-MiniLM-L6-v2, one-shot",
        "",
        f"Calibrated on {calibration:,} sentences of {CALIBRATION.stem}, measured on "
        f"{len(reference.texts):,} of {HELD_OUT.stem}, of which {len(reference.queries):,} are "
        f"queries over all others. Dense MRR {reference.dense.mrr:.4f} (standard error "
        f"{error:.4f}; differences between models on the same queries are surer than that).",
        "",
    ]
    linears = [row for row in rows if not row.method.words]
    words = [row for row in rows if row.method.words]
    if linears:
        lines += section(linears, "Linear layers of the encoder")
    if words:
        lines += section(words, "Linear layers and word embedding")
    return "\n".join(lines)


def main() -> None:
    """Run all rows and write the tables."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--keep", type=float, nargs="+", default=KEEPS)
    # The iterations of elementwise alone take a third as long as all the rest.
    default = [name for name in METRICS if name != "elementwise"]
    arguments.add_argument("--metrics", nargs="+", choices=list(METRICS), default=default)
    arguments.add_argument("--out", type=Path, default=RESULTS / "minilm.md")
    options = arguments.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_model()
    texts = sentences(CALIBRATION)
    data = batches(tokenizer, [texts[at] for at in by_length(tokenizer, texts)])
    reference = Reference(model, tokenizer, sentences(HELD_OUT))
    methods = [method for method in METHODS if method.metric in options.metrics]
    rows = measure(model, data, reference, methods, options.keep)
    text = report(rows, reference, len(texts))
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {options.out}")


if __name__ == "__main__":
    main()
