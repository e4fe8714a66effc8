"""Whether fewer multiply-accumulates are less time: a language model, single layers, convolutions.

    python examples/benchmark_latency.py      # writes examples/results/latency.md

Times are relative: dense and compressed models take turns in one process, and the figure is the
median of the quotients of neighbours (dense / compressed).  The ideal is the quotient of their
multiply-accumulates, counted as they run, attention and the head among them.  Calibration only
decides ranks here, so that a short one will do; models that were saved can be given instead.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import fashion
import torch
from smollm2 import CALIBRATION, batches, load_model, sequences
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

import fxcompress
from fxcompress.forms import Form, LinearShape, find_form
from fxcompress.pipeline.analysis import analyse
from fxcompress.pipeline.build import rewrite
from fxcompress.pipeline.latency import machine, now
from fxcompress.pipeline.request import Request
from fxcompress.progress import stages
from fxcompress.rules import RuleSet, read_rules, with_budget

RESULTS = Path(__file__).parent / "results" / "latency.md"
TYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
CPU = torch.device("cpu")
PROMPT = 128
"""Tokens in the cache before the first one is decoded."""

SHAPES = (
    (1536, 576),
    (576, 1536),
    (576, 576),
    (2048, 2048),
    (8192, 2048),
    (2048, 8192),
    (4096, 4096),
)
"""Outputs and inputs of single layers."""

ROWS = (1024, 1)
"""Rows of their inputs."""


@dataclass(frozen=True)
class Speed:
    """How much faster something is than its dense counterpart.

    Attributes:
        ratio: time of the dense one over its own.
        ideal: multiply-accumulates of the dense one over its own.
    """

    ratio: float
    ideal: float

    def __str__(self) -> str:
        """``1.42 of 1.46 (97%)``."""
        return f"{self.ratio:.2f} of {self.ideal:.2f} ({self.ratio / self.ideal:.0%})"


def ratios(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device = CPU
) -> dict[str, float]:
    """Time of the first of some runs over that of each, taken in turns: medians of quotients."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for run in runs.values():
        run()
    for _ in range(rounds):
        seconds = {}
        for name, run in runs.items():
            begin = now(device)
            run()
            seconds[name] = now(device) - begin
        first = next(iter(seconds.values()))
        for name, mine in seconds.items():
            found[name].append(first / mine)
    return {name: statistics.median(each) for name, each in found.items()}


