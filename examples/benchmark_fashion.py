"""Accuracy against multiply-accumulates kept, one-shot, beside the algorithms of others.

    $ python examples/benchmark_fashion.py       # writes examples/results/fashion*.md

A network of ResNet type, and one of inverted residuals whose convolutions have a forward of
their own, both trained on Fashion-MNIST (``fashion.py``), are compressed without fine-tuning.
The algorithms of others are for the first one: they know plain convolutions.  Whatever needs data
is given the same 2,048 training images; AIMET's greedy choice needs labels, and gets 2,000 images
of the validation part.  Figures are of the 10,000 test images, and nothing was chosen by one of
them (``--validation`` prints the table for the validation part; on it other dampings, 1e-3 to 1e-2
and 1e-3 to 1e-1, made no difference that counts).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import peers
import torch
from fashion import NETWORKS, Data, Images, accuracy, divergence, load_data, load_model, logits
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import fxcompress
from fxcompress.metric import METRICS
from fxcompress.rules import RuleSet

HERE = Path(__file__).parent
KEEPS = (0.75, 0.5, 0.35, 0.25)
FACTORS = ("channel", "channel_input", "spatial", "tucker2", "pivoted")
"""Forms that put several layers in the place of one."""
CALIBRATION = 2048


@dataclass(frozen=True)
class Row:
    """One method at one budget.

    Attributes:
        method: its name.
        keep: share of the model's MACs that was asked for.
        kept: that was kept.
        lost: accuracy, in points, below the dense model's.
        kl: mean KL to the dense model, nats per image.
        seconds: to compress.
    """

    method: str
    keep: float
    kept: float
    lost: float
    kl: float
    seconds: float


def macs(model: nn.Module, images: Images) -> int:
    """Multiply-accumulates of one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as flops:
        model(images.pixels[:1])
    return flops.get_total_flops() // 2


def rules(metric: str, allocation: str, forms: Sequence[str] | None = None) -> RuleSet:
    """The rules of ``fashion.yaml`` with another metric and allocation, or other forms."""
    plain = fxcompress.rules.load_rules(HERE / "fashion.yaml").rules.model_dump(
        mode="json", by_alias=True, exclude_defaults=True
    )
    plain["metric"] = {"kind": metric}
    plain["solver"] = {"allocation": allocation}
    if forms:
        plain["rules"][0]["rewrite"] = {"any_of": list(forms)}
        if "narrow" not in forms:
            plain["rules"][1]["rewrite"] = {"form": "pivoted"}
    return RuleSet.model_validate(plain)


