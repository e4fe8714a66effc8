"""Nothing is left behind on what the user has, and no other thread or process notices anything."""

from __future__ import annotations

import hashlib
import json
import os
import random
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.processes import _watched
from fxcompress.rules import LoadedRules, parse_rules
from tests.small import data, net, rules, unchanged

N = 24


@pytest.fixture(autouse=True)
def _no_times_are_known(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def iterative(**solver: Any) -> LoadedRules:
    document = {
        "budget": {"keep": 0.5, "of": "matched"},
        "solver": {"rounds": 2, "steps": 2, **solver},
        "rules": [{
            "id": "all", "match": {"node": {"op": "linear", "as": "fc"}},
            "rewrite": {"any_of": ["pivoted", "low_rank"]},
        }],
    }  # fmt: skip
    return parse_rules(json.dumps(document), "rounds.yaml")


def settings() -> dict[str, Any]:
    """What the whole process has in common."""
    hooks = nn.modules.module
    return {
        "call": nn.Module.__call__,
        "fast paths": torch.backends.mha.get_fastpath_enabled(),
        "stance": torch._dynamo.eval_frame._stance.stance,
        "hooks": len(hooks._global_forward_hooks) + len(hooks._global_forward_pre_hooks),
        "filters": [*warnings.filters],
        "threads": torch.get_num_threads(),
        "dtype": torch.get_default_dtype(),
        "grad": torch.is_grad_enabled(),
        "modes": torch.overrides._get_current_function_mode_stack(),
        "torch": torch.get_rng_state().tolist(),
        "numpy": np.random.get_state()[1].tolist(),
        "random": random.getstate(),
    }


@contextmanager
def settings_kept() -> Iterator[None]:
    before = settings()
    yield
    after = settings()
    assert {key for key in before if before[key] != after[key]} == set()


METHODS = pytest.mark.parametrize(
    "loaded",
    [
        *(rules(0.5, metric=kind) for kind in ("kfac", "ekfac", "diagonal", "activation")),
        iterative(),
        iterative(gradient="whitened"),
        iterative(correct=True),
    ],
    ids=["kfac", "ekfac", "diagonal", "activation", "rounds", "whitened", "corrected"],
)


# ---- tensors of the user ------------------------------------------------------------


@METHODS
def test_nothing_outside_of_the_model_gets_a_gradient(loaded: LoadedRules) -> None:
    prompt = nn.Parameter(torch.randn(N))
    made = nn.Linear(N, N)(torch.randn(N))  # has a graph of its own
    batches = [batch.requires_grad_() for batch in data()]
    model = net()
    with unchanged(model), settings_kept():
        fxcompress.compile(
            model, loaded, batches, forward=lambda m, b: m(b + prompt + made), progress=False
        )
    assert prompt.grad is None
    assert all(batch.grad is None for batch in batches)
    made.sum().backward()  # its graph is still there


def test_nor_does_the_head_of_a_loss() -> None:
    head = nn.Linear(10, 3)
    head.weight.grad = torch.ones(3, 10)

    def loss(out: Tensor, batch: Any) -> Tensor:
        return head(out).square().sum(-1)

    for loaded in (rules(0.5), iterative(objective="task")):
        fxcompress.compile(net(), loaded, data(), loss=loss, progress=False)
        assert torch.equal(head.weight.grad, torch.ones(3, 10))
        assert head.bias.grad is None


def test_a_prompt_changes_no_gradient_that_is_measured() -> None:
    """The sites after a tensor that learns are reached as they are after one that does not."""
    prompt = torch.randn(N)
    plans = []
    for shift in (prompt, nn.Parameter(prompt.clone())):
        small = fxcompress.compile(
            net(), rules(0.5), data(), forward=lambda m, b, s=shift: m(b + s), progress=False
        )
        plans.append([(s.name, s.rank, s.predicted) for s in fxcompress.plan_of(small).sites])
    assert plans[0] == plans[1]


@METHODS
def test_a_hook_sees_the_parameters_of_the_user_learn_at_all_times(loaded: LoadedRules) -> None:
    model = net()
    seen = []

    def forward(m: nn.Module, batch: Any) -> Any:
        seen.append(all(p.requires_grad and p.grad is None for p in model.parameters()))
        return m(batch)

    fxcompress.compile(model, loaded, data(), forward=forward, progress=False)
    assert len(seen) > 4
    assert all(seen)


# ---- random numbers ------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws in eval mode, from all three generators."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.head = nn.Linear(N, 48), nn.Linear(48, 10)
        self.seen: list[float] = []

    def forward(self, x: Tensor) -> Tensor:
        x = F.dropout(x, 0.1, training=True) + torch.randn_like(x) * 0.01
        self.seen.append(float(x.sum()))
        return self.head(F.relu(self.up(x))) + float(np.random.rand()) + random.random()


@METHODS
def test_random_states_are_as_before(loaded: LoadedRules) -> None:
    for model in (net(), Noisy().eval()):
        with settings_kept():
            fxcompress.compile(model, loaded, data(), progress=False)


def test_nor_do_times_that_are_measured_take_random_numbers() -> None:
    model = net()
    with settings_kept(), suppress(fxcompress.BudgetError):  # times are what they are
        fxcompress.compile(model, rules(1.0, unit="latency"), data(), progress=False)


def test_every_batch_has_noise_of_its_own_and_a_seed_repeats_it() -> None:
    drawn = []

    def forward(m: nn.Module, batch: Any) -> Any:
        drawn.append(float(torch.rand(())))
        return m(batch)

    runs = []
    for _ in range(2):
        torch.manual_seed(3)
        drawn.clear()
        fxcompress.compile(net(), rules(0.5), data(), forward=forward, progress=False)
        runs.append([*drawn])
    assert runs[0] == runs[1]
    calibrated = runs[0][1:5]
    assert len(set(calibrated)) == 4


def test_what_the_data_draw_is_the_users() -> None:
    def batches() -> Iterator[Tensor]:
        for _ in range(4):
            yield torch.randn(16, N)

    model = Noisy().eval()
    torch.manual_seed(0)
    wanted = [batch.sum() for batch in batches()]
    after = torch.rand(())
    torch.manual_seed(0)
    got = []
    stream = (got.append(batch.sum()) or batch for batch in batches())
    fxcompress.compile(model, rules(0.5), stream, progress=False)
    assert got == wanted
    assert torch.rand(()) == after


# ---- threads -------------------------------------------------------------------------


class Meeting:
    """Where threads wait for one another; a copy is the same one."""

    def __init__(self, parties: int) -> None:
        self.barrier = threading.Barrier(parties)

    def __deepcopy__(self, memo: Any) -> Meeting:
        return self

    def __call__(self) -> None:
        self.barrier.wait(30)


class Strange(nn.Module):
    """Uses parameters by hand, so that it matters which module is running."""

    def __init__(self, meet: Meeting) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(N, N) for _ in range(4))
        self.gains = nn.ParameterList(nn.Parameter(torch.ones(N)) for _ in range(4))
        self.meet = meet
        with torch.no_grad():
            for parameter in self.layers.parameters():
                parameter.normal_(std=0.2, generator=generator)

    def forward(self, x: Tensor) -> Tensor:
        for layer, gain in zip(self.layers, self.gains, strict=True):
            self.meet()
            x = F.relu(layer(x)) * gain
        return x


