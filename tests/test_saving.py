"""A save is the old one or the new one, at any moment; what could not be loaded is refused."""

from __future__ import annotations

import copy
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

import fxcompress
from fxcompress import LoadError, RecordError, RewriteError, SaveError, plan_of
from fxcompress.saved.load import read_plan
from tests.small import Net, data, net, rules


def two_saves() -> tuple[Net, Net]:
    """Of equal ranks, so that a mix of both would load without an error."""
    old = fxcompress.compile(net(), rules(0.5, metric="euclidean"), data())
    new = copy.deepcopy(old)
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.mul_(3)
    from fxcompress.plans.plan import update_plan

    update_plan(new, plan_of(new).model_copy(update={"warnings": ("the new one",)}))
    return old, new


def which(path: Path, old: nn.Module, new: nn.Module) -> str:
    """Of which save a directory is, weights and plan."""
    loaded = fxcompress.load(path, Net())
    found = []
    for model in (old, new):
        same = all(
            torch.equal(a, b)
            for a, b in zip(loaded.state_dict().values(), model.state_dict().values(), strict=True)
        )
        found.append((same, plan_of(loaded) == plan_of(model)))
    assert read_plan(path).warnings == plan_of(loaded).warnings
    return {((True, True), (False, False)): "old", ((False, False), (True, True)): "new"}[
        (found[0], found[1])
    ]


def in_a_child(action: Callable[[], Any]) -> int:
    """Run something in a process of its own that may die of it; the status it leaves."""
    child = os.fork()
    if not child:
        try:
            action()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitpid(child, 0)[1]


def test_killed_at_every_file_operation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    old, new = two_saves()
    outcomes = []
    for last in range(100):
        path = tmp_path / str(last)
        fxcompress.save(old, path)
        left = [last]

        def dying(function: Any, left: list[int] = left) -> Any:
            def run(*args: Any, **kwargs: Any) -> Any:
                if left[0] == 0:
                    os._exit(9)
                left[0] -= 1
                return function(*args, **kwargs)

            return run

        def save(path: Path = path, dying: Any = dying) -> None:
            for name in ("fsync", "replace", "open", "unlink", "close"):
                monkeypatch.setattr(os, name, dying(getattr(os, name)))
            monkeypatch.setattr(Path, "write_text", dying(Path.write_text))
            monkeypatch.setattr("fxcompress.saved.save.save_file", dying(save_file))
            fxcompress.save(new, path)

        status = in_a_child(save)
        outcomes.append(which(path, old, new))
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert len(outcomes) > 8
    assert outcomes == sorted(outcomes, reverse=True)  # "old" until it counts, "new" from then on
    assert {"old", "new"} == set(outcomes[:-1])


@pytest.mark.parametrize("killed", [False, True])
def test_a_disk_that_fills(killed: bool, tmp_path: Path) -> None:
    old, new = two_saves()
    fxcompress.save(old, tmp_path)
    sizes = sorted(file.stat().st_size for file in tmp_path.iterdir())
    for limit in (0, 100, sizes[0] - 1, sizes[0], (sizes[0] + sizes[-1]) // 2, sizes[-1] - 1):

        def save(limit: int = limit) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL if killed else signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
            fxcompress.save(new, tmp_path)

        assert in_a_child(save) != 0
        assert which(tmp_path, old, new) == "old"
    fxcompress.save(new, tmp_path)
    assert which(tmp_path, old, new) == "new"
    assert not [*tmp_path.glob("*.new")]


def test_files_of_before_there_were_ids_are_loaded(tmp_path: Path) -> None:
    from safetensors.torch import save_model

    small = fxcompress.compile(net(), rules(), data())
    save_model(small, str(tmp_path / "model.fxcompress.safetensors"))
    (tmp_path / "plan.json").write_text(plan_of(small).model_dump_json(exclude={"save_id"}))
    assert plan_of(fxcompress.load(tmp_path, Net())) == plan_of(small)


class _Extra(nn.Identity):
    def get_extra_state(self) -> Any:
        return {"count": 3}

    def set_extra_state(self, state: Any) -> None:
        pass


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda m: setattr(m, "up", nn.Linear(24, 48)), "up was Factorized and is Linear"),
        (lambda m: setattr(m, "norm", nn.Linear(24, 24)), "norm was BatchNorm1d and is Linear"),
        (lambda m: setattr(m, "more", nn.Linear(2, 2)), "more .Linear. was added"),
        (lambda m: delattr(m, "norm"), "norm .BatchNorm1d. was removed"),
        (lambda m: m.register_buffer("seen", torch.zeros(2)), "seen"),
        (lambda m: setattr(m, "norm", _Extra()), "norm .*is a dict, not a tensor"),
    ],
)
def test_a_model_that_was_changed_is_refused(
    change: Callable[[Any], Any], words: str, tmp_path: Path
) -> None:
    small = fxcompress.compile(net(), rules(name=["up", "down"]), data())
    change(small)
    with pytest.raises(SaveError, match=words):
        fxcompress.save(small, tmp_path / "o")
    assert not (tmp_path / "o").exists()


