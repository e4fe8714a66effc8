"""Processes of ``torch.distributed`` that compress one model together, by two of them (gloo)."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

import fxcompress
from fxcompress import collective
from fxcompress.collective import ALONE, Processes, fingerprint, joined
from fxcompress.metric.blocks import Blocks
from fxcompress.metric.grams import WIDE, CountSum, GramSum, RowSum, reduce_grams
from fxcompress.pipeline.data import Data, dealt
from fxcompress.pipeline.held_back import Division
from tests.small import data, net, rules

CPU = torch.device("cpu")

needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="starts processes by fork")


def both(work: Callable[[int], Any], folder: Path) -> list[Any]:
    """What a function returns, or the text of its error, in two processes at the same time."""
    children = []
    for rank in range(2):
        child = os.fork()
        if not child:
            try:
                place = f"file://{folder / 'store'}"
                dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
                torch.save(work(rank), folder / f"out{rank}")
            except BaseException as error:
                torch.save(f"{type(error).__name__}: {error}", folder / f"out{rank}")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [torch.load(folder / f"out{rank}") for rank in range(2)]


def compressed(batches: Any, *, model: nn.Module | None = None, **words: Any) -> Any:
    """The plan, without what depends on the clock, and the bits of the weights."""
    settings = {"metric": {"kind": "kfac", "held_back": 0.25}} | words.pop("rules", {})
    small = fxcompress.compile(
        model or net(), rules(0.5, **settings), batches, progress=False, **words
    )
    plan = fxcompress.plan_of(small).model_copy(update={"seconds": {}, "speed": None})
    return plan.model_dump(mode="json"), fingerprint(small)


def require_close(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Require the same plan, its floats up to what sums of products in float32 are rounded to."""
    del found["calibration"]["processes"]
    mine, shape = tree_flatten(found)
    others, same = tree_flatten(wanted)
    assert shape == same
    for one, other in zip(mine, others, strict=True):
        assert one == (pytest.approx(other, rel=1e-4) if isinstance(other, float) else other)


# ---- the same as one process -----------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("kind", ["kfac", "ekfac"])
def test_two_processes_find_what_one_does(kind: str, tmp_path: Path) -> None:
    every = data(9)  # five and four
    metric = {"rules": {"metric": {"kind": kind, "held_back": 0.25}}}
    one, other = both(lambda rank: compressed(every[rank::2], **metric), tmp_path)
    assert not isinstance(one, str), one
    assert one == other  # bit for bit
    assert one[0]["calibration"]["processes"] == "2, each with its own batches"
    require_close(one[0], compressed(every, **metric)[0])