def main() -> None:
    """Run what was asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--metrics", nargs="*", default=list(METRICS))
    parser.add_argument("--allocations", nargs="+", default=["global", "uniform"])
    parser.add_argument("--no-peers", action="store_true")
    parser.add_argument("--forms", action="store_true", help="one form at a time, too")
    parser.add_argument("--validation", action="store_true", help="figures of the validation part")
    parser.add_argument("--networks", nargs="+", choices=NETWORKS, default=list(NETWORKS))
    parser.add_argument("--out", type=Path, default=HERE / "results")
    given = parser.parse_args()

    data = load_data()
    for network in given.networks:
        table = _measured(network, data, given)
        print("\n" + table)
        if not given.validation:
            name = "fashion.md" if network == "resnet" else f"fashion-{network}.md"
            (given.out / name).write_text(table, encoding="utf-8")


def _measured(network: str, data: Data, given: argparse.Namespace) -> str:
    """The table of one network."""
    model = load_model(data, network)
    shown = data.validation if given.validation else data.test
    batches = data.train.first(CALIBRATION).batches(256)
    dense_logits, dense_macs = logits(model, shown), macs(model, shown)
    dense = accuracy(dense_logits, shown)
    judged = data.validation.first(2000)
    rows: list[Row] = []

    def measure(method: str, keep: float, small: nn.Module, seconds: float) -> None:
        out = logits(small, shown)
        row = Row(
            method, keep, macs(small, shown) / dense_macs,
            100 * (dense - accuracy(out, shown)), divergence(dense_logits, out), seconds,
        )  # fmt: skip
        rows.append(row)
        print(f"{row.method:32} keep {keep:<5g} kept {row.kept:.4f}  accuracy -{row.lost:6.2f}  "
              f"KL {row.kl:.4f}  {seconds:.0f} s", flush=True)  # fmt: skip

    print(f"{network} on {data.name}: dense accuracy {100 * dense:.2f} %, "
          f"{dense_macs:,} MACs an image")  # fmt: skip
    if network == "resnet" and not given.no_peers:
        for name, method in _peers(batches, judged).items():
            for keep in given.keeps:
                start = time.perf_counter()
                try:
                    small = method(model, keep)
                except ValueError as error:
                    print(f"{name}: {error}")
                    continue
                measure(name, keep, small, time.perf_counter() - start)
    jobs = [(f"{m}, {a}", m, a, None) for m in given.metrics for a in given.allocations]
    jobs.append(("kfac, global, without then", "kfac", "global", ("narrow", *FACTORS)))
    jobs.append(("kfac, global, without narrow", "kfac", "global", FACTORS))
    if given.forms:
        single = ("narrow", *FACTORS)
        jobs += [(f"kfac, global, {form} only", "kfac", "global", (form,)) for form in single]
    for name, metric, allocation, forms in jobs:
        name = f"fxcompress {name}"
        _fxcompress(name, model, rules(metric, allocation, forms), batches, given.keeps, measure)
    return _table(rows, given.keeps, f"{data.name}, {network}", dense, dense_macs)


def _peers(
    batches: list[torch.Tensor], judged: Images
) -> dict[str, Callable[[nn.Module, float], nn.Module]]:
    example = batches[0][:1]

    def score(model: nn.Module) -> float:
        return accuracy(logits(model, judged), judged)

    return {
        "plain SVD": partial(_call, peers.plain_svd, example),
        "spatial SVD, greedy (AIMET)": partial(_call, peers.spatial_greedy, example, score),
        "BALF": partial(_call, peers.balf, example, batches),
        "Tucker-2, VBMF": partial(_call, peers.tucker_vbmf, example),
    }


def _call(method: Callable[..., nn.Module], *rest: object) -> nn.Module:
    *more, model, keep = rest
    return method(model, keep, *more)


def _fxcompress(
    name: str,
    model: nn.Module,
    ruleset: RuleSet,
    batches: list[torch.Tensor],
    keeps: Sequence[float],
    measure: Callable[[str, float, nn.Module, float], None],
) -> None:
    """All budgets from one calibration; the first one's time has that in it."""
    start = time.perf_counter()

    def evaluate(small: nn.Module) -> float:
        nonlocal start
        if small is not model:
            keep = fxcompress.plan_of(small).budget.keep
            measure(name, keep, small, time.perf_counter() - start)
            start = time.perf_counter()
        return 0.0

    try:
        fxcompress.sweep(model, ruleset, batches, keeps=keeps, evaluate=evaluate)
    except fxcompress.BudgetError as error:  # a form by itself may save too little
        print(f"{name}: {error}")


def _table(
    rows: Sequence[Row], keeps: Sequence[float], name: str, dense: float, dense_macs: int
) -> str:
    """Accuracy lost and KL for every method and budget."""
    by_place = {(row.method, row.keep): row for row in rows}
    lines = [
        f"# {name}: accuracy lost, in points, against MACs kept",
        "",
        f"Dense: {100 * dense:.2f} %, {dense_macs:,} MACs. One-shot, no fine-tuning; in brackets "
        "the mean KL to the dense model in nats. "
        "`python examples/benchmark_fashion.py` writes this file.",
        "",
        "| method | " + " | ".join(f"{k:g}" for k in keeps) + " |",
        "|---|" + "---|" * len(keeps),
    ]
    for method in dict.fromkeys(row.method for row in rows):
        cells = [_cell(by_place.get((method, keep))) for keep in keeps]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    best = "fxcompress kfac, global"
    others = [row for row in rows if not row.method.startswith("fxcompress")]
    if others and any(row.method == best for row in rows):
        lines.append("")
        for keep in keeps:
            own = by_place.get((best, keep))
            peer = min((r for r in others if r.keep == keep), key=lambda r: r.lost, default=None)
            if own and peer:
                ratio = own.lost / peer.lost if peer.lost > 0 else float("nan")
                lines.append(
                    f"- keep {keep:g}: `{best}` loses {own.lost:.2f} points, the best of the "
                    f"others ({peer.method}) {peer.lost:.2f}: ratio {ratio:.2f}"
                )
    return "\n".join(lines) + "\n"


def _cell(row: Row | None) -> str:
    return "-" if row is None else f"{row.lost:.2f} ({row.kl:.3f})"


if __name__ == "__main__":
    main()
