"""Measured times: what is measured, what is interpolated, what is kept, and what comes of it."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.forms import EmbeddingShape, Form, LinearShape, find_form, fit
from fxcompress.operators.modules import shape_of
from fxcompress.pipeline import latency
from fxcompress.pipeline.latency import (
    Table,
    Timing,
    entries_for,
    interpolated,
    rank_grid,
    table_path,
)
from tests.made_up_times import made_up_times

CPU = torch.device("cpu")
LINEAR = LinearShape(64, 48, True, rows=10)


def no_tick() -> None: ...


def test_a_larger_operator_takes_longer(tmp_path: Path) -> None:
    shapes = [LinearShape(n, n, False, rows=256) for n in (64, 512)]
    entries = [Timing((shape,)) for shape in shapes]
    times = Table(None).measure(entries, CPU, no_tick)
    small, large = (times[entry.key] for entry in entries)
    assert 0 < small < large  # 64 times the work


def test_the_operator_that_is_timed_is_the_real_one() -> None:
    """Of a convolution and of bodies: outputs have the size that they have in the model."""
    conv = nn.Conv2d(3, 8, 3, stride=2, padding=1, groups=1)
    shape = latency.replace(shape_of(conv), inputs=((2, 9, 7), (1, 5, 5)))
    module, inputs = latency._built(Timing((shape,)), CPU, torch.Generator())
    assert [tuple(each.shape) for each in inputs] == [(2, 3, 9, 7), (1, 3, 5, 5)]
    assert module(inputs[0]).shape == conv(inputs[0]).shape
    body, _ = latency._built(
        Timing((shape,), find_form("tucker2", "conv2d"), (2, 3)), CPU, torch.Generator()
    )
    (out,) = body(inputs[1])
    assert out.shape == conv(inputs[1]).shape
    joint = Timing((LINEAR, LINEAR), find_form("joint"), 5)
    module, (x,) = latency._built(joint, CPU, torch.Generator())
    assert [tuple(out.shape) for out in module(x)] == [(10, 48), (10, 48)]


def test_keys_tell_apart_what_takes_different_times() -> None:
    conv = shape_of(nn.Conv2d(4, 4, 3))
    low = find_form("low_rank")
    entries = [
        Timing((LINEAR,)),
        Timing((latency.replace(LINEAR, rows=11),)),
        Timing((latency.replace(LINEAR, bias=False),)),
        Timing((latency.replace(LINEAR, dtype=torch.bfloat16),)),
        Timing((LINEAR,), low, 3),
        Timing((LINEAR,), low, 4),
        Timing((LINEAR,), find_form("pivoted"), 3),
        Timing((conv,)),
        Timing((latency.replace(conv, inputs=((1, 5, 5),)),)),
        Timing((latency.replace(conv, stride=(2, 2)),)),
        Timing((latency.replace(conv, groups=2),)),
    ]
    assert len({entry.key for entry in entries}) == len(entries)


def test_times_between_measured_ranks_are_interpolated() -> None:
    ranks = np.arange(1, 42)
    form = find_form("low_rank")
    grid = rank_grid(ranks)
    assert len(grid) == latency.GRID
    assert {1, 41} <= set(grid.tolist())
    times = {
        entry.key: 3.0 + 0.5 * float(str(entry.rank))
        for entry in entries_for(fit(form, (LINEAR,)), ranks)
    }
    np.testing.assert_allclose(
        interpolated(times, fit(form, (LINEAR,)), ranks, ranks), 3 + 0.5 * ranks
    )


def test_pairs_of_ranks_are_interpolated_too() -> None:
    pairs = np.stack(np.meshgrid(np.arange(1, 17), np.arange(2, 33, 2), indexing="ij"), -1)
    pairs = pairs.reshape(-1, 2)
    shape = shape_of(nn.Conv2d(16, 32, 3))
    form = find_form("tucker2", "conv2d")
    times = {}
    for entry in entries_for(fit(form, (shape,)), pairs):
        assert isinstance(entry.rank, tuple)
        first, second = entry.rank
        times[entry.key] = 1.0 + 2 * first + 3 * second + 0.25 * first * second
    found = interpolated(times, fit(form, (shape,)), pairs, pairs)
    a, b = pairs.T
    np.testing.assert_allclose(found, 1 + 2 * a + 3 * b + 0.25 * a * b)  # bilinear: exact


def test_the_table_is_kept_and_nothing_is_measured_twice(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "cache" / "latency.json"
    entry = Timing((LINEAR,))
    first = Table(path).measure([entry], CPU, no_tick)[entry.key]
    assert json.loads(path.read_text())[latency.machine(CPU)][entry.key] == first
    monkeypatch.setattr(latency, "_measured", None)
    assert Table(path).measure([entry], CPU, no_tick)[entry.key] == first
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)  # another machine, as far as times go
        with pytest.raises(TypeError):
            Table(path).measure([entry], CPU, no_tick)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("text", ["", "{", "[1]", "null", "\x00"])
def test_a_table_that_cannot_be_read_is_measured_again(text: str, tmp_path: Path) -> None:
    path = tmp_path / "latency.json"
    path.write_text(text)
    entry = Timing((LINEAR,))
    assert Table(path).measure([entry], CPU, no_tick)[entry.key] > 0
    assert latency.machine(CPU) in json.loads(path.read_text())


def test_where_it_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert table_path() == tmp_path / "fxcompress" / "latency.json"


def test_times_that_are_none_are_measured_again(tmp_path: Path) -> None:
    path, entry = tmp_path / "latency.json", Timing((LINEAR,))
    for wrong in (float("nan"), float("inf"), -1.0, 0.0, "fast", None, True):
        path.write_text(json.dumps({latency.machine(CPU): {entry.key: wrong}}))
        assert 0 < Table(path).measure([entry], CPU, no_tick)[entry.key] < 1


def test_measuring_draws_no_random_numbers_of_the_user() -> None:
    before = torch.get_rng_state()
    table = EmbeddingShape(50, 8, torch.float32, CPU, None, False, False, None, rows=4)
    conv = latency.replace(shape_of(nn.Conv2d(3, 8, 3)), inputs=((2, 9, 7),))
    entries = [Timing((LINEAR,)), Timing((LINEAR,), find_form("low_rank"), 4)]
    torch.set_rng_state(before)
    Table(None).measure([*entries, Timing((table,)), Timing((conv,))], CPU, no_tick)
    assert torch.equal(torch.get_rng_state(), before)


# ---- in the compiler ------------------------------------------------------------------

RULES = """
version: 1
budget: {keep: 0.7, unit: latency}
rules:
  - id: all
    match: {node: {op: linear}}
    rewrite: {any_of: [low_rank, pivoted]}
