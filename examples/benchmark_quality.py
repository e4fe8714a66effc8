"""The same model, text and parameters under every metric, allocation and form.

    python examples/benchmark_quality.py      # writes examples/results/quality.md

One calibration pass over Moby Dick serves all rows; every row is a rewritten model, measured
on Alice's Adventures in Wonderland.  ``activation`` with uniform ranks in ``low_rank`` form
is SVD-LLM (W); ``diagonal`` with uniform ranks is FWSVD; ``kfac``, ``global``, ``pivoted`` is
what the preset "decoder" does.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from smollm2 import (
    CALIBRATION,
    HELD_OUT,
    LENGTH,
    Fidelity,
    Reference,
    batches,
    load_model,
    sequences,
)
from torch import nn

from fxcompress.metric import METRICS, Calibration, Draws, KroneckerMetric, calibrate
from fxcompress.pipeline.analysis import Analysis, analyse
from fxcompress.pipeline.build import rewrite
from fxcompress.pipeline.decomposition import Decomposition, decompose_groups, metric_from
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.sites import gather_sites
from fxcompress.pipeline.survey import match_model
from fxcompress.plans.plan import Plan
from fxcompress.report import stages
from fxcompress.rules import LoadedRules, parse_rules

RESULTS = Path(__file__).parent / "results"
EVERYTHING = KroneckerMetric(
    "all", frozenset({"input", "output", "weight"}), "", lambda moments: (None, None)
)
BASELINE = ("activation", "uniform", "low_rank")
FORMS = ("low_rank", "pivoted")
JOINT = tuple(f"{form} | joint" for form in FORMS)
"""Queries, keys and values, and gate and up, may share a half; only for K-FAC, global."""


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    metric: str
    allocation: str
    form: str
    keep: float
    plan: Plan
    fidelity: Fidelity

    @property
    def key(self) -> tuple[str, str, str]:
        return (self.metric, self.allocation, self.form)


def rules(metric: str, allocation: str, form: str, keep: float) -> LoadedRules:
    """The preset "decoder" with one thing changed at a time; ``a | b`` lets the solver choose."""
    forms = form.split(" | ")
    single = [each for each in forms if each != "joint"]
    together = (
        ""
        if "joint" not in forms
        else f"""
  - id: qkv
    match: {{group: {{op: linear, name: "model.layers.*.{{q,k,v}}_proj"}}}}
    rewrite: {{any_of: {json.dumps(forms)}}}
  - id: gate-up
    match: {{group: {{op: linear, name: "model.layers.*.{{gate,up}}_proj"}}}}
    rewrite: {{any_of: {json.dumps(forms)}}}"""
    )
    text = f"""
budget: {{keep: {keep}, of: matched, unit: parameters}}
metric: {{kind: {metric}, damping: {{input: 1.0e-3, output: 1.0e-1}}, output: categorical,
         held_back: 0.0}}
solver: {{allocation: {allocation}}}
rules:{together}
  - id: decoder-linears
    match: {{node: {{op: linear, name: "model.layers.*"}}}}
    rewrite: {{any_of: {json.dumps(single)}}}