@needs_fork
def test_two_processes_go_block_by_block(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    layers = (nn.Sequential(nn.Linear(24, 24), nn.Tanh()) for _ in range(6))
    model, ran = nn.Sequential(*layers, nn.Linear(24, 8)), []
    run = Blocks.run

    def seen(self: Blocks, section: Any, *words: Any) -> Any:
        ran.append(section.block)
        return run(self, section, *words)

    monkeypatch.setattr(Blocks, "run", seen)

    def work(rank: int) -> Any:
        found = compressed(data(7)[rank::2], model=model, memory=60_000)
        return found, ran

    one, other = both(work, tmp_path)
    assert not isinstance(one, str), one
    assert one == other
    assert len({*one[1]}) > 1
    require_close(one[0][0], compressed(data(7), model=model)[0])


@needs_fork
def test_the_same_batches_count_once(tmp_path: Path) -> None:
    one, other = both(lambda rank: compressed(data(6)), tmp_path)
    assert not isinstance(one, str), one
    assert one == other
    assert one[0]["calibration"]["processes"] == "2, given the same batches"
    require_close(one[0], compressed(data(6))[0])


@needs_fork
def test_a_process_without_data(tmp_path: Path) -> None:
    one, other = both(lambda rank: compressed(data(5) if rank else []), tmp_path)
    assert not isinstance(one, str), one
    assert one == other
    require_close(one[0], compressed(data(5))[0])


@needs_fork
def test_one_process_may_work_by_itself(tmp_path: Path) -> None:
    one, other = both(lambda rank: None if rank else compressed(data(4), alone=True), tmp_path)
    assert one == compressed(data(4))
    assert other is None


# ---- errors ----------------------------------------------------------------------------


@needs_fork
def test_an_error_in_one_process_ends_all(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        batches = data(3, seed=rank)
        if rank:
            batches[1] = torch.full_like(batches[1], torch.nan)
        return compressed(batches)

    one, other = both(work, tmp_path)
    assert other.startswith("CalibrationError: input of up has NaN")
    assert "calibration batch 3" in other  # the second of the second process
    assert one.startswith("ProcessError: another process of torch.distributed stopped\nprocess 1:")
    assert other in one


@needs_fork
def test_a_process_that_dies_ends_the_others(tmp_path: Path) -> None:
    class Deadly(list[Tensor]):
        def __iter__(self) -> Any:
            os._exit(0)

    torch.save("dead", tmp_path / "out1")
    one, other = both(lambda rank: compressed(Deadly() if rank else data()), tmp_path)
    assert other == "dead"
    assert one.startswith("ProcessError: a process of torch.distributed does not answer")


@needs_fork
def test_other_weights_are_told(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        model = net()
        with torch.no_grad():
            model.up.weight[0, 0] += 1e-3 * rank
        return compressed(data(seed=rank), model=model)

    for found in both(work, tmp_path):
        assert found.startswith("ProcessError: processes 0 and 1 of torch.distributed differ")


@needs_fork
def test_nobody_waits_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(collective, "PATIENCE", 0.5)
    one, other = both(lambda rank: None if rank else compressed(data()), tmp_path)
    assert "waits for 1" in one
    assert "alone=True" in one
    assert other is None


# ---- parts -----------------------------------------------------------------------------


@needs_fork
@pytest.mark.parametrize("rows", [(3, 2), (3, WIDE // 4), (WIDE // 4 + 1, 0)])
def test_sums_of_rows(rows: tuple[int, int], tmp_path: Path) -> None:
    """Few rows stay rows, many become a product, and powers of two do not matter."""
    generator = torch.Generator().manual_seed(0)
    # Small integers times powers of two: all sums are exact.
    x = torch.randint(-3, 4, (sum(rows), WIDE), generator=generator).float()
    parts = x.split(rows)

    def work(rank: int) -> Any:
        sums = [RowSum(WIDE, CPU), GramSum(8, CPU), CountSum(8, CPU)]
        row, gram, count = sums
        row.add(parts[rank], 2 - rank)
        gram.add(parts[rank][:, :8] * 2.0 ** (-100 * (1 - rank)))
        count.add(torch.arange(rank, 8))
        with joined(False) as processes:
            reduce_grams(sums, processes)
        found = row.finish(1)
        few = len(found) < WIDE
        product = found.T[:8] @ found[:, :8] if few else found[:8, :8].clone()
        return few, product, gram.finish(1), count.finish(1)

    one, other = both(work, tmp_path)
    assert not isinstance(one, str), one
    first, second = (part[:, :8].double() for part in parts)
    assert one[0] == (sum(rows) <= WIDE // 4)
    assert torch.equal(one[1], 16 * first.T @ first + 4 * second.T @ second)
    small = first * 2.0**-100
    assert torch.equal(one[2], small.T @ small + second.T @ second)
    assert one[3].tolist() == [1.0] + [2.0] * 7
    assert all(map(torch.equal, one[1:], other[1:]))


class Told(Processes):
    """A process that is told what others say."""

    def gathered(self, value: Any) -> list[Any]:
        return [value, *SAID.pop(0)]


SAID: list[list[Any]] = []


def test_batches_are_numbered_in_turns() -> None:
    SAID[:] = [[(1, "x"), (3, "y")], [None, None]]
    _, found = dealt([*"ab"], Told(0, 3))
    # a x0 y0 b y1 y2
    assert (found.places, found.total) == ([0, 3], 6)
    assert found.first(3).places == [0]
    assert [*found.first(3).batches] == ["a"]


def test_what_is_held_back_does_not_depend_on_who_has_it() -> None:
    every = Division(range(16), 16, 0.25, seed=3)
    assert len([*every]) == every.count == 12
    held = []
    for rank in range(3):
        places = range(rank, 16, 3)
        own = Division(places, 16, 0.25, 3, places)
        used = [*own]
        assert own.count == len(used) == len(own.places)
        assert [*used] == own.places
        assert own.held == own.held_places
        held += own.held
    assert sorted(held) == every.held


def test_a_process_by_itself_exchanges_nothing() -> None:
    with joined(False) as processes:
        assert processes is ALONE
    x = torch.ones(2)
    ALONE.sum(x)
    assert x.tolist() == [1, 1]
    assert ALONE.gathered(3) == [3]
    assert Data([1, 2], 2).first(1).total == 1


# ---- the document ----------------------------------------------------------------------


def test_the_script_of_the_document_runs(tmp_path: Path) -> None:
    text = Path(__file__).parent.parent.joinpath("docs", "using.md").read_text(encoding="utf-8")
    section = text.split("## Several processes")[1].split("\n## ")[0]
    script = section.split("```py\n")[1].split("```")[0]
    (tmp_path / "compress.py").write_text(script, encoding="utf-8")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    done = subprocess.run(
        [*command, "--nproc-per-node", "2", "compress.py"], cwd=tmp_path, capture_output=True,
        text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "out" / "plan.json").exists()
