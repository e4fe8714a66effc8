"""How much calibration data it takes: SmolLM2-135M with few tokens and with many.

    python examples/benchmark_data.py                         # examples/results/data.md
    python examples/benchmark_data.py --tokens 256 1024

Each row is two compilations from the same tokens of one book, measured on another: damping fixed
at 1e-3 and 1e-1, and damping chosen on the batches held back.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
import warnings
from pathlib import Path

import torch
from smollm2 import CALIBRATION, HELD_OUT, Reference, batches, load_model, sequences

import fxcompress
from fxcompress.pipeline.held_back import DAMPING
from fxcompress.rules import Damping, LoadedRules, read_rules

LENGTHS = {256: 64, 1024: 128}
"""Tokens of a sequence where 512 would leave too few sequences to hold one back."""

HEAD = """\
| tokens | damping | chosen | KL on other text | KL on the batches held back | predicted |
|---|---|---|---|---|---|
"""


def main() -> None:
    """Write the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096, 32768])
    arguments.add_argument("--keep", type=float, default=0.8)
    arguments.add_argument("--evaluate", type=int, default=16, help="sequences of 512 tokens")
    arguments.add_argument("--out", type=Path, default=Path("examples/results/data.md"))
    options = arguments.parse_args()
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    model, tokenizer = load_model()
    reference = Reference(model, sequences(tokenizer, HELD_OUT, options.evaluate))
    rows = []
    for tokens in options.tokens:
        length = LENGTHS.get(tokens, 512)
        data = batches(sequences(tokenizer, CALIBRATION, tokens // length, length), 1)
        for name in ("fixed", "chosen"):
            begin = time.perf_counter()
            rules = with_damping(read_rules("decoder"), DAMPING if name == "fixed" else None)
            small = fxcompress.compile(model, rules, data, keep=options.keep, progress=False)
            plan = fxcompress.plan_of(small)
            assert plan.held_back is not None
            kl = reference.compare(small).kl
            damping = " and ".join(f"{one:g}" for one in plan.damping)
            rows.append(
                f"| {tokens:,} | {name} | {damping} | {kl:.3f} | {plan.held_back.measured:.3f} | "
                f"{plan.budget.predicted:.3f} |"
            )
            print(rows[-1], f"{time.perf_counter() - begin:.0f} s", flush=True)
            write(options.out, options.keep, rows)


def write(out: Path, keep: float, rows: list[str]) -> None:
    """The table so far."""
    title = f"SmolLM2-135M, preset `decoder`, keep {keep:g}; `{Path(__file__).name}`\n\n"
    text = f"calibrated on {CALIBRATION.stem}, other text is {HELD_OUT.stem}\n\n"
    out.write_text(title + text + HEAD + "\n".join(rows) + "\n", encoding="utf-8")


def with_damping(loaded: LoadedRules, damping: tuple[float, float] | None) -> LoadedRules:
    """The rules with this damping; None for one that is chosen."""
    own = Damping() if damping is None else Damping(input=damping[0], output=damping[1])
    metric = loaded.rules.metric.model_copy(update={"damping": own})
    rules = loaded.rules.model_copy(update={"metric": metric})
    return dataclasses.replace(loaded, rules=rules)


if __name__ == "__main__":
    main()
