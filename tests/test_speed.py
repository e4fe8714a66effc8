"""Forward time before and after: what is timed, that it leaves no trace, and what is said of it.

No clock is read: passes take as long as a test says.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress import FxcompressWarning, plan_of
from fxcompress.graph.inputs import Forward
from fxcompress.pipeline import speed
from fxcompress.pipeline.latency import Timing
from fxcompress.pipeline.request import Request
from fxcompress.pipeline.speed import FEWEST, MOST, batch_of, time_models
from fxcompress.plans.plan import Batch, Plan, Speed
from fxcompress.report.quantities import duration
from fxcompress.report.summary import batch_text, speed_line
from fxcompress.rewrite import Factorized
from fxcompress.rules.matching.folding import fold
from tests.made_up_times import made_up_times
from tests.small import data, net, rules
from tests.test_narrow import data as blocks
from tests.test_narrow import network
from tests.test_narrow_then import rules as narrow_then


class Clock:
    """A clock that a pass moves, by the seconds that its model is said to take.

    Attributes:
        passes: which models ran, in order: whether each was compressed.
    """

    def __init__(self, dense: list[float], compressed: list[float]) -> None:
        self.time = 0.0
        self.passes: list[bool] = []
        self._seconds = {False: iter(dense), True: iter(compressed)}
        self._last = {False: dense[-1], True: compressed[-1]}

    def now(self, *devices: torch.device) -> float:
        return self.time

    def forward(self, model: nn.Module, batch: Any) -> Any:
        compressed = any(isinstance(module, Factorized) for module in model.modules())
        self.passes.append(compressed)
        self.time += next(self._seconds[compressed], self._last[compressed])
        return model(batch)


def timed(
    monkeypatch: pytest.MonkeyPatch,
    dense: list[float],
    compressed: list[float],
    spent: float = 0.0,
) -> tuple[Speed, Clock]:
    """What is found of passes that take so long, after ``spent`` seconds of other stages."""
    small = fxcompress.compile(net(), rules(), data())
    clock = Clock(dense, compressed)
    monkeypatch.setattr(speed, "now", clock.now)
    found = time_models(net(), small, data()[:1], _request(clock.forward, spent))
    assert found is not None
    return found, clock


def _request(forward: Forward, spent: float = 0.0) -> Request:
    show: Any = SimpleNamespace(seconds={"calibrate": spent}, stage=lambda *what: lambda: None)
    return Request(show, forward=forward)


# ---- what is timed --------------------------------------------------------------------


def test_models_take_turns_and_the_first_passes_do_not_count(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found, clock = timed(monkeypatch, [90, 4, 6, 5], [80, 2, 2, 4])
    assert clock.passes == [False, True, *(False, True, True, False, False, True)]
    assert (found.before, found.after, found.pairs) == (5, 2, FEWEST)
    assert found.ratio == 2.5
    assert found.spread == pytest.approx((1.625, 2.5))  # of 4/2, 6/2 and 5/4
    assert (found.device, found.dtype) == ("cpu", "float32")
    assert found.threads == torch.get_num_threads()
    assert "cpu" in found.machine


@pytest.mark.parametrize(
    ("seconds", "spent", "pairs"),
    [(100.0, 1000.0, FEWEST), (1e-6, 1000.0, MOST), (0.1, 1000.0, 14), (0.1, 40.0, 5)],
)
def test_slow_models_are_run_less_often(
    monkeypatch: pytest.MonkeyPatch, seconds: float, spent: float, pairs: int
) -> None:
    """At most 3 seconds, and 3 % of what went before, but three pairs."""
    found, _ = timed(monkeypatch, [seconds], [seconds], spent)
    assert abs(found.pairs - pairs) <= (1 if FEWEST < pairs < MOST else 0)


def test_processes_run_equally_often(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "several", lambda: True)
    assert timed(monkeypatch, [1e-6], [1e-6], 1000.0)[0].pairs == FEWEST


def test_slower_is_beyond_the_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    assert timed(monkeypatch, [1, 1, 1, 1], [1, 1.1, 1.2, 1.3])[0].slower
    assert not timed(monkeypatch, [1, 1, 1, 1], [1, 1.01, 1.02, 1.02])[0].slower  # too little
    assert not timed(monkeypatch, [1, 1, 1, 2], [1, 1.1, 1.1, 1.0])[0].slower  # too unsure
    assert not timed(monkeypatch, [1, 1, 1, 1], [1, 0.5, 0.5, 0.5])[0].slower


def test_what_would_be_warned_of_is_looked_at_for_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    found, _ = timed(monkeypatch, [0.1], [0.1, 0.2, 0.2, 0.2, 0.2, 0.1], spent=0.0)
    assert not found.slower
    assert found.pairs > FEWEST
    assert timed(monkeypatch, [0.1], [0.1], spent=0.0)[0].pairs == FEWEST
    assert timed(monkeypatch, [100.0], [200.0], spent=0.0)[0].pairs == FEWEST


def test_all_recorded_batches_are_one_pass() -> None:
    seen: list[int] = []

    def forward(model: nn.Module, batch: Tensor) -> Tensor:
        seen.append(len(batch))
        out: Tensor = model(batch)
        return out

    small = fxcompress.compile(net(), rules(), data())
    time_models(net(), small, [torch.zeros(2, 24), torch.zeros(5, 24)], _request(forward))
    assert seen == [2, 5] * 2 * (1 + FEWEST)


# ---- no trace -------------------------------------------------------------------------


class Stateful(nn.Module):
    """Normalizes a batch, drops values, counts its calls, and keeps what it computed last."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 48)
        self.norm = nn.BatchNorm1d(48)
        self.drop = nn.Dropout(0.5)
        self.head = nn.Linear(48, 10)
        self.register_buffer("calls", torch.zeros(()))
        self.last: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.last = self.drop(self.norm(self.fc(x)))
        x.mul_(0.5)  # a model that writes to its input
        return self.head(self.last)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("inplace", [False, True])