"""
    return parse_rules(text, "benchmark.yaml")


def combinations(metric: str, keeps: Sequence[float]) -> Iterator[tuple[str, str, float]]:
    """Allocation, form and keep of the rows of a metric."""
    yield from itertools.product(("uniform", "global"), FORMS, keeps)
    if metric == "kfac":
        yield from itertools.product(("global",), JOINT, keeps)


def measure(
    model: nn.Module,
    base: Analysis,
    calibration: Calibration,
    reference: Reference,
    keeps: Sequence[float],
    metrics: Sequence[str],
) -> list[Row]:
    """All rows, the spectra of a metric shared by its rows."""
    rows = []
    for metric in metrics:
        decomposed: Decomposition | None = None
        for allocation, form, keep in combinations(metric, keeps):
            start = time.perf_counter()
            # Decomposed once for all forms: what a row does not offer is left out afterwards.
            everything = rules(metric, allocation, " | ".join((*FORMS, "joint")), keep)
            if decomposed is None:
                whole = match_model(base.model, everything, base.recording)
                spec = everything.rules.metric
                _, groups, _ = gather_sites(base.model, base.recording, whole)
                decomposed = decompose_groups(
                    base.model,
                    groups,
                    metric_from(
                        dict(calibration.moments),
                        METRICS[metric],
                        (spec.damping.input, spec.damping.output),
                    ),
                )
            loaded = rules(metric, allocation, form, keep)
            matched = match_model(base.model, loaded, base.recording)
            sites, groups, _ = gather_sites(base.model, base.recording, matched)
            analysis = replace(
                base,
                rules=loaded,
                matched=matched,
                sites=sites,
                groups=groups,
                decomposed=decomposed,
            )
            with stages(False) as silent:
                small, plan = rewrite(model, analysis.showing(silent))
            fidelity = reference.compare(small)
            rows.append(Row(metric, allocation, form, keep, plan, fidelity))
            print(
                f"{metric:10} {allocation:8} {form:16} keep {keep}  KL {fidelity.kl:8.4f}  "
                f"perplexity {fidelity.perplexity:10.2f}  {time.perf_counter() - start:5.1f} s",
                flush=True,
            )
            del small
    return rows


def table(rows: list[Row], reference: Reference, tokens: int) -> str:
    """The figures as Markdown."""
    keeps = sorted({row.keep for row in rows}, reverse=True)
    first = BASELINE if any(row.key == BASELINE for row in rows) else rows[0].key
    base = {row.keep: row.fidelity.kl for row in rows if row.key == first}
    lines = [
        "SmolLM2-135M, 210 decoder linears, one-shot; "
        f"calibrated on {tokens:,} tokens of {CALIBRATION.stem}, measured on "
        f"{sum(part.numel() for part in reference.parts):,} tokens of {HELD_OUT.stem} "
        f"(dense perplexity {reference.dense.perplexity:.2f}).",
        "KL to the dense model in nats per token; its ratio to that of the row "
        f"{', '.join(f'`{part}`' for part in first)} at the same parameters in the same run"
        + (" (SVD-LLM)." if first == BASELINE else "."),
        "",
        "| metric | ranks | form | "
        + " | ".join(f"keep {k:g}: KL | perplexity | predicted | ratio" for k in keeps)
        + " |",
        "|---|---|---|" + "---:|---:|---:|---:|" * len(keeps),
    ]
    for key in dict.fromkeys(row.key for row in rows):
        cells = ["`" + part.replace(" | ", "`, `") + "`" for part in key]
        for keep in keeps:
            row = next(row for row in rows if row.key == key and row.keep == keep)
            nats = row.plan.loss_unit.startswith("nats")
            cells += [
                f"{row.fidelity.kl:.4f}",
                f"{row.fidelity.perplexity:.2f}",
                f"{row.plan.budget.predicted:.4f}" if nats else "–",
                f"{row.fidelity.kl / base[keep]:.3f}",
            ]
        lines.append("| " + " | ".join(cells) + " |")
    most = max(row.plan.budget.cost / row.plan.budget.dense - row.keep for row in rows)
    least = min(row.plan.budget.cost / row.plan.budget.dense - row.keep for row in rows)
    lines += [
        "",
        f"Parameters actually kept differ from the budget by {least:+.4%} to {most:+.4%} "
        "(never above it; uniform ranks are rounded down).",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Run all rows and write the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--calibrate", type=int, default=64, help="sequences of 512 tokens")
    arguments.add_argument("--evaluate", type=int, default=16, help="sequences of 512 tokens")
    arguments.add_argument("--keep", type=float, nargs="+", default=[0.8, 0.6])
    arguments.add_argument("--metrics", nargs="+", choices=list(METRICS), default=list(METRICS))
    arguments.add_argument("--out", type=Path, default=RESULTS / "quality.md")
    options = arguments.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_model()
    data = batches(sequences(tokenizer, CALIBRATION, options.calibrate))
    reference = Reference(model, sequences(tokenizer, HELD_OUT, options.evaluate))
    with stages(True) as show:
        # Only to record and match: the euclidean metric reads no data.
        base = analyse(model, rules("euclidean", *BASELINE[1:], 0.8), Request(show, data))
        tick = show.stage("calibrate", len(data))
        calibration = calibrate(
            base.model, base.sites, data, EVERYTHING, drawn=Draws("categorical"), tick=tick
        )
    rows = measure(model, base, calibration, reference, options.keep, options.metrics)
    text = table(rows, reference, options.calibrate * LENGTH)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {options.out}")


if __name__ == "__main__":
    main()
