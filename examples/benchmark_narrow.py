"""Narrowed feed-forward blocks beside low rank, on SmolLM2-135M: held-out KL at equal parameters.

    python examples/benchmark_narrow.py      # writes examples/results/narrow.md

One calibration and one decomposition serve all rows; they differ in the forms that the one budget
may choose from.  Calibrated on *Moby Dick*, measured on *Alice's Adventures in Wonderland*.
"""

from __future__ import annotations

import argparse
import warnings
from dataclasses import replace
from pathlib import Path

import torch
from smollm2 import CALIBRATION, HELD_OUT, Reference, batches, load_model, sequences

from fxcompress.pipeline.analysis import Analysis, analyse
from fxcompress.pipeline.build import rewrite
from fxcompress.pipeline.request import Request
from fxcompress.progress import stages
from fxcompress.rules import LoadedRules, parse_rules, with_budget

RULES = """
version: 1
budget: {keep: 0.8, of: matched, unit: parameters}
metric: {kind: kfac, output: categorical}
defaults: {tied: skip, min_saving: 0.05, multiple_of: 8}
rules:
  - id: hidden
    match: {node: {op: linear, name: "*.down_proj"}}
    rewrite: {any_of: [narrow, pivoted], then: pivoted}
  - id: others
    match: {node: {op: linear, name: "*.layers.*"}}
    rewrite: {form: pivoted}
"""
ROWS = {
    "pivoted": "`pivoted` everywhere",
    "narrow": "feed-forward blocks narrowed, attention `pivoted`",
    "both": "each block narrowed or `pivoted`",
    "then": "the same, and `pivoted` on what is left of a narrowed block",
    "free": "blocks narrowed, attention dense",
    "equal": "blocks narrowed to one width, attention dense (a plain checkpoint)",
}


def restricted(found: Analysis, row: str, rules: LoadedRules) -> Analysis:
    """The analysis with the forms of a row, and the budget of some rules."""
    blocks = {site.name for group in found.groups if group.hidden for site in group.sites}
    groups = [group for group in found.groups if row != "pivoted" or not group.hidden]
    if row in ("narrow", "free", "equal"):
        left = blocks if row == "narrow" else {site.name for site in found.sites}
        groups = [replace(g, forms={}) if g.name in left else g for g in groups]
    if row != "then":
        groups = [replace(group, narrowed=()) for group in groups]
    if row == "equal":  # as a rule with {form: narrow, group: widths} has it
        equal = [replace(g, match=replace(g.match, group="widths")) for g in groups if g.hidden]
        groups = [*(g for g in groups if not g.hidden), *equal]
    return replace(found, groups=tuple(groups), rules=rules)


def main() -> None:
    """Measure all rows."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6])
    options.add_argument("--calibrate", type=int, default=64, help="sequences of 512 tokens")
    options.add_argument("--evaluate", type=int, default=16, help="sequences of 512 tokens")
    options.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results/narrow.md")
    given = options.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    model, tokenizer = load_model()
    data = batches(sequences(tokenizer, CALIBRATION, given.calibrate))
    reference = Reference(model, sequences(tokenizer, HELD_OUT, given.evaluate))
    text = RULES if "then" in given.rows else RULES.replace(", then: pivoted", "")
    rules = parse_rules(text, "narrow.yaml")
    with stages(True) as show:
        found = analyse(model, rules, Request(show, data))
    lines = [
        "| forms | keep | KL | predicted | perplexity | parameters |",
        "|---|---|---|---|---|---|",
    ]
    for keep in given.keeps:
        for row in given.rows:
            with stages(False) as silent:
                now = restricted(found, row, with_budget(rules, keep)).showing(silent)
                small, plan = rewrite(model, now)
            fidelity = reference.compare(small)
            after = sum(site.after.parameters for site in plan.sites)
            lines.append(
                f"| {ROWS[row]} | {keep:g} | {fidelity.kl:.4f} | {plan.budget.predicted:.4f} | "
                f"{fidelity.perplexity:.2f} | {after:,} |"
            )
            print(lines[-1], flush=True)
    head = (
        f"Dense perplexity {reference.dense.perplexity:.2f}; `python examples/benchmark_narrow.py`."
    )
    given.out.write_text("\n".join([head, "", *lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