def test_nothing_is_changed(monkeypatch: pytest.MonkeyPatch, training: bool, inplace: bool) -> None:
    """Whatever is left behind, timing leaves nothing more behind."""

    def run() -> tuple[Any, ...]:
        torch.manual_seed(3)
        model = Stateful().train(training)
        batches = data()
        small = fxcompress.compile(model, rules(), batches, inplace=inplace)
        kept = [model.last, small.last]
        modes = [module.training for each in (model, small) for module in each.modules()]
        states = [each.state_dict() for each in (model, small)]
        return states, kept, modes, batches, torch.get_rng_state(), plan_of(small).speed

    *with_times, found = run()
    monkeypatch.setattr("fxcompress.pipeline.build.measured_speed", lambda *given: (None, []))
    *without, nothing = run()
    assert found is not None
    assert nothing is None
    torch.testing.assert_close(with_times, without, rtol=0, atol=0)


class Noisy(nn.Module):
    """Draws in evaluation mode, too."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 48)
        self.head = nn.Linear(48, 10)

    def forward(self, x: Tensor) -> Tensor:
        hidden = F.dropout(self.fc(x), 0.1, training=True)
        return self.head(hidden)


def test_random_numbers_stay_where_they_are() -> None:
    model = Noisy()
    before = torch.get_rng_state()
    small = fxcompress.compile(model, rules(), data())
    assert torch.equal(torch.get_rng_state(), before)
    assert plan_of(small).speed is not None


def test_in_place_the_dense_model_is_timed_before(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock([4.0], [2.0])
    monkeypatch.setattr(speed, "now", clock.now)
    model = net()
    small = fxcompress.compile(model, rules(), data(), forward=clock.forward, inplace=True)
    assert small is model
    found = plan_of(small).speed
    assert found is not None
    assert (found.before, found.after) == (4, 2)


# ---- where it is not measured ---------------------------------------------------------


def test_what_is_not_rewritten_is_not_timed() -> None:
    small = fxcompress.compile(net(), rules(1.0, rewrite={"form": "pivoted"}), data())
    planned = plan_of(small)
    assert not planned.rewritten
    assert planned.speed is None
    assert speed_line(planned) == "forward pass: not measured (nothing is rewritten)"
    assert fxcompress.diff(net(), small).to_json()["speed"] is None


def test_a_plan_says_that_nothing_is_measured() -> None:
    text = str(fxcompress.plan(net(), rules(), data()))
    assert "forward pass: not measured (nothing is rewritten yet)" in text


def test_a_model_that_does_not_run_once_more_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*given: Any) -> Any:
        raise RuntimeError("only once")

    monkeypatch.setattr(speed, "run_model", fails)
    with pytest.warns(FxcompressWarning, match="not measured: RuntimeError: only once"):
        small = fxcompress.compile(net(), rules(), data())
    planned = plan_of(small)
    assert planned.speed is None
    assert "forward pass: not measured (a warning says why)" in str(planned)


def test_nothing_is_computed_on_the_meta_device() -> None:
    model = net().to("meta")
    request = _request(lambda model, batch: pytest.fail("it ran"))
    assert time_models(model, model, data()[:1], request) is None


# ---- a model that is slower -----------------------------------------------------------


@contextmanager
def warned() -> Iterator[list[str]]:
    notes: list[str] = []
    with pytest.warns(FxcompressWarning) as caught:
        yield notes
    notes += [str(one.message) for one in caught]


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Compiles a model that is slower afterwards, and returns the warning of it.

    A call costs 1 second and a multiply-accumulate 1e-6: in 2,560 rows a form of two calls pays
    where it saves 400 of them a row.
    """
    made_up_times(monkeypatch, tmp_path)
    clock = Clock([1.0], [1.25])
    monkeypatch.setattr(speed, "now", clock.now)

    def run(given: Any, model: nn.Module | None = None) -> str:
        model = model or net()
        with warned() as notes:
            small = fxcompress.compile(
                model, given, data(2, size=2560), forward=clock.forward, progress=False
            )
        (note,) = [note for note in notes if "slower" in note]
        assert note in plan_of(small).warnings
        assert note in str(plan_of(small))
        assert note.split(":")[0] in fxcompress.diff(model, small).to_html()
        return note

    return run


