"""Memory and time of a compile within a limit, beside one without, and beside the floor.

    $ python examples/benchmark_scale.py                     # writes examples/results/scale.md
    $ python examples/benchmark_scale.py --cases 208m --limits none 1.2GiB

Models are Llamas with random weights, and data random tokens: what is measured is work, not loss.
Every row is a process of its own.  Peak memory is all that the process had in memory at once, torch
and the model included.  The floor is what cannot be done without: a forward and a backward pass,
and a product of the inputs and one of the output gradients with themselves for every layer.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxcompress
from fxcompress.metric.memory import in_units

RESULTS = Path(__file__).parent / "results" / "scale.md"
CASES: dict[str, dict[str, Any]] = {
    "21m": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 4},
    "38m": {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 8},
    "49m": {"hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 6},
    "52m": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 3},
    "208m": {"hidden_size": 896, "intermediate_size": 4864, "num_hidden_layers": 12,
             "num_attention_heads": 14, "num_key_value_heads": 2, "vocab_size": 32000},
    "1.2b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
             "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
             "dtype": "bfloat16"},
}  # fmt: skip
COMMON = {
    "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 8000,
    "tie_word_embeddings": True, "max_position_embeddings": 2048,
}  # fmt: skip

TOKENS = {"1.2b": 2048}
LENGTH = 256
LIMITS = {"208m": ("none", "1200MiB"), "1.2b": ("5GiB",)}


def build(case: str, layers: int | None) -> tuple[nn.Module, list[Any]]:
    """A model with random weights, and random tokens for it."""
    words = {**COMMON, **CASES[case]}
    if layers is not None:
        words["num_hidden_layers"] = layers
    return llama(words), tokens(words["vocab_size"], TOKENS.get(case, 1024))


def llama(words: Mapping[str, Any]) -> nn.Module:
    """A Llama of a configuration, with random weights on the default device."""
    torch.manual_seed(0)
    words = dict(words)
    dtype = getattr(torch, words.pop("dtype", "float32"))
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return LlamaForCausalLM(LlamaConfig(**words)).eval()
    finally:
        torch.set_default_dtype(before)


def tokens(words: int, count: int) -> list[Any]:
    """Batches of one random sequence each, on the default device."""
    ids = torch.randint(0, words, (count // LENGTH, LENGTH))
    return [{"input_ids": each[None]} for each in ids]


def floor(model: nn.Module, data: list[Any]) -> float:
    """Seconds of what cannot be done without, on one batch, times the number of batches."""
    sums: list[float] = []

    def timed(rows: Tensor) -> None:
        x = rows.detach().reshape(-1, rows.shape[-1]).float()
        begin = time.perf_counter()
        x.T @ x
        sums.append(time.perf_counter() - begin)

    seen: set[int] = set()

    def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
        if id(args[0]) not in seen:
            seen.add(id(args[0]))
            timed(args[0])
        if module is model.get_output_embeddings():  # type: ignore[operator]
            return out
        out.register_hook(timed)  # type: ignore[no-untyped-call]
        return out

    layers = [m for n, m in model.named_modules() if isinstance(m, nn.Linear) and "layers" in n]
    handles = [each.register_forward_hook(hook) for each in layers]
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    embedded = model.get_input_embeddings()(data[0]["input_ids"]).requires_grad_()  # type: ignore[operator]
    begin = time.perf_counter()
    logits = model(inputs_embeds=embedded).logits
    torch.autograd.grad(logits, embedded, torch.randn_like(logits))
    seconds = time.perf_counter() - begin
    for handle in handles:
        handle.remove()
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    return seconds * len(data)


class Memory(threading.Thread):
    """Watches the memory of the process, or of a device.

    Args:
        used: bytes that are in use.
    """

    def __init__(self, used: Callable[[], int]) -> None:
        super().__init__(daemon=True)
        self.used = used
        self.seen: list[tuple[float, int]] = []
        self.over = threading.Event()

    def run(self) -> None:
        """Look a hundred times a second."""
        while not self.over.wait(0.01):
            self.seen.append((time.perf_counter(), self.used()))

    def peaks(self, begin: float, seconds: dict[str, float]) -> dict[str, int]:
        """The most of each stage, by how long they took one after the other."""
        found = {}
        for name, took in seconds.items():
            within = [size for at, size in self.seen if begin <= at <= begin + took]
            found[name] = max(within, default=0)
            begin += took
        return found


def resident() -> int:
    """Bytes that the process has in memory."""
    pages = Path("/proc/self/statm").read_text(encoding="ascii").split()[1]
    return int(pages) * resource.getpagesize()


def one(given: argparse.Namespace) -> None:
    """Compile one model within one limit; what it took as JSON."""
    torch.set_num_threads(given.threads)
    warnings.simplefilter("ignore")
    model, data = build(given.case, given.layers)
    base = resident()
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    limit = "1TiB" if given.limit == "none" else given.limit
    told = fxcompress.forecast(model, given.rules, data, memory=limit)
    memory = Memory(resident)
    memory.start()
    begin = time.perf_counter()
    small = fxcompress.compile(
        model, given.rules, data, keep=0.8, memory=limit, progress=given.verbose or None
    )
    seconds = time.perf_counter() - begin
    memory.over.set()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    plan = fxcompress.plan_of(small)
    found = {
        "parameters": plan.model_before.parameters,
        "size": size,
        "base": base,
        "peak": peak,
        "seconds": seconds,
        "stages": plan.seconds,
        "peaks": memory.peaks(begin, plan.seconds),
        "forecast": {stage.name: stage.memory for stage in told.stages},
        "ranks": [[site.name, site.form, site.rank] for site in plan.sites],
    }
    if given.save:
        with tempfile.TemporaryDirectory() as folder:
            fxcompress.save(small, folder)
            del small
            loaded = fxcompress.load(folder)
            with torch.no_grad():
                logits = loaded(**data[0]).logits
            found["runs"] = bool(logits.isfinite().all())
            found["saved peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    found["floor"] = floor(model, data)
    print(json.dumps(found))


def main() -> None:
    """Run what was asked for, and write the table."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--cases", nargs="+", choices=CASES, default=["208m", "1.2b"])
    options.add_argument("--limits", nargs="+", help="of memory, for every case; none for no limit")
    options.add_argument("--rules", default="decoder", help="rule file or preset")
    options.add_argument("--layers", type=int, help="instead of those of the case")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--out", type=Path, default=RESULTS)
    options.add_argument("--case", choices=CASES, help=argparse.SUPPRESS)
    options.add_argument("--limit", help=argparse.SUPPRESS)
    options.add_argument("--save", action="store_true", help="save, load and run it, too")
    options.add_argument("--verbose", action="store_true", help="show the stages")
    given = options.parse_args()
    if given.case:
        one(given)
        return
    lines = [
        "# Memory and time",
        "",
        "`python examples/benchmark_scale.py`; peak memory of the process, torch and the model "
        "included.",
        "",
        "| model | limit | parameters | model | before | peak | seconds | floor | slowest stages |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for case in given.cases:
        ranks = {}
        for limit in given.limits or LIMITS.get(case, ("none", "300MiB")):
            words = [sys.executable, __file__, "--case", case, "--limit", limit]
            words += ["--rules", given.rules, "--threads", str(given.threads)]
            words += ["--layers", str(given.layers)] if given.layers else []
            words += [each for each in ("--save", "--verbose") if getattr(given, each[2:])]
            run = subprocess.run(words, check=True, stdout=subprocess.PIPE, text=True)
            found = json.loads(run.stdout)
            ranks[limit] = found["ranks"]
            slowest = sorted(found["stages"].items(), key=lambda each: -each[1])[:4]
            lines.append(
                f"| {case} | {limit} | {found['parameters']:,} | {in_units(found['size'])} "
                f"| {in_units(found['base'])} | {in_units(found['peak'])} "
                f"| {found['seconds']:.0f} | {found['floor']:.0f} "
                f"| {', '.join(f'{name} {seconds:.0f} s' for name, seconds in slowest)} |"
            )
            print(lines[-1], {k: v for k, v in found.items() if k in ("runs", "saved peak")})
            for stage, expected in found["forecast"].items():
                measured = found["peaks"].get(stage, 0) - found["base"]
                print(f"  {stage}: {in_units(expected)} foretold, {in_units(measured)} measured")
        same = all(each == next(iter(ranks.values())) for each in ranks.values())
        if len(ranks) > 1:
            lines.append(f"\nRanks of {case}: {'the same' if same else 'different'} in all rows.")
            print(lines[-1])
        given.out.write_text("\n".join([*lines, ""]), encoding="utf-8")


if __name__ == "__main__":
    main()
