"""Compress, then fine-tune: how much accuracy do soft rank constraints save at equal steps?

    $ python examples/finetune_fashion.py        # writes examples/results/finetune.md

The trained network of ``fashion.py`` is brought to a share of its multiply-accumulates and trained
on with labels, for the same number of steps at the same learning rates by every method:

hard        cut at once, one-shot, then all steps on the factors.  In three metrics.
soft ISVT   ``fxcompress.ISVT`` after every step of a first phase, in which ranks fall; then the
            factors.
nuclear     in a first phase the proximal step of the nuclear norm after every optimizer step (soft
            thresholding of singular values, as torchao's prox does it), then a cut in the
            Euclidean metric, and the factors.
LC          learning-compression with learned ranks (Idelbayev and Carreira-Perpinan 2020): in a
            first phase a quadratic penalty to the nearest weights of the budget, found anew every
            few steps, the penalty doubling in between; then a cut to these, and the factors.

Every convolution may take the form ``spatial`` only (``low_rank`` where it has one tap), so that
all methods threshold singular values of the same matrices.  The length of the first phase, the
strength of the nuclear norm and the penalty were chosen on the validation part
(``--validation``) at the smallest size with seed 0; figures are of the test images.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import torch
import torch.nn.functional as F
from benchmark_fashion import macs
from fashion import BATCH, Data, ResNet, _moved, accuracy, load_data, load_model, logits
from torch import Tensor, nn

import fxcompress
from fxcompress.forms.target import arrange
from fxcompress.operators.modules import canonical_weight
from fxcompress.rules import LoadedRules, parse_rules

HERE = Path(__file__).parent
KEEPS = (0.25, 0.15, 0.1)
SEEDS = (0, 1, 2)
STEPS = 200
FIRST = 0.15
"""Share of the steps in the first phase."""
RATE = 0.05
CALIBRATION = 2048


def rules(metric: str, keep: float) -> LoadedRules:
    """Spatial factors under one budget of MACs."""
    return parse_rules(
        f"""
budget: {{keep: {keep}, of: model, unit: macs}}
metric: {{kind: {metric}}}
rules:
  - id: kernels
    match: {{node: {{op: conv2d, kernel_size: [3, 3]}}}}
    rewrite: {{form: spatial}}
  - id: pointwise
    match: {{node: {{op: [conv2d, linear]}}}}
    rewrite: {{form: low_rank}}