def macs(run: Callable[[], Any]) -> int:
    """Multiply-accumulates of one run."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() // 2


def speeds(
    runs: Mapping[str, Callable[[], Any]], rounds: int, device: torch.device = CPU
) -> dict[str, Speed]:
    """How all but the first of some runs compare with that one."""
    counts = {name: macs(run) for name, run in runs.items()}
    (first, dense), *_ = counts.items()
    taken = ratios(runs, rounds, device)
    return {name: Speed(taken[name], dense / counts[name]) for name in runs if name != first}


# ---- the language model ---------------------------------------------------------------


def compressed(model: nn.Module, tokenizer: Any, given: argparse.Namespace) -> dict[str, nn.Module]:
    """The model by what is kept of it: from one calibration, or as it was saved."""
    if given.saved:
        found = {}
        for path in given.saved:
            small = fxcompress.load(path)
            found[f"keep {fxcompress.plan_of(small).budget.keep:g}"] = small
        return found
    rules = read_rules(given.rules)
    data = batches(sequences(tokenizer, CALIBRATION, given.calibrate))
    with stages(True) as show:
        analysis = analyse(model, rules, Request(show, data))
    found = {}
    for keep in given.keeps:
        with stages(False) as silent:
            found[f"keep {keep:g}"], _ = rewrite(
                model, replace(analysis.showing(silent), rules=with_budget(rules, keep))
            )
    return found


@torch.no_grad()
def prefill(model: nn.Module, tokens: Tensor) -> None:
    """One forward pass over a prompt."""
    model(input_ids=tokens, use_cache=False)


class Decoding:
    """A model that decodes one token after the other; calling it takes a step."""

    @torch.no_grad()
    def __init__(self, model: nn.Module, tokens: Tensor) -> None:
        self.model, self.tokens = model, tokens
        self.cache = DynamicCache()
        model(input_ids=tokens[:1, :PROMPT], past_key_values=self.cache, use_cache=True)

    @torch.no_grad()
    def __call__(self) -> None:
        at = self.cache.get_seq_length() % self.tokens.shape[1]
        token = self.tokens[:1, at : at + 1]
        self.model(input_ids=token, past_key_values=self.cache, use_cache=True)


def language_model(given: argparse.Namespace) -> list[str]:
    """Rows of the table of SmolLM2."""
    model, tokenizer = load_model()
    smalls = compressed(model, tokenizer, given)
    tokens = sequences(tokenizer, CALIBRATION, given.calibrate + 2)[-2:]
    lines = [
        "| type | how | work | " + " | ".join(smalls) + " |",
        "|---|---|---|" + "---|" * len(smalls),
    ]
    for word in given.types:
        models = {
            name: copy.deepcopy(each).to(TYPES[word])
            for name, each in {"dense": model, **smalls}.items()
        }
        runs = {
            "prefill, 2 x 512 tokens": {
                name: partial(prefill, each, tokens) for name, each in models.items()
            },
            "decoding with a cache": {
                name: Decoding(each, tokens) for name, each in models.items()
            },
        }
        for work, each in runs.items():
            count = given.rounds if work.startswith("prefill") else 8 * given.rounds
            lines.append(_row([word, "eager", work], speeds(each, count)))
        if given.compile:
            whole = next(iter(runs.values()))
            counts = {name: macs(run) for name, run in whole.items()}
            made = {name: torch.compile(each) for name, each in models.items()}
            taken = ratios(
                {name: partial(prefill, each, tokens) for name, each in made.items()}, given.rounds
            )
            found = {n: Speed(taken[n], counts["dense"] / counts[n]) for n in smalls}
            lines.append(_row([word, "torch.compile", "prefill, 2 x 512 tokens"], found))
    return lines


def _row(words: Sequence[str], found: Mapping[str, Speed]) -> str:
    line = "| " + " | ".join([*words, *map(str, found.values())]) + " |"
    print(line, flush=True)
    return line


# ---- single layers --------------------------------------------------------------------


def rank_for(form: Form, shape: LinearShape, keep: float) -> int:
    """The largest rank, a multiple of 8, with at most this share of the weights."""
    import numpy as np

    ranks = np.arange(8, shape.full_rank + 1, 8)
    fitting = ranks[form.parameters(shape, ranks) <= keep * shape.weights]
    return int(fitting[-1])


@torch.no_grad()
def layer(form: Form, shape: LinearShape, rank: int) -> nn.Module:
    """A body for a random weight of some rank."""
    numbers = torch.Generator().manual_seed(0)
    left, right = (
        torch.randn(size, generator=numbers, dtype=torch.float64) / rank**0.5
        for size in ((shape.out_features, rank), (rank, shape.in_features))
    )
    body = form.empty(shape, rank)
    form.fill(body, (left, right), None)
    return body


@torch.no_grad()
def single_layers(given: argparse.Namespace) -> list[str]:
    """Rows of the table of single layers."""
    titles = [
        f"`{form}`, keep {keep:g}" for keep in given.keeps for form in ("pivoted", "low_rank")
    ]
    lines = [
        "| type | rows | layer | " + " | ".join(titles) + " |",
        "|---|---:|---|" + "---|" * len(titles),
    ]
    for word in given.types:
        for m, n in SHAPES:
            shape = LinearShape(n, m, False, TYPES[word])
            bodies: dict[str, nn.Module] = {"dense": shape.bare()}
            bodies["dense"].weight.normal_()  # type: ignore[operator, union-attr]
            for keep in given.keeps:
                for name in ("pivoted", "low_rank"):
                    form = find_form(name)
                    assert isinstance(form, Form)
                    body = layer(form, shape, rank_for(form, shape, keep))
                    bodies[f"`{name}`, keep {keep:g}"] = body
            for rows in ROWS:
                x = torch.randn(1, rows, n).to(TYPES[word])
                runs = {name: partial(body, x) for name, body in bodies.items()}
                count = given.rounds if rows > 1 else 20 * given.rounds
                lines.append(_row([word, str(rows), f"{n} → {m}"], speeds(runs, count)))
    return lines


# ---- a convolution network ------------------------------------------------------------


CHANNELS = ((16, 32, 64), (64, 128, 256))
"""Of the three stages of the network."""

FORMATS = {"channels first": torch.contiguous_format, "channels last": torch.channels_last}


@torch.no_grad()
def convolutions(given: argparse.Namespace) -> list[str]:
    """Rows of the table of the network of ``examples/fashion.py``, with weights drawn at random."""
    multiples = {"any widths": 1, "widths in multiples of 16": 16}
    lines = [f"| channels | memory format | {' | '.join(multiples)} |", "|---|---|---|---|"]
    for channels in CHANNELS:
        for name, order in FORMATS.items():
            model = fashion.ResNet(channels).eval().to(memory_format=order)
            images = torch.randn(256, 1, 28, 28).to(memory_format=order)
            runs = {"dense": partial(model, images)}
            for told, multiple in multiples.items():
                small = fxcompress.compile(
                    model, halved(multiple), images.split(64), progress=False
                )
                runs[told] = partial(small, images)
            widths = ", ".join(map(str, channels))
            lines.append(_row([widths, name], speeds(runs, given.rounds)))
    return lines


def halved(multiple: int) -> RuleSet:
    """The preset for convolutions at half the multiply-accumulates."""
    plain = with_budget(read_rules("convolutional"), 0.5, "macs").rules.model_dump(
        mode="json", by_alias=True, exclude_defaults=True
    )
    plain["defaults"]["multiple_of"] = multiple
    return RuleSet.model_validate(plain)


def main() -> None:
    """Measure all tables, and write them down."""
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--keeps", type=float, nargs="+", default=[0.8, 0.6])
    options.add_argument("--types", nargs="+", choices=TYPES, default=[*TYPES])
    options.add_argument("--rules", default="decoder", help="rule file or preset")
    options.add_argument("--calibrate", type=int, default=16, help="sequences of 512 tokens")
    options.add_argument("--saved", type=Path, nargs="+", help="models saved by fxcompress instead")
    options.add_argument("--compile", action="store_true", help="time torch.compile, too")
    options.add_argument("--threads", type=int, default=2)
    options.add_argument("--rounds", type=int, default=15)
    options.add_argument("--tables", nargs="+", choices=TABLES, default=[*TABLES])
    options.add_argument("--out", type=Path, default=RESULTS)
    given = options.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    warnings.simplefilter("ignore")
    text = [
        "# How much faster",
        "",
        "Time of the dense model or layer over that of the compressed one; beside it the ideal, "
        "the quotient of their multiply-accumulates, and the share of it that is reached. "
        f"{machine(torch.device('cpu'))}. `python examples/benchmark_latency.py`.",
    ]
    for name in given.tables:
        text += ["", f"## {name[0].upper()}{name[1:].replace('-', ' ')}", "", *TABLES[name](given)]
        given.out.write_text("\n".join([*text, ""]), encoding="utf-8")


TABLES: Mapping[str, Callable[[argparse.Namespace], list[str]]] = {
    "language-model": language_model,
    "single-layers": single_layers,
    "convolution-network": convolutions,
}

if __name__ == "__main__":
    main()