LOW_RANK = {"form": "low_rank"}


def test_the_sites_that_take_longer_are_named(slow: Any) -> None:
    note = slow(rules(0.9, rewrite=LOW_RANK))
    planned = fxcompress.plan(net(), rules(0.9, rewrite=LOW_RANK), data(2, size=2560))
    costs = {
        site.name: (1 + 1e-6 * site.before.macs, 2 + 1e-6 * site.after.macs)
        for site in planned.rewritten
    }
    slower = {name: pair for name, pair in costs.items() if pair[1] > pair[0]}
    assert slower
    assert "1.00 s → 1.25 s on the recorded batch" in note
    for name, (before, after) in slower.items():
        assert f"{name} (low_rank) {duration(before)} → {duration(after)}" in note
    for name in costs.keys() - slower.keys():
        assert name not in note
    for advice in ("unit: latency", "narrow", "multiple_of", "min_saving", "unless"):
        assert advice in note


def test_sites_of_one_kind_are_told_together(slow: Any) -> None:
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)), nn.Linear(24, 10)).eval()
    note = slow(rules(0.7, rewrite=LOW_RANK), model)
    planned = fxcompress.plan(model, rules(0.7, rewrite=LOW_RANK), data(2, size=2560))
    ranks = {site.name: site.rank for site in planned.rewritten}
    assert len({*ranks.values()}) > 1
    before = len(ranks) * (1 + 1e-6 * 2560 * 24 * 24)
    after = sum(2 + 1e-6 * 2560 * 48 * int(str(rank)) for rank in ranks.values())
    (names,) = fold(tuple(ranks))
    assert f"{names} (low_rank) {duration(before)} → {duration(after)}" in note


