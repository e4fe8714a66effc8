"""SmolLM2-135M: one cut, and rounds of ISVT after it, beside plain distillation at equal steps.

    $ python examples/rounds_smollm2.py              # writes examples/results/rounds.md
    $ python examples/rounds_smollm2.py --keeps 0.6 --seeds 0 1 --schedules soft hard --baseline
    $ python examples/rounds_smollm2.py --schedules hard --steps 0 --correct    # nothing is trained
    $ python examples/rounds_smollm2.py --keeps 0.8 0.6 --schedules hard soft --forms narrow+pivoted

Trained and calibrated on Moby Dick, measured on Alice's Adventures in Wonderland.  The baseline is
what one would write by hand: the one-shot ranks of ``low_rank``, balanced factors, Adam (β₂ 0.99,
ten steps of warm-up, cosine), KL to the dense model, one fresh sequence of 512 tokens a step.
Rates, and whatever else was chosen, were chosen on the last eight sequences of Moby Dick.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
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
from torch import Tensor, nn

import fxcompress
from fxcompress.isvt.descent import cosine
from fxcompress.rules import LoadedRules, parse_rules

RESULTS = Path(__file__).parent / "results"
KEPT_BACK = 16
"""Sequences at the end of Moby Dick that nothing is trained on; choices were made on the last 8."""

RATES = {0.6: 2.5e-4, 0.8: 1.5e-4}
ADAM_RATES = {0.6: 5e-5, 0.8: 3e-5}


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    method: str
    keep: float
    steps: int
    seed: int
    fidelity: Fidelity
    seconds: float


def rules(keep: float, form: str, calibrate: int, seed: int, solver: str = "{}") -> LoadedRules:
    """All decoder linears under one budget; between forms joined by ``+`` it chooses."""
    return parse_rules(
        f"""
budget: {{keep: {keep}, of: matched, unit: parameters}}
metric: {{kind: kfac, output: categorical, seed: {seed}, batches: {calibrate}}}
solver: {solver}
rules:
  - id: decoder-linears
    match: {{node: {{op: linear, name: "model.layers.*"}}}}
    rewrite: {{any_of: [{", ".join(form.split("+"))}]}}
""",
        "rounds.yaml",
    )


def distil(dense: nn.Module, small: nn.Module, data: list[Any], rate: float, seed: int) -> None:
    """The baseline: the factors of a compressed model trained by Adam."""
    small.requires_grad_(False)
    plan = fxcompress.plan_of(small)
    factors = [p for s in plan.rewritten for p in small.get_submodule(s.name).parameters()]
    for parameter in factors:
        parameter.requires_grad_(True)
    optimizer = torch.optim.Adam(factors, lr=rate, betas=(0.9, 0.99))
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
    steps = len(data)
    for step, at in enumerate(order.tolist()):
        for group in optimizer.param_groups:
            group["lr"] = rate * cosine(step, steps)
        with torch.no_grad():
            log_p = dense(**data[at]).logits.log_softmax(-1)
        log_q = small(**data[at]).logits.log_softmax(-1)
        loss = F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def main() -> None:
    """Run what was asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keeps", type=float, nargs="+", default=[0.6, 0.8])
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=5, help="of the soft schedule")
    parser.add_argument("--schedules", nargs="*", choices=["hard", "soft"], default=["soft"])
    parser.add_argument("--features", type=float, help="their weight, if not the default one")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--forms", nargs="+", default=["pivoted", "narrow+pivoted"])
    parser.add_argument("--calibrate", type=int, default=64, help="sequences for the metric")
    parser.add_argument("--evaluate", type=int, default=16, help="sequences of the other book")
    parser.add_argument("--correct", action="store_true", help="the closed-form correction, too")
    parser.add_argument("--baseline", action="store_true", help="plain distillation, too")
    parser.add_argument("--only-rounds", action="store_true", help="without the one-shot row")
    parser.add_argument("--validation", action="store_true", help="on the rest of Moby Dick")
    parser.add_argument("--device", default="cpu", help="where the model and all batches are")
    parser.add_argument("--out", type=Path, default=RESULTS / "rounds.md")
    given = parser.parse_args()

    model, tokenizer = load_model()
    length = len(tokenizer(CALIBRATION.read_text(encoding="utf-8")).input_ids) // LENGTH
    model = model.to(given.device)
    text = sequences(tokenizer, CALIBRATION, length).to(given.device)
    data = batches(text[:-KEPT_BACK], 1)
    shown: Tensor = sequences(tokenizer, HELD_OUT, given.evaluate).to(given.device)
    reference = Reference(model, text[-8:] if given.validation else shown)
    rows: list[Row] = []

    def add(
        method: str, keep: float, steps: int, seed: int, small: nn.Module, since: float
    ) -> None:
        spent = time.perf_counter() - since
        rows.append(Row(method, keep, steps, seed, reference.compare(small), spent))
        found = rows[-1].fidelity
        print(
            f"{method:28} keep {keep} seed {seed}: KL {found.kl:.4f}, perplexity "
            f"{found.perplexity:.2f}, {spent:.0f} s",
            flush=True,
        )

    for keep in given.keeps:
        for seed in given.seeds:
            for form in given.forms:
                if not given.only_rounds:
                    start = time.perf_counter()
                    once = _once(given, model, data, keep, form, seed)
                    add(f"{form}, one-shot", keep, 0, seed, once, start)
                    del once
                for schedule in given.schedules:
                    _rounds(given, model, data, keep, form, seed, schedule, add)
            if given.baseline:
                start = time.perf_counter()
                small = _once(given, model, data, keep, "low_rank", seed)
                add("low_rank, one-shot", keep, 0, seed, small, start)
                taken = [data[at % len(data)] for at in range(given.steps)]
                distil(model, small, taken, ADAM_RATES.get(keep, 5e-5), seed)
                add("low_rank, distilled (Adam)", keep, given.steps, seed, small, start)
                del small
    report = table(rows, reference, given.calibrate)
    print("\n" + report)
    given.out.write_text(report, encoding="utf-8")