def test_tensors_that_a_file_cannot_hold(tmp_path: Path) -> None:
    small = fxcompress.compile(net(), rules(name=["up", "down"]), data())
    for weight, words in [
        (torch.zeros(10, 24, device="meta"), "meta device"),
        (torch.zeros(10, 24).to_sparse(), "sparse"),
    ]:
        changed = copy.deepcopy(small)
        changed.head.weight = nn.Parameter(weight)
        with pytest.raises(SaveError, match=f"head.*{words}"):
            fxcompress.save(changed, tmp_path)


class _Tied(nn.Module):
    def __init__(self, tied: bool) -> None:
        super().__init__()
        self.fc, self.a, self.b = (nn.Linear(24, 24, bias=False) for _ in range(3))
        if tied:
            self.b.weight = self.a.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.b(self.a(self.fc(x)))
        return out


def test_two_tensors_that_the_rebuilt_model_ties(tmp_path: Path) -> None:
    torch.manual_seed(0)
    small = fxcompress.compile(_Tied(False).eval(), rules(0.5, name="fc"), data())
    fxcompress.save(small, tmp_path)
    with pytest.raises(LoadError, match=r"ties b\.weight to a\.weight|ties a\.weight to b\.weight"):
        fxcompress.load(tmp_path, _Tied(True))


def wrapped(model: nn.Module) -> list[nn.Module]:
    return [nn.DataParallel(model), torch.compile(model, backend="eager")]  # type: ignore[list-item]


def test_wrappers_are_taken_off(tmp_path: Path) -> None:
    dense = net()
    for around in wrapped(dense):
        small: Any = fxcompress.compile(around, rules(), data())
        assert type(small) is Net
        for again in wrapped(small):
            assert plan_of(again) == plan_of(small)
            assert fxcompress.diff(around, again)
            fxcompress.save(again, tmp_path)
            for target in [Net(), wrapped(Net())[0], wrapped(Net())[1]]:
                loaded = fxcompress.load(tmp_path, target)
                assert type(loaded) is Net
                assert torch.equal(loaded(data()[0]), small(data()[0]))


def test_a_forward_around_the_original_is_refused() -> None:
    model: Any = net()
    inner = model.forward
    model.forward = lambda x: inner(x)
    with pytest.raises(RecordError, match=r"del model\.forward"):
        fxcompress.compile(model, rules(), data())
    del model.forward
    assert fxcompress.compile(model, rules(), data())


def test_weights_of_another_model_beside_it(tmp_path: Path) -> None:
    small = fxcompress.compile(net(), rules(), data())
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(SaveError, match=r"holds model\.safetensors"):
        fxcompress.save(small, tmp_path)


def test_a_directory_is_tried_without_a_trace(tmp_path: Path) -> None:
    from fxcompress.files import try_directory

    try_directory(tmp_path / "a" / "b")
    assert not [*tmp_path.iterdir()]
    (tmp_path / "file").touch()
    with pytest.raises(SaveError, match="nothing can be written"):
        try_directory(tmp_path / "file" / "b")


def test_a_model_without_a_plan_says_so_when_wrapped() -> None:
    with pytest.raises(RewriteError, match="did not come from"):
        plan_of(nn.DataParallel(net()))