def test_what_is_left_of_a_narrowed_value_is_timed_as_it_stands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Layers that are factorized beside a narrowing, and those that are only narrower."""
    asked: list[Timing] = []

    def measured(entries: Mapping[str, Timing], *rest: Any) -> dict[str, float]:
        asked.extend(entries.values())
        return {key: 2.0 if entry.form else 1.0 for key, entry in entries.items()}

    monkeypatch.setattr("fxcompress.pipeline.latency._measured", measured)
    clock = Clock([1.0], [1.25])
    monkeypatch.setattr(speed, "now", clock.now)
    model = network("gated")
    with warned() as notes:
        small = fxcompress.compile(
            model, narrow_then(0.35, forms="narrow"), blocks(), forward=clock.forward
        )
    factorized = [site for site in plan_of(small).sites if site.then is not None]
    assert factorized
    (note,) = [note for note in notes if "slower" in note]
    assert "(narrow, pivoted)" in note
    timed_as = {(each.form.name, each.rank) for each in asked if each.form is not None}
    assert timed_as == {(site.then.form, site.then.rank) for site in factorized if site.then}


def test_where_no_operator_is_to_blame_it_says_so(
    slow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def measured(entries: Mapping[str, Any], *rest: Any) -> dict[str, float]:
        return {key: 1.0 if entry.form is None else 0.5 for key, entry in entries.items()}

    monkeypatch.setattr("fxcompress.pipeline.latency._measured", measured)
    note = slow(rules(0.5, rewrite=LOW_RANK))
    assert "no operator that was timed takes longer by itself" in note
    assert "unit: latency" in note


def test_operators_that_cannot_be_timed_are_not_told(
    slow: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*given: Any) -> Any:
        raise torch.OutOfMemoryError("no memory")

    monkeypatch.setattr("fxcompress.pipeline.latency._measured", fails)
    assert "no operator that was timed" in slow(rules(0.85, rewrite=LOW_RANK))


def test_a_budget_of_time_is_not_advised_twice(slow: Any) -> None:
    note = slow(rules(0.9, unit="latency", rewrite=LOW_RANK))
    assert "unit: latency" not in note
    assert "multiple_of" in note


def test_operators_are_not_timed_without_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.pipeline.latency._measured", None)  # not to be called
    assert plan_of(fxcompress.compile(net(), rules(), data())).speed is not None


def test_the_search_ends_when_its_time_is_up(monkeypatch: pytest.MonkeyPatch, slow: Any) -> None:
    monkeypatch.setattr(speed, "LONGEST", -1.0)
    assert "no operator that was timed" in slow(rules(0.85, rewrite=LOW_RANK))


# ---- where it is told -----------------------------------------------------------------


def test_it_is_told_everywhere_and_saved(tmp_path: Path) -> None:
    model = net()
    small = fxcompress.compile(model, rules(), data())
    found = plan_of(small).speed
    assert found is not None
    line = speed_line(plan_of(small))
    assert line == "forward pass 1.00 s → 1.00 s, 1.00 times as fast (1.00; cpu, 1 thread, float32)"
    difference = fxcompress.diff(model, small)
    assert line in str(plan_of(small))
    assert line in str(difference)
    assert "times as fast" in difference.to_html()
    told = difference.to_json()["speed"]
    assert told == {**json.loads(found.model_dump_json()), "ratio": 1.0}
    fxcompress.save(small, tmp_path)
    assert plan_of(fxcompress.load(tmp_path, net())).speed == found
    assert plan_of(copy.deepcopy(small)).speed == found


def test_plans_of_before_are_read() -> None:
    plain = json.loads(plan_of(fxcompress.compile(net(), rules(), data())).model_dump_json())
    del plain["speed"], plain["batch"]
    old = Plan.model_validate(plain)
    assert "forward pass: not measured (no time was taken when it was compressed)" in str(old)
    assert "MACs per batch" in str(old)
    for wrong in ({"before": 0.0}, {"pairs": 0}):
        speed_of = {**_speed().model_dump(), **wrong}
        with pytest.raises(ValueError, match="greater than or equal"):
            Speed.model_validate(speed_of)


def _speed() -> Speed:
    return Speed(
        before=2.0, after=1.0, spread=(1.9, 2.1), pairs=3, machine="gpu", device="cuda",
        threads=4, dtype="bfloat16",
    )  # fmt: skip


def test_threads_are_those_of_a_processor() -> None:
    planned = fxcompress.plan(net(), rules(), data()).model_copy(update={"speed": _speed()})
    line = "forward pass 2.00 s → 1.00 s, 2.00 times as fast (1.90..2.10; cuda, bfloat16)"
    assert speed_line(planned) == line


def test_rounds_and_training_time_it_too() -> None:
    small = fxcompress.compile(net(), _rounds(), data())
    assert plan_of(small).rounds
    assert plan_of(small).speed is not None
    iterated = fxcompress.ISVT(net(), rules(), data(), steps=2)
    iterated.step()
    assert plan_of(iterated.finalize()).speed is not None


def _rounds() -> Any:
    from fxcompress.rules import parse_rules

    return parse_rules(
        "budget: {keep: 0.6}\nsolver: {rounds: 2, steps: 1}\n"
        "rules: [{id: all, match: {node: {op: linear}}, rewrite: {form: low_rank}}]",
        "rounds.yaml",
    )


def test_a_sweep_tells_it_where_models_are_made() -> None:
    found = fxcompress.sweep(net(), rules(), data(), keeps=(0.8, 0.5), evaluate=lambda model: 1.0)
    assert "faster" in str(found)
    assert str(found).count("1.00×") == 2
    points = found.to_json()["points"]
    assert [point["speed"]["ratio"] for point in points] == [1.0, 1.0]
    assert "faster" not in str(fxcompress.sweep(net(), rules(), data(), keeps=(0.8,)))


# ---- what multiply-accumulates are of -------------------------------------------------


@pytest.mark.parametrize(
    ("examples", "samples", "text"),
    [
        ([torch.zeros(4, 3, 8, 8)], 4, "4 samples of 3×8×8"),
        ([(torch.zeros(4, 3), torch.zeros(4))], 4, "4 samples of 3"),
        ([torch.zeros(2, 5), torch.zeros(3, 7)], 5, "5 samples of 5 and 7"),
        ([{"a": torch.zeros(1, 5), "b": torch.zeros(()), "c": "word"}], 1, "1 sample of 5"),
        ([{"a": torch.zeros(2, 5), "b": torch.zeros(1, 5)}], None, "tensors of 2×5 and 1×5"),
        ([torch.zeros(2, 5), {"a": torch.zeros(1, 2), "b": torch.zeros(3, 2)}], None, None),
        ([{"text": "no tensor"}], None, "its shapes are not known"),
        ([torch.zeros(0, 5)], None, "tensors of 0×5"),
        ([torch.zeros(7)], 7, "7 samples"),
    ],
)
def test_samples_are_along_the_first_extent(
    examples: list[Any], samples: int | None, text: str | None
) -> None:
    found = batch_of(examples)
    assert found.samples == samples
    planned = fxcompress.plan(net(), rules(), data()).model_copy(update={"batch": found})
    assert text in (None, batch_text(planned))
    assert ("MACs per batch" in str(planned)) is (samples is None)


def test_a_batch_of_hugging_face_is_a_mapping() -> None:
    from transformers import BatchEncoding

    ids = torch.zeros(2, 16, dtype=torch.int64)
    encoded = BatchEncoding({"input_ids": ids, "attention_mask": ids})
    assert batch_of([encoded]) == Batch(samples=2, shapes=((2, 16),))


def test_multiply_accumulates_are_shown_of_one_sample() -> None:
    """A larger batch changes what a plan counts, and nothing of what is shown or chosen."""
    one, two = (
        fxcompress.plan(
            net(), rules(0.5, unit="macs"), data(2, size=size), examples=[data()[0][:n]]
        )
        for size, n in ((64, 8), (64, 32))
    )
    assert two.model_before.macs == 4 * one.model_before.macs
    assert [site.rank for site in one.sites] == [site.rank for site in two.sites]
    shown = [[line for line in str(each).splitlines() if "MAC" in line] for each in (one, two)]
    # The budget, what is used of it, its multiplier, the totals.
    assert len([line for line in shown[0] if "of the recorded batch" not in line]) == 4
    assert shown[0][:2] == shown[1][:2]
    before = 24 * 48 + 48 * 24 + 24 * 10
    assert any(line.startswith("MACs per sample") and f" {before:,} " in line for line in shown[0])
    assert "the recorded batch: 8 samples of 24" in str(one)
    assert fxcompress.report.diff_plan(one).to_json()["batch"]["samples"] == 8