"""


class Slow(Form):
    """Few parameters, and slower than the layer it replaces."""


@pytest.fixture
def made_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    return made_up_times(monkeypatch, tmp_path)


def network() -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 2048), nn.ReLU(), nn.Linear(2048, 64), nn.Linear(64, 8))
    return model, [torch.randn(500, 64) for _ in range(2)]


def test_a_budget_of_time(made_up: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    model, batches = network()
    small = fxcompress.compile(model, path, batches)
    plan = fxcompress.plan_of(small)
    wide, back, head = plan.sites
    dense = sum(1 + 1e-6 * 500 * n for n in (64 * 2048, 64 * 2048, 64 * 8))
    assert plan.budget.dense == pytest.approx(dense)
    assert plan.budget.cost <= 0.7 * dense
    assert plan.budget.unit == "latency"
    # The head is too small to be worth another call, whatever it would save in parameters.
    assert head.form is None
    assert {wide.form, back.form} <= {"low_rank", None}
    assert any(site.form for site in (wide, back))
    assert wide.seconds is not None
    assert wide.seconds[0] == pytest.approx(1 + 1e-6 * 500 * 64 * 2048)
    assert plan.budget.cost == pytest.approx(sum(site.seconds[1] for site in plan.sites))
    text = str(fxcompress.diff(model, small))
    assert "keep 0.7 of the matched operators' measured time" in text
    assert " ms" in text


def test_measured_once_for_two_runs(made_up: list[str], tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    model, batches = network()
    first = fxcompress.plan(model, path, batches)
    count = len(made_up)
    assert count
    assert fxcompress.plan(model, path, batches).sites == first.sites
    assert len(made_up) == count


def test_a_cache_that_cannot_be_written_is_told_about(
    made_up: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After all the measuring; a file stands where the directory should be."""
    path, file = tmp_path / "rules.yaml", tmp_path / "file"
    path.write_text(RULES)
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    model, batches = network()
    with pytest.warns(fxcompress.FxcompressWarning, match="could not be kept in .*XDG_CACHE_HOME"):
        small = fxcompress.compile(model, path, batches)
    assert fxcompress.plan_of(small).rewritten


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(path: Path) -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "expanduser", nobody)
    assert table_path() is None


def test_a_real_clock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was planned to be faster is faster; tried again where the machine is busy."""
    path = tmp_path / "rules.yaml"
    path.write_text(RULES)
    torch.manual_seed(0)
    for attempt in range(4):
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / str(attempt)))
        dense, small = race(path)
        if small < dense:
            return
    raise AssertionError(f"{small} seconds after, {dense} before")


def race(path: Path) -> tuple[float, float]:
    """Least times of a model and of what becomes of it under a budget of time."""
    model = nn.Sequential(nn.Linear(768, 768), nn.ReLU(), nn.Linear(768, 768)).eval()
    batches = [torch.randn(256, 768)]
    small = fxcompress.compile(model, path, batches)
    plan = fxcompress.plan_of(small)
    assert plan.rewritten
    least = {"dense": float("inf"), "small": float("inf")}
    with torch.inference_mode():
        for _ in range(30):
            for name, each in (("dense", model), ("small", small)):
                start = time.perf_counter()
                each(batches[0])
                least[name] = min(least[name], time.perf_counter() - start)
    return least["dense"], least["small"]
