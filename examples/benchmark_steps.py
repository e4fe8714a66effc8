"""What the linear algebra of one thresholding costs on SmolLM2's shapes, beside full SVDs.

    $ python examples/benchmark_steps.py       # prints; writes examples/results/steps.md

The weights of a transformer block, synthetic (their spectra fall like those of the real ones in the
metric: a power law), were cut to the ranks of a budget and then moved a little, as gradient
steps do.  Three ways to find what is to be kept now:

full SVD    whiten, ``torch.linalg.svd`` in float64, truncate: the textbook step
eigh        what ``compile`` does: whiten, ``eigh`` of the smaller Gram matrix in float64
warm        what ISVT does between: subspace iteration from the last singular vectors, in float32,
            with the certificate

All three include whitening and the new weight; they are timed by turns, in the same process.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from fxcompress.metric import Kronecker
from fxcompress.metric.warm import Partial
from fxcompress.metric.whiten import Whitener, whitener

RESULTS = Path(__file__).parent / "results"
SHAPES = {  # of one block: how many, (m, n), rank at keep 0.6
    "q, o": (2, (576, 576), 170),
    "k, v": (2, (192, 576), 90),
    "gate, up": (2, (1536, 576), 250),
    "down": (1, (576, 1536), 250),
}
REPEATS = 15


def problem(m: int, n: int, rank: int) -> tuple[Tensor, Kronecker, Tensor]:
    """A weight that moved a little since it had that rank, its metric, and where to start."""
    generator = torch.Generator().manual_seed(m + n)

    def factor(size: int) -> Tensor:
        rows = torch.randn(4 * size, size, generator=generator, dtype=torch.float64)
        scales = torch.arange(1, size + 1, dtype=torch.float64) ** -0.75
        turn = torch.linalg.qr(torch.randn(size, size, generator=generator).double()).Q
        return (turn * scales) @ (rows.T @ rows / len(rows)) @ (turn * scales).T

    metric = Kronecker(whitener(factor(n), 1e-3), whitener(factor(m), 1e-1))
    dense = torch.randn(m, n, generator=generator) / n**0.5
    spectrum = metric.truncations(dense, "matrix")
    left, right = spectrum.factors(rank)
    cut = left @ right
    moved = cut + 0.01 * cut.std() * torch.randn(m, n, generator=generator)
    basis = metric.start(spectrum, rank)
    assert basis is not None
    return moved, metric, basis


def full(weight: Tensor, metric: Kronecker, rank: int) -> Tensor:
    """By an SVD of the whitened weight."""
    assert metric.inputs.lower is not None
    assert isinstance(metric.outputs, Whitener)
    assert metric.outputs.lower is not None
    s = metric.outputs.lower.T @ weight.double() @ metric.inputs.lower
    u, sigma, v = torch.linalg.svd(s, full_matrices=False)
    left = metric.outputs.out_of(u[:, :rank] * sigma[:rank])
    return left @ metric.inputs.out_of(v[:rank].T).T


def by_eigh(weight: Tensor, metric: Kronecker, rank: int) -> Tensor:
    """As ``compile``."""
    left, right = metric.truncations(weight, "matrix").factors(rank)
    return left @ right


def warm(weight: Tensor, metric: Kronecker, rank: int, basis: Tensor) -> Tensor:
    """As ISVT, certificate included."""
    found = metric.starting_from(basis, 1).truncations(weight, "matrix")
    left, right = found.factors(rank)
    return left @ right


def timed(run: Callable[[], Tensor]) -> float:
    """Seconds of one call."""
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def main() -> None:
    """Time all shapes, and write the table."""
    lines = [
        f"One thresholding of a block of SmolLM2-135M, {torch.get_num_threads()} threads, "
        f"median of {REPEATS}, milliseconds; the ratio is warm to full SVD. The last columns "
        "say how much more the warm step loses than the best one, and its certificate: the largest "
        "singular value that may have been missed, relative to the smallest that is kept.",
        "",
        "| weights | shape | rank | full SVD | eigh | warm | ratio | lost more | missed |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    sums = [0.0, 0.0, 0.0]
    for name, (count, (m, n), rank) in SHAPES.items():
        weight, metric, basis = problem(m, n, rank)
        runs = (
            partial(full, weight, metric, rank),
            partial(by_eigh, weight, metric, rank),
            partial(warm, weight, metric, rank, basis),
        )
        for run in runs:
            run()
        rounds = [[timed(run) for run in runs] for _ in range(REPEATS)]
        times = [statistics.median(each) for each in zip(*rounds, strict=True)]
        sums = [a + count * b for a, b in zip(sums, times, strict=True)]
        best, found = (metric.loss(run().double() - weight.double()) for run in (runs[0], runs[2]))
        some = metric.starting_from(basis, 1).truncations(weight, "matrix")
        assert isinstance(some, Partial)
        missed = float(some.found.bounds(rank + 1)[rank] / some.sigma[rank - 1])
        cells = [f"{1e3 * each:.0f}" for each in times]
        lines.append(
            f"| {count} x {name} | {m} x {n} | {rank} | {' | '.join(cells)} | "
            f"{times[2] / times[0]:.2f} | {found / best - 1:.1e} | {missed:.3f} |"
        )
        print(lines[-1], flush=True)
    cells = [f"{1e3 * each:.0f}" for each in sums]
    lines.append(f"| the block | | | {' | '.join(cells)} | **{sums[2] / sums[0]:.2f}** | | |")
    lines.append("")
    text = "\n".join(lines)
    print(text)
    (RESULTS / "steps.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