def _once(
    given: argparse.Namespace, model: nn.Module, data: list[Any], keep: float, form: str, seed: int
) -> nn.Module:
    """Cut once."""
    loaded = rules(keep, form, given.calibrate, seed)
    return fxcompress.compile(model, loaded, data[: given.calibrate], progress=True)


def _rounds(
    given: argparse.Namespace,
    model: nn.Module,
    data: list[Any],
    keep: float,
    form: str,
    seed: int,
    schedule: str,
    add: Callable[..., None],
) -> None:
    """Compress in rounds, and add a row."""
    rounds = given.rounds if schedule == "soft" else 1
    features = "" if given.features is None else f", features: {given.features}"
    solver = (
        f"{{rounds: {rounds}, steps: {given.steps // rounds}, schedule: {schedule}, "
        f"learning_rate: {RATES.get(keep, 2.5e-4)}, correct: {str(given.correct).lower()}"
        f"{features}}}"
    )
    start = time.perf_counter()
    loaded = rules(keep, form, given.calibrate, seed, solver)
    small = fxcompress.compile(model, loaded, data, progress=True)
    for line in str(fxcompress.plan_of(small)).split("\n"):
        if "→" in line:
            print(line)
    words = f"{form}, {rounds} x {schedule}" if given.steps else form
    words += ", corrected" if given.correct else ""
    words += "" if given.features is None else f", features {given.features:g}"
    add(words, keep, given.steps, seed, small, start)


def table(rows: list[Row], reference: Reference, calibrate: int) -> str:
    """The figures as Markdown."""
    tokens = sum(part.numel() for part in reference.parts)
    lines = [
        f"SmolLM2-135M, {torch.get_num_threads()} threads; metric from {calibrate * LENGTH:,} "
        f"tokens of {CALIBRATION.stem}, one sequence of {LENGTH} a step; KL in nats per token and "
        f"perplexity on {tokens:,} other tokens (dense {reference.dense.perplexity:.2f}). Seconds "
        "from the dense model on, everything included.",
        "",
        "| method | keep | seed | steps | KL | of one-shot | perplexity | seconds |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    base: dict[tuple[str, float, int], float] = {}
    for row in rows:
        form = row.method.split(",")[0]
        first = base.setdefault((form, row.keep, row.seed), row.fidelity.kl)
        lines.append(
            f"| {row.method} | {row.keep:g} | {row.seed} | {row.steps} | {row.fidelity.kl:.4f} | "
            f"{row.fidelity.kl / first:.3f} | {row.fidelity.perplexity:.2f} | {row.seconds:.0f} |"
        )
    lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