""",
        "finetune.yaml",
    )


@dataclass
class Steps:
    """Optimizer steps of one run: the same images in the same order for every method.

    Attributes:
        data: to train on.
        seed: of images and their augmentation.
        total: steps of the run.
        done: steps so far.
    """

    data: Data
    seed: int
    total: int
    done: int = 0

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)
        count = len(self.data.train.labels)
        self.order = torch.randperm(count, generator=self.generator).split(BATCH)

    def run(
        self,
        model: nn.Module,
        count: int,
        penalty: Callable[[], Tensor] | None = None,
        after: Callable[[float], None] = lambda rate: None,
    ) -> None:
        """Train on for some steps.

        Args:
            model: changed.
            count: how many.
            penalty: added to the loss.
            after: called after each step of the optimizer with the learning rate.
        """
        model.train()
        optimizer = torch.optim.SGD(
            model.parameters(), lr=RATE, momentum=0.9, weight_decay=5e-4, nesterov=True
        )
        for _ in range(count):
            rate = RATE * 0.5 * (1 + math.cos(math.pi * self.done / self.total))
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (self.done + 1) / 20)
            places = self.order[self.done % (len(self.order) - 1)]
            x = _moved(self.data.train.pixels[places], self.generator)
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.cross_entropy(model(x), self.data.train.labels[places])
            if penalty is not None:
                loss = loss + penalty()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 5.0)
            optimizer.step()
            self.done += 1
            after(rate)
        model.eval()


Method = Callable[[ResNet, float, Steps], nn.Module]


def hard(metric: str) -> Method:
    """Cut at once."""

    def run(model: ResNet, keep: float, steps: Steps) -> nn.Module:
        batches = steps.data.train.first(CALIBRATION).batches()
        small = fxcompress.compile(model, rules(metric, keep), batches)
        steps.run(small, steps.total)
        return small

    return run


def soft(metric: str, share: float = FIRST) -> Method:
    """Ranks fall while the network learns."""

    def run(model: ResNet, keep: float, steps: Steps) -> nn.Module:
        batches = steps.data.train.first(CALIBRATION).batches()
        first = int(steps.total * share)
        isvt = fxcompress.ISVT(model, rules(metric, keep), batches, steps=first, every=1)
        steps.run(model, first, after=lambda rate: isvt.step())
        small = isvt.finalize()
        steps.run(small, steps.total - first)
        return small

    return run


def matrices(model: nn.Module) -> list[tuple[nn.Module, str]]:
    """Layers that the rules match, with the view that their form truncates."""
    found = []
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            found.append((module, "spatial" if module.kernel_size == (3, 3) else "matrix"))
        elif isinstance(module, nn.Linear):
            found.append((module, "matrix"))
    return found


def nuclear(strength: float, share: float = FIRST) -> Method:
    """Soft thresholding of singular values after every step."""

    @torch.no_grad()
    def shrink(model: nn.Module, amount: float) -> None:
        for module, view in matrices(model):
            weight = canonical_weight(module)
            if isinstance(module, nn.Linear):
                u, s, v = torch.linalg.svd(weight, full_matrices=False)
                weight.copy_((u * (s - amount).clamp_min(0)) @ v)
                continue
            one = weight[0]  # one group
            arranged, _ = arrange(one, view)
            m, c, q = arranged.shape
            flat = arranged.permute(0, 2, 1).reshape(m * q, c)
            u, s, v = torch.linalg.svd(flat, full_matrices=False)
            back = ((u * (s - amount).clamp_min(0)) @ v).reshape(m, q, c).permute(0, 2, 1)
            _restore(one, view, back.reshape(m, c, q))

    def run(model: ResNet, keep: float, steps: Steps) -> nn.Module:
        batches = steps.data.train.first(CALIBRATION).batches()
        first = int(steps.total * share)
        steps.run(model, first, after=lambda rate: shrink(model, strength * rate))
        small = fxcompress.compile(model, rules("euclidean", keep), batches)
        steps.run(small, steps.total - first)
        return small

    return run


def _restore(weight: Tensor, view: str, arranged: Tensor) -> None:
    """Write what ``arrange`` made of a weight (m x n x kernel) back."""
    _, places = arrange(weight, view)
    flat = torch.empty_like(weight).reshape(len(weight), -1)
    flat[:, places] = arranged.reshape(len(weight), -1)
    weight.copy_(flat.reshape(weight.shape))


def lc(penalty: float, growth: float = 2.0, every: int = 5, share: float = FIRST) -> Method:
    """Learning-compression: a quadratic penalty to the nearest weights within the budget."""

    def run(model: ResNet, keep: float, steps: Steps) -> nn.Module:
        batches = steps.data.train.first(CALIBRATION).batches()
        first = int(steps.total * share)
        compress = fxcompress.ISVT(
            model, rules("euclidean", keep), batches, steps=1, every=1, schedule="hard"
        )
        mu = penalty
        for _ in range(first // every):
            nearest = {name: weight.clone() for name, weight in compress.nearest()}
            steps.run(model, every, penalty=partial(_distance, model, nearest, mu))
            mu *= growth
        small = compress.finalize()
        steps.run(small, steps.total - steps.done)
        return small

    return run


def _distance(model: nn.Module, nearest: dict[str, Tensor], mu: float) -> Tensor:
    own = dict(model.named_parameters())
    parts = [(own[name] - to).square().sum() for name, to in nearest.items()]
    return 0.5 * mu * torch.stack(parts).sum()


METHODS: dict[str, Method] = {
    "hard cut, kfac": hard("kfac"),
    "hard cut, activation": hard("activation"),
    "hard cut, euclidean": hard("euclidean"),
    "soft ISVT, kfac": soft("kfac"),
    "soft ISVT, euclidean": soft("euclidean"),
    "nuclear norm": nuclear(0.02),
    "LC": lc(1e-2),
}


def main() -> None:
    """Run what was asked for, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--keeps", type=float, nargs="+", default=KEEPS)
    parser.add_argument("--seeds", type=int, nargs="+", default=SEEDS)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--validation", action="store_true", help="figures of the validation part")
    parser.add_argument("--out", type=Path, default=HERE / "results" / "finetune.md")
    given = parser.parse_args()

    data = load_data()
    dense = load_model(data)
    shown = data.validation if given.validation else data.test
    whole, cost = accuracy(logits(dense, shown), shown), macs(dense, shown)
    print(f"{data.name}: dense accuracy {100 * whole:.2f} %, {cost:,} MACs an image")
    found: dict[tuple[str, float], list[float]] = {}
    kept: dict[tuple[str, float], float] = {}
    for seed in given.seeds:
        for keep in given.keeps:
            for name in given.methods:
                start = time.perf_counter()
                torch.manual_seed(seed)
                small = METHODS[name](load_model(data), keep, Steps(data, seed, given.steps))
                lost = 100 * (whole - accuracy(logits(small, shown), shown))
                found.setdefault((name, keep), []).append(lost)
                kept[name, keep] = macs(small, shown) / cost
                spent = time.perf_counter() - start
                print(
                    f"{name:22} keep {keep:<5g} kept {kept[name, keep]:.4f} seed {seed}  "
                    f"accuracy -{lost:5.2f}  {spent:.0f} s",
                    flush=True,
                )
    title = (
        f"{data.name}, dense {100 * whole:.2f} %, {given.steps} steps of {BATCH} images, "
        f"{len(given.seeds)} seeds"
    )
    text = table(found, kept, given.keeps, title)
    print("\n" + text)
    if not given.validation:
        given.out.write_text(text, encoding="utf-8")


def table(
    found: dict[tuple[str, float], list[float]],
    kept: dict[tuple[str, float], float],
    keeps: Sequence[float],
    title: str,
) -> str:
    """Accuracy lost, mean and standard deviation over seeds."""
    lines = [
        f"{title}; accuracy lost on the images shown, in points (mean ± standard deviation), at a "
        "share of the multiply-accumulates.",
        "",
        "| method | " + " | ".join(f"{keep:g}" for keep in keeps) + " |",
        "|---|" + "---:|" * len(keeps),
    ]
    for name in dict.fromkeys(name for name, _ in found):
        cells = []
        for keep in keeps:
            values = found[name, keep]
            spread = f" ± {stdev(values):.2f}" if len(values) > 1 else ""
            cells.append(f"{mean(values):.2f}{spread}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    most = max(kept[at] / at[1] for at in kept)
    least = min(kept[at] / at[1] for at in kept)
    lines += ["", f"MACs kept: {least:.3f} to {most:.3f} of what was asked for.", ""]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
