"""Time, memory and speed on a GPU: Llama shapes of 1B and 8B, and SmolLM2's loss beside the CPU's.

    $ python examples/benchmark_gpu.py                     # prints tables, in some minutes
    $ python examples/benchmark_gpu.py --device cpu --shapes tiny --tokens 1024   # the same code

Models of these shapes have random weights in bfloat16, and data are random tokens: work counts,
and not loss.  Speed is the time of the dense model over that of the compressed one, in turns,
beside the quotient of their multiply-accumulates.  The last table is the real SmolLM2-135M,
compressed on the device and on the CPU.
"""

from __future__ import annotations

import argparse
import time
import warnings
from functools import partial
from typing import Any

import torch
from benchmark_latency import Decoding, Speed, macs, prefill, ratios, speeds
from benchmark_scale import Memory, llama, resident, tokens
from torch import nn

import fxcompress
from fxcompress.metric.memory import in_units
from fxcompress.pipeline.latency import machine

SHAPES: dict[str, dict[str, Any]] = {
    "tiny": {
        "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 2,
        "num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 4096,
    },
    "1b": {
        "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
        "tie_word_embeddings": True,
    },
    "8b": {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    },
}  # fmt: skip


def shape(name: str, device: torch.device, given: argparse.Namespace) -> None:
    """Compress a model of a shape, and time it beside the dense one."""
    with torch.device(device):
        model = llama({**SHAPES[name], "dtype": "bfloat16"})
        data = tokens(SHAPES[name]["vocab_size"], given.tokens)
    cuda = device.type == "cuda"
    memory = Memory(partial(torch.cuda.memory_allocated, device) if cuda else resident)
    memory.start()
    begin = time.perf_counter()
    small = fxcompress.compile(
        model, given.rules, data, keep=given.keep, memory=given.memory, progress=False
    )
    took = time.perf_counter() - begin
    memory.over.set()
    plan = fxcompress.plan_of(small)
    peaks = memory.peaks(begin, plan.seconds)
    print(f"\n## {name}: {plan.model_before.parameters:,} parameters, "
          f"{given.tokens:,} tokens, keep {given.keep:g}: {took:.0f} s")  # fmt: skip
    print("| stage | seconds | peak |\n|---|---:|---:|")
    for stage, seconds in plan.seconds.items():
        print(f"| {stage} | {seconds:.1f} | {in_units(peaks[stage])} |")
    prompt = torch.cat([each["input_ids"] for each in data[:2]])
    models: dict[str, nn.Module] = {"dense": model, "compressed": small}
    print("| work | how | dense / compressed |\n|---|---|---|")
    work = {n: partial(prefill, each, prompt) for n, each in models.items()}
    print(f"| prefill | eager | {speeds(work, given.rounds, device)['compressed']} |", flush=True)
    steps = {n: Decoding(each, prompt) for n, each in models.items()}
    count = 8 * given.rounds
    print(f"| decoding | eager | {speeds(steps, count, device)['compressed']} |", flush=True)
    ideal = macs(work["dense"]) / macs(work["compressed"])
    made = {n: partial(prefill, torch.compile(each), prompt) for n, each in models.items()}
    taken = ratios(made, given.rounds, device)["compressed"]
    print(f"| prefill | torch.compile | {Speed(taken, ideal)} |", flush=True)


def same_loss(device: torch.device, given: argparse.Namespace) -> None:
    """SmolLM2 compressed on the device and on the CPU: held-out KL of both, by the CPU."""
    from smollm2 import CALIBRATION, HELD_OUT, Reference, batches, load_model, sequences

    model, tokenizer = load_model()
    data = batches(sequences(tokenizer, CALIBRATION, given.calibrate))
    reference = Reference(model, sequences(tokenizer, HELD_OUT, given.evaluate))
    print("\n## SmolLM2-135M\n| compressed on | KL, nats per token | perplexity | seconds |")
    print("|---|---:|---:|---:|")
    for place in dict.fromkeys((device, torch.device("cpu"))):
        begin = time.perf_counter()
        moved = [{name: each.to(place) for name, each in batch.items()} for batch in data]
        small = fxcompress.compile(
            model.to(place), given.rules, moved, keep=given.keep, progress=False
        )
        seconds = time.perf_counter() - begin
        found = reference.compare(small.to("cpu"))
        print(f"| {place} | {found.kl:.5f} | {found.perplexity:.3f} | {seconds:.0f} |", flush=True)


def main() -> None:
    """Measure what was asked for, and print it."""
    options = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    options.add_argument("--device", default="cuda")
    options.add_argument("--shapes", nargs="*", choices=SHAPES, default=["1b", "8b"])
    options.add_argument("--rules", default="decoder", help="rule file or preset")
    options.add_argument("--keep", type=float, default=0.8)
    options.add_argument("--tokens", type=int, default=16384, help="of calibration, a shape")
    options.add_argument("--memory", help="limit on memory")
    options.add_argument("--rounds", type=int, default=10)
    options.add_argument("--calibrate", type=int, default=16, help="sequences of 512 for SmolLM2")
    options.add_argument("--evaluate", type=int, default=8)
    options.add_argument("--without-smollm2", action="store_true")
    given = options.parse_args()
    device = torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        options.error("there is no CUDA device here; --device cpu --shapes tiny runs the same code")
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    print(machine(device))
    for name in given.shapes:
        shape(name, device, given)
    if not given.without_smollm2:
        same_loss(device, given)


if __name__ == "__main__":
    main()
