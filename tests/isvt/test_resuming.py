"""Rounds that go on after an interruption, on what they go on, and what they leave behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import CalibrationError, CheckpointError
from fxcompress.checkpoint import mark_of
from fxcompress.isvt import rounds as running
from fxcompress.isvt.objective import Objective, fitting
from fxcompress.plans.plan import plan_of
from fxcompress.rules import LoadedRules
from tests.isvt.problems import rules

SOLVER = {"rounds": 4, "steps": 4}


def network(scale: float = 2.0, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    layers = [part for _ in range(3) for part in (nn.Linear(32, 32), nn.ReLU())]
    model = nn.Sequential(*layers, nn.Linear(32, 10)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(scale)
    return model


def batches(seed: int = 1, count: int = 8) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(64, 32, generator=generator) for _ in range(count)]


def with_metric(loaded: LoadedRules, **changes: Any) -> LoadedRules:
    metric = loaded.rules.metric.model_copy(update=changes)
    return replace(loaded, rules=loaded.rules.model_copy(update={"metric": metric}))


def run(*args: Any, **kwargs: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxcompress.compile(*args, **kwargs)


@pytest.mark.parametrize("after", [1, 2, 3])
@pytest.mark.parametrize("kind", ["activation", "kfac"])
def test_the_same_numbers_whenever_it_stopped(
    kind: str, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the metric was estimated anew before, at weights that are gone since."""
    loaded = with_metric(rules(0.3, **SOLVER), kind=kind)
    anew, estimated = [], running._estimated
    monkeypatch.setattr(running, "_estimated", lambda *args: [anew.append(1), estimated(*args)][1])
    whole = run(network(), loaded, batches())
    assert anew  # or nothing is tested
    done, write = [], running.write

    def stop(*args: Any) -> None:
        write(*args)
        done.append(1)
        if len(done) == after:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(running, "write", stop)
        with pytest.raises(KeyboardInterrupt):
            run(network(), loaded, batches(), checkpoint=tmp_path)
    again = run(network(), loaded, batches(), checkpoint=tmp_path)
    for one, other in zip(whole.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert plan_of(whole).rounds == plan_of(again).rounds
    assert plan_of(whole).held_back == plan_of(again).held_back
    assert plan_of(whole).budget == plan_of(again).budget


def swapped(model: nn.Module) -> nn.Module:
    """Other weights of the same sums."""
    with torch.no_grad():
        weight = model[0].weight
        weight.copy_(weight.flip(0))
    return model


def _plain(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(batch)
    return out


def _doubled(model: nn.Module, batch: Tensor) -> Tensor:
    out: Tensor = model(2 * batch)
    return out


OTHERS: dict[str, tuple[str, Callable[[], tuple[Any, Any, Any, Any]]]] = {
    "weights": ("model", lambda: (swapped(network()), rules(0.3, **SOLVER), batches(), _plain)),
    "data": ("calibration data", lambda: (network(), rules(0.3, **SOLVER), batches(2), _plain)),
    "order": (
        "calibration data", lambda: (network(), rules(0.3, **SOLVER), batches()[::-1], _plain)
    ),
    "keep": ("rules", lambda: (network(), rules(0.4, **SOLVER), batches(), _plain)),
    "forward": ("forward", lambda: (network(), rules(0.3, **SOLVER), batches(), _doubled)),
    "no forward": ("forward", lambda: (network(), rules(0.3, **SOLVER), batches(), None)),
}  # fmt: skip


@pytest.mark.parametrize("other", OTHERS)
def test_a_checkpoint_of_another_run_is_refused(other: str, tmp_path: Path) -> None:
    run(network(), rules(0.3, **SOLVER), batches(), forward=_plain, checkpoint=tmp_path)
    what, made = OTHERS[other]
    model, loaded, given, forward = made()
    with pytest.raises(CheckpointError, match=f"its {what} differ"):
        run(model, loaded, given, forward=forward, checkpoint=tmp_path)
    # The same run goes on, that is, has nothing left to do.
    run(network(), rules(0.3, **SOLVER), batches(), forward=_plain, checkpoint=tmp_path)


def _scaled(factor: float) -> Callable[[Any, Any], Any]:
    return lambda model, batch: model(factor * batch)


def _by_default(factor: float) -> Callable[[Any, Any], Any]:
    def forward(model: Any, batch: Any, factor: float = factor) -> Any:
        return model(factor * batch)

    return forward


class _Method:
    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, model: Any, batch: Any) -> Any:
        return model(self.factor * batch)

    def forward(self, model: Any, batch: Any) -> Any:
        return model(self.factor * batch)


@pytest.mark.parametrize(
    "made",
    [
        _scaled, _by_default, _Method, lambda factor: _Method(factor).forward,
        lambda factor: partial(_scaled, factor), lambda factor: partial(_scaled, factor=factor),
        lambda factor: nn.CrossEntropyLoss(label_smoothing=factor),
        lambda factor: nn.CrossEntropyLoss(weight=torch.full((3,), factor)),
    ],
)  # fmt: skip
def test_functions_made_with_other_values_are_others(made: Callable[[float], Any]) -> None:
    model = network()
    one, again, other = (mark_of("", model, [], made(f), None) for f in (0.5, 0.5, 0.25))
    assert one == again != other


def test_a_function_is_the_same_in_every_process() -> None:
    """Sets of strings have another order in each."""
    program = """if True:
        from fxcompress.checkpoint import _code
        print(_code(lambda model, batch: model(batch) if batch in {"a", "b", "c", "d"} else None))
    """
    started = [
        subprocess.Popen(
            [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONHASHSEED": seed},
        )
        for seed in "123"
    ]  # fmt: skip
    told = {process.communicate()[0] for process in started}
    assert len(told) == 1
    assert told != {""}


@pytest.mark.parametrize("held_back", [0.0, 0.125])
def test_the_plan_says_the_damping_that_was_given(held_back: float) -> None:
    loaded = rules(0.3, **SOLVER)
    damping = loaded.rules.metric.damping.model_copy(update={"input": 0.5, "output": 0.25})
    loaded = with_metric(loaded, damping=damping, held_back=held_back)
    assert plan_of(run(network(), loaded, batches())).damping == (0.5, 0.25)
    undamped = with_metric(loaded, kind="euclidean")
    assert plan_of(run(network(), undamped, batches())).damping == ()


@pytest.mark.parametrize("how", [SOLVER, {"correct": True}], ids=["steps", "correct"])
def test_nothing_is_kept_of_a_run(how: dict[str, Any]) -> None:
    model, given = network(), batches()
    small = run(model, rules(0.3, **how), given)
    assert plan_of(small).rewritten
    left = [weakref.ref(each) for each in (model[0], model[0].weight, small, given[3])]
    del model, given, small
    gc.collect()
    assert [ref() for ref in left] == [None] * 4


@pytest.mark.parametrize("how", [SOLVER, {"correct": True}], ids=["steps", "correct"])
@pytest.mark.parametrize("metric", [{"kind": "euclidean"}, {"batches": 1}, {}], ids=str)
@pytest.mark.parametrize("at", [2, 5, 7])
@pytest.mark.parametrize("kind", ["width", "nan"])
def test_errors_name_the_batch(
    kind: str, at: int, metric: dict[str, Any], how: dict[str, Any]
) -> None:
    given = batches()
    given[at] = torch.randn(8, 31) if kind == "width" else torch.full((8, 32), torch.nan)
    with pytest.raises(CalibrationError, match=f"calibration batch {at}\\b"):
        run(network(), with_metric(rules(0.3, **how), **metric), given)


@pytest.mark.parametrize("metric", [{"kind": "euclidean"}, {"batches": 1}, {}], ids=str)
def test_errors_of_the_loss_name_the_batch(metric: dict[str, Any]) -> None:
    def loss(output: Tensor, batch: Tensor) -> Tensor:
        if len(batch) == 63:
            raise ValueError("too few")
        return -output.log_softmax(-1)[:, 0]

    given = batches()
    given[5] = given[5][:63]
    loaded = with_metric(rules(0.3, **SOLVER, objective="task"), **metric)
    with pytest.raises(CalibrationError, match=r"^on calibration batch 5: loss.*too few"):
        run(network(), loaded, given, loss=loss)


class Fixed(nn.Module):
    """Insists on 64 rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 10)
        self.register_buffer("state", torch.zeros(64, 32))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.tanh(self.a(x) + self.state.view(64, 32)).view(64, 32))
        return out


class Normed(nn.Module):
    """What it says of a row depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 10)
        self.norm = nn.BatchNorm1d(32, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(torch.relu(self.norm(self.a(x))))
        return out


MODELS: dict[str, Callable[[], nn.Module]] = {
    "a buffer": Fixed,
    "an exported model": lambda: torch.export.export(network(), (batches()[0],)).module(),
    "a norm over the batch": Normed,
}


@pytest.mark.parametrize("how", [SOLVER, {"correct": True}], ids=["steps", "correct"])
@pytest.mark.parametrize("name", MODELS)
def test_models_that_insist_on_their_batch(name: str, how: dict[str, Any]) -> None:
    model = MODELS[name]()
    small = run(model, rules(0.5, **how), batches())
    assert plan_of(small).rewritten
    assert plan_of(small).held_back is not None


@pytest.mark.parametrize("name", MODELS)
def test_they_are_not_cut_into_pieces(name: str) -> None:
    objective = Objective(MODELS[name](), None, "categorical", None)
    assert fitting(objective, MODELS[name](), batches()[0], 1.0) is None
    plain = Objective(network(), None, "categorical", None)
    assert fitting(plain, network(), batches()[0], 1.0) == 1


@pytest.mark.parametrize("how", [SOLVER, {"correct": True}], ids=["steps", "correct"])
@pytest.mark.parametrize("kind", ["euclidean", "activation", "kfac"])
@pytest.mark.parametrize("at", [2, 6])
def test_outputs_that_are_not_finite_name_the_batch(
    kind: str, at: int, how: dict[str, Any]
) -> None:
    """Also where the metric looks at inputs only, and these are fine."""

    class Overflowing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = network()

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.body(x)
            return out / (0.0 if float(x.max()) > 50 else 1.0)

    given = batches()
    given[at][3, 4] = 60.0
    with pytest.raises(CalibrationError, match=f"calibration batch {at}\\b"):
        run(Overflowing().eval(), with_metric(rules(0.3, **how), kind=kind), given)


@pytest.mark.parametrize("kind", ["euclidean", "activation", "kfac"])
def test_a_loss_that_is_not_finite_names_the_batch(kind: str) -> None:
    given = batches()

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        value = torch.nn.functional.cross_entropy(output, output.argmax(1), reduction="none")
        return value * torch.nan if torch.equal(batch, given[3]) else value

    loaded = with_metric(rules(0.3, rounds=4, steps=4, objective="task"), kind=kind)
    with pytest.raises(CalibrationError, match=r"calibration batch 3\b"):
        run(network(), loaded, given, loss=loss)
