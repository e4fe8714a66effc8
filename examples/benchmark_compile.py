"""Seconds and peak memory of every stage, beside the floor of the same machine.

    python examples/benchmark_compile.py      # writes examples/results/compile.md

The floor is what no implementation of this method can do without: bare forward and backward
passes over the same tokens (gradients of activations only, the cheapest backward pass), and
the bare float64 ``eigh`` of the same factors and SVD of the same weights.
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
import torch.nn.functional as F
from smollm2 import CALIBRATION, LENGTH, batches, load_model, sequences
from torch import Tensor, nn

from fxcompress.pipeline.analysis import analyse
from fxcompress.pipeline.build import rewrite
from fxcompress.pipeline.request import Request
from fxcompress.rules import load_rules

RESULTS = Path(__file__).parent / "results"


class Meter:
    """Time and peak resident memory per stage; stands in for the progress display."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self.peaks: dict[str, float] = {}
        self._name = ""
        self._start = 0.0
        self._running = True
        self._process = psutil.Process()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def stage(self, name: str, total: int | None = None) -> Callable[[], None]:
        """End the stage before, start this one."""
        now = time.perf_counter()
        if self._name:
            self.seconds[self._name] = self.seconds.get(self._name, 0.0) + now - self._start
        self._name, self._start = name, now
        print(f"{name} ...", flush=True)
        return lambda: None

    def stop(self) -> None:
        """End the last stage."""
        self.stage("")
        self._running = False
        self._thread.join()

    def _watch(self) -> None:
        while self._running:
            used = self._process.memory_info().rss / 2**30
            self.peaks[self._name] = max(self.peaks.get(self._name, 0.0), used)
            time.sleep(0.05)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    """Add the time spent inside to ``seconds[name]``."""
    print(f"floor: {name} ...", flush=True)
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start


def passes(model: nn.Module, data: list[dict[str, Tensor]]) -> None:
    """Bare forward and backward passes, no gradients of parameters."""
    learning = [p for p in model.parameters() if p.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    embedding = model.get_input_embeddings()  # type: ignore[operator]
    handle = embedding.register_forward_hook(lambda module, args, out: out.requires_grad_())
    for batch in data:
        logits = model(**batch).logits
        labels = batch["input_ids"]
        F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum").backward()
    handle.remove()
    for parameter in learning:
        parameter.requires_grad_(True)


def main() -> None:
    """Measure and write the table."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--calibrate", type=int, default=64, help="sequences of 512 tokens")
    arguments.add_argument("--out", type=Path, default=RESULTS / "compile.md")
    options = arguments.parse_args()
    torch.manual_seed(0)
    model, tokenizer = load_model()
    data = batches(sequences(tokenizer, CALIBRATION, options.calibrate))

    floor: dict[str, float] = {}
    with timed(floor, "forward and backward passes"):
        passes(model, data)

    meter = Meter()
    analysis = analyse(model, load_rules("decoder"), Request(meter, data))
    _, plan = rewrite(model, analysis)
    meter.stop()

    generator = torch.Generator().manual_seed(0)
    inputs = {site.source: site.in_features for site in analysis.sites}
    sizes = [*inputs.values(), *(site.out_features for site in analysis.sites)]
    with timed(floor, f"eigh of {len(sizes)} factors"):
        for size in sizes:
            rows = torch.randn(2 * size, size, dtype=torch.float64, generator=generator)
            torch.linalg.eigh(rows.T @ rows)
    with timed(floor, f"SVD of {len(analysis.sites)} weights"):
        for site in analysis.sites:
            weight = analysis.model.get_submodule(site.name).weight
            torch.linalg.svd(weight.detach().double(), full_matrices=False)

    total, least = sum(meter.seconds.values()), sum(floor.values())
    lines = [
        f"SmolLM2-135M, preset decoder, {len(plan.sites)} sites, "
        f"{options.calibrate * LENGTH:,} calibration tokens, {torch.get_num_threads()} threads.",
        "",
        "| stage | seconds | peak memory, GiB |",
        "|---|---:|---:|",
        *(f"| {name} | {s:.1f} | {meter.peaks[name]:.2f} |" for name, s in meter.seconds.items()),
        f"| **whole** | **{total:.1f}** | **{max(meter.peaks.values()):.2f}** |",
        "",
        "| floor | seconds |",
        "|---|---:|",
        *(f"| {name} | {s:.1f} |" for name, s in floor.items()),
        f"| **whole** | **{least:.1f}** |",
        "",
        f"Ratio of the whole to the floor: **{total / least:.2f}**.",
        "",
    ]
    text = "\n".join(lines)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(text, encoding="utf-8")
    print(f"\n{text}\nwritten to {options.out}")


if __name__ == "__main__":
    main()