def summary(small: nn.Module) -> Any:
    plan = fxcompress.plan_of(small)
    return (
        [(site.name, site.form, site.rank, site.predicted) for site in plan.sites],
        [(each.name, each.reason) for each in plan.unmatched],
    )


def together(works: list[Callable[[], Any]]) -> list[Any]:
    """What functions return that run at the same time."""
    out: list[Any] = [None] * len(works)

    def run(index: int) -> None:
        try:
            out[index] = works[index]()
        except BaseException as error:
            out[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    for value in out:
        if isinstance(value, BaseException):
            raise value
    return out


def test_compiles_in_step_make_the_plans_that_each_makes_alone() -> None:
    """They meet before every layer: all that one records, the other is in the middle of."""
    model = Strange(Meeting(1)).eval()
    alone = summary(fxcompress.compile(model, rules(0.5), data(), progress=False))
    models = [Strange(Meeting(1)).eval() for _ in range(2)]
    models[0].meet = models[1].meet = Meeting(2)

    def work(model: nn.Module) -> Any:
        return summary(fxcompress.compile(model, rules(0.5), data(), progress=False))

    with settings_kept():
        found = together([lambda: work(models[0]), lambda: work(models[1])])
    assert found == [alone, alone]


def test_a_model_may_be_served_and_trained_while_it_is_compiled() -> None:
    model, x = net(), data()[0]
    alone = summary(fxcompress.compile(model, rules(0.5), data(), progress=False))
    with torch.no_grad():
        answer = model(x)
    wanted = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    done = threading.Event()

    def compiles() -> Any:
        try:
            return [
                summary(fxcompress.compile(model, loaded, data(), progress=False))
                for loaded in (rules(0.5), iterative(), rules(0.5))
            ]
        finally:
            done.set()

    def serve() -> int:
        count = 0
        while not done.is_set():
            with torch.no_grad():
                torch.testing.assert_close(model(x), answer)
            count += 1
        return count

    def train() -> int:
        count = 0
        while not done.is_set():
            found = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
            for one, other in zip(found, wanted, strict=True):
                torch.testing.assert_close(one, other)
            count += 1
        return count

    with settings_kept():
        found, served, trained = together([compiles, serve, train])
    assert found[0] == alone
    assert found[2] == alone
    assert served > 3
    assert trained > 3


def test_threads_that_draw_are_not_set_back_by_a_model_that_does_not() -> None:
    done = threading.Event()
    drawn: list[float] = []

    model = net()

    def compiles() -> None:
        for _ in range(2):
            fxcompress.compile(model, rules(0.5), data(), progress=False)
        done.set()

    def draw() -> None:
        while not done.is_set() and len(drawn) < 20_000:
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    together([compiles, draw])
    assert len(set(drawn)) == len(drawn)


def test_modules_run_by_workers_of_the_model_are_no_part_of_the_recording() -> None:
    class Threaded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.last = nn.Linear(N, N), nn.Linear(N, 5)

        def forward(self, x: Tensor) -> Tensor:
            (mixed,) = together([lambda: torch.tanh(self.first(x))])
            return self.last(mixed)

    small = fxcompress.compile(
        Threaded().eval(), rules(0.6, metric="activation", name="last"), data(), progress=False
    )
    assert [site.name for site in fxcompress.plan_of(small).sites] == ["last"]


# ---- processes -----------------------------------------------------------------------


def forked(work: Callable[[int], str], count: int, folder: Path) -> list[str]:
    """What a function returns in processes that run at the same time."""
    children = []
    for rank in range(count):
        child = os.fork()
        if not child:
            try:
                (folder / f"out{rank}").write_text(work(rank))
            except BaseException as error:
                (folder / f"out{rank}").write_text(f"{type(error).__name__}: {error}")
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    return [(folder / f"out{rank}").read_text() for rank in range(count)]


def test_processes_may_write_rounds_to_one_directory(tmp_path: Path) -> None:
    place = tmp_path / "rounds"

    def work(rank: int) -> str:
        loaded = iterative(rounds=6, steps=1)
        fxcompress.compile(net(), loaded, data(2), checkpoint=place, progress=False)
        return "done"

    assert forked(work, 3, tmp_path) == ["done"] * 3
    assert [path.name for path in place.iterdir()] == ["rounds.pt"]


def ranks(
    batches: Callable[[int], list[Tensor]], folder: Path, only: int | None = None
) -> list[str]:
    """Plans of rounds, or errors, of two ranks of ``torch.distributed``."""

    def work(rank: int) -> str:
        place = f"file://{folder / 'store'}"
        dist.init_process_group("gloo", init_method=place, rank=rank, world_size=2)
        if only not in (None, rank):
            return "idle"
        loaded = iterative(rounds=1)
        return str(summary(fxcompress.compile(net(), loaded, batches(rank), progress=False))[0])

    return forked(work, 2, folder)


def test_rounds_of_ranks_with_the_same_data_get_the_same(tmp_path: Path) -> None:
    one, other = ranks(lambda rank: data(), tmp_path)
    assert one.startswith("[")
    assert one == other


def test_rounds_of_ranks_with_different_data_stop(tmp_path: Path) -> None:
    found = ranks(lambda rank: data(seed=rank), tmp_path)
    # The first may be through before the second begins; then it is the second that is told.
    assert any("different calibration data" in each for each in found)
    assert all("CalibrationError" in each or each.startswith("[") for each in found)


def test_one_rank_may_go_through_rounds_by_itself(tmp_path: Path) -> None:
    one, other = ranks(lambda rank: data(), tmp_path, only=0)
    assert one.startswith("[")
    assert other == "idle"


def test_a_digest_tells_data_apart() -> None:
    def digest(*batches: Any) -> str:
        found = hashlib.sha256()
        assert [*_watched(batches, found)] == [*batches]
        return found.hexdigest()

    x = torch.arange(4.0)
    different = [
        (x,), (x, x), (x.double(),), (x.reshape(2, 2),), (x.bfloat16(),), (x > 1,), (x + 1,),
        ({"ids": x, "n": 3},), ({"ids": x, "n": 4},), ({"id": x, "n": 3},), ((x, 3),),
        (x.to(torch.complex64),), (x.numpy(),),
        (torch.tensor(1.0),), (torch.tensor(2),), ("text",), (None,), (x.to_sparse(),),
    ]  # fmt: skip
    assert len({digest(*each) for each in different}) == len(different)
    assert digest(x) == digest(x.clone())
    assert digest(x.reshape(2, 2).T) == digest(x.reshape(2, 2).T.contiguous())
