"""A small mixture of experts, trained on a book: its experts under one budget, or at uniform ranks.

    python examples/benchmark_experts.py      # writes examples/results/experts.md

A Mixtral of bytes with 8 experts in each of 2 layers, 2 of them for every byte.  It is trained on
*Moby Dick*, calibrated on it, and measured on the last tenth of it.  Only experts are compressed.
"""

from __future__ import annotations

import argparse
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

import fxcompress
from fxcompress.rules import LoadedRules, parse_rules

TEXT = Path(__file__).parent / "data/moby_dick.txt"
LENGTH = 128
RULES = """
version: 1
budget: {{keep: {keep}, of: matched, unit: parameters}}
metric: {{kind: kfac, output: categorical}}
solver: {{allocation: {allocation}}}
rules:
  - id: experts
    match: {{node: {{op: linear, name: "*.experts.*"}}}}
    rewrite: {{any_of: [{forms}]}}
"""
ROWS = (("uniform", "low_rank"), ("uniform", "pivoted"), ("global", "low_rank"))
ROWS += (("global", "pivoted"), ("global", "narrow, pivoted"))


@dataclass(frozen=True)
class Text:
    """Sequences of bytes (sequences x :data:`LENGTH`) that do not overlap."""

    training: Tensor
    held_out: Tensor


def read_text() -> Text:
    """The book, cut in order: nine tenths to learn from, the last one held out."""
    data = torch.tensor([min(byte, 127) for byte in TEXT.read_bytes()])
    rows = data[: len(data) // LENGTH * LENGTH].view(-1, LENGTH)
    cut = len(rows) * 9 // 10
    return Text(rows[:cut], rows[cut:])


def trained(text: Text, steps: int) -> nn.Module:
    """A model that has learned to foretell the next byte; the same one for the same steps."""
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=128, hidden_size=64, intermediate_size=96, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=8, num_experts_per_tok=2,
        max_position_embeddings=LENGTH, output_router_logits=True, router_aux_loss_coef=0.02,
    )  # fmt: skip
    model = transformers.MixtralForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    numbers = torch.Generator().manual_seed(0)
    for _ in range(steps):
        rows = torch.randint(len(text.training), (16,), generator=numbers)
        batch = text.training[rows]
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
    model.config.output_router_logits = False
    return model.eval()


@torch.no_grad()
def log_probabilities(model: nn.Module, rows: Tensor) -> Tensor:
    """Of every next byte (sequences x length x bytes)."""
    return torch.cat([model(input_ids=each).logits.log_softmax(-1) for each in rows.split(16)])


def expert_bytes(model: nn.Module) -> int:
    """Bytes of all parameters in experts."""
    return sum(p.nbytes for name, p in model.named_parameters() if ".experts." in name)


def rules(keep: float, allocation: str, forms: str) -> LoadedRules:
    """The rules of a row."""
    return parse_rules(RULES.format(keep=keep, allocation=allocation, forms=forms), "experts.yaml")


def main() -> None:
    """Train, compress in all ways, and write a table."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--steps", type=int, default=1000, help="of training, 16 sequences each")
    options.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6, 0.5])
    options.add_argument("--calibrate", type=int, default=256, help="sequences of 128 bytes")
    options.add_argument("--out", type=Path, default=Path(__file__).parent / "results/experts.md")
    given = options.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    text, start = read_text(), time.time()
    model = trained(text, given.steps)
    print(f"trained in {time.time() - start:.0f} s")
    data = [{"input_ids": each} for each in text.training[: given.calibrate].split(16)]
    dense = log_probabilities(model, text.held_out)
    truth = text.held_out[:, 1:]

    def entropy(found: Tensor) -> float:
        """Cross-entropy of the held-out text, in nats per byte."""
        return float(F.nll_loss(found[:, :-1].flatten(0, 1), truth.flatten()))

    whole = sum(p.numel() for p in model.parameters())
    lines = [
        "# Experts of a small mixture",
        "",
        "Written by `python examples/benchmark_experts.py`. A Mixtral of bytes (2 layers of 8",
        f"experts, 2 for a byte; {whole:,} parameters), trained for {given.steps:,} steps on",
        f"*Moby Dick*. Calibrated on {given.calibrate} sequences of {LENGTH} bytes; KL to the",
        "dense model and cross-entropy on the last tenth of the book, in nats per byte. Only",
        f"experts are compressed; dense they take {expert_bytes(model):,} bytes, and the",
        f"cross-entropy is {entropy(dense):.3f}.",
        "",
        "| keep | ranks | forms | KL | predicted | cross-entropy | bytes of experts |",
        "|---|---|---|---|---|---|---|",
    ]
    for keep in given.keeps:
        for allocation, forms in ROWS:
            small = fxcompress.compile(model, rules(keep, allocation, forms), data, progress=False)
            found = log_probabilities(small, text.held_out)
            divergence = float((dense.exp() * (dense - found)).sum(-1).mean())
            predicted = fxcompress.plan_of(small).budget.predicted
            named = ", ".join(f"`{form}`" for form in forms.split(", "))
            lines.append(
                f"| {keep} | {allocation} | {named} | {divergence:.4f} | {predicted:.4f} "
                f"| {entropy(found):.3f} | {expert_bytes(small):,} |"
            )
            print(lines[-1], flush=True)
    given.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
