"""A save is the old one or the new one, at any moment; what could not be loaded is refused."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import fxcompress
from fxcompress import LoadError, RecordError, RewriteError, SaveError, plan_of
from fxcompress.saved.load import PLAN, read_plan
from fxcompress.saved.weights import INDEX, WEIGHTS
from tests.small import Net, data, net, rules

LARGE = 10**9


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


@pytest.mark.parametrize(("before", "after"), [(LARGE, LARGE), (LARGE, 4000), (4000, 4000)])
def test_killed_at_every_file_operation(
    before: int, after: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = two_saves()
    outcomes = []
    for last in range(100):
        path = tmp_path / str(last)
        fxcompress.save(old, path, max_shard_size=before)
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
            monkeypatch.setattr("fxcompress.saved.weights.save_file", dying(save_file))
            fxcompress.save(new, path, max_shard_size=after)

        status = in_a_child(save)
        outcomes.append(which(path, old, new))
        if os.waitstatus_to_exitcode(status) == 0:
            break
    assert len(outcomes) > 8
    assert outcomes == sorted(outcomes, reverse=True)  # "old" until it counts, "new" from then on
    assert {"old", "new"} == set(outcomes[:-1])
    # What was left behind goes with the next save.
    fxcompress.save(new, path)
    assert sorted(file.name for file in path.iterdir()) == ["model.fxcompress.safetensors", PLAN]


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


# ---- several files ---------------------------------------------------------------------------


def in_shards(path: Path, most: int | str = 4000) -> Net:
    small = fxcompress.compile(net(), rules(), data())
    fxcompress.save(small, path, max_shard_size=most)
    return small


def shards(path: Path) -> list[Path]:
    """The files with weights, but for the first."""
    return sorted(path.glob("model.fxcompress-*.safetensors"))


def assert_same(a: nn.Module, b: nn.Module) -> None:
    first, second = a.state_dict(), b.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("most", [1, 1000, "4KB", "3 KiB", "1GB"])
def test_files_are_no_larger_than_asked(most: int | str, mapped: bool, tmp_path: Path) -> None:
    small = in_shards(tmp_path, most)
    limit = {"4KB": 4000, "3 KiB": 3072, "1GB": 10**9}.get(str(most), most)
    files = [tmp_path / WEIGHTS, *shards(tmp_path)]
    assert (len(files) == 1) == (most == "1GB")
    found: dict[str, str] = {}
    for file in files:
        state = load_file(file)
        size = sum(tensor.numel() * tensor.element_size() for tensor in state.values())
        assert size <= limit or len(state) == 1
        found |= dict.fromkeys(state, file.name)
    assert sorted(found) == sorted(small.state_dict())
    assert (tmp_path / INDEX).exists() == (len(files) > 1)
    if len(files) > 1:
        index = json.loads((tmp_path / INDEX).read_text())
        assert index["weight_map"] == found
        whole = sum(t.numel() * t.element_size() for t in small.state_dict().values())
        assert index["metadata"]["total_size"] == whole
    assert_same(small, fxcompress.load(tmp_path, Net(), mapped=mapped))


def test_files_of_the_save_before_are_removed(tmp_path: Path) -> None:
    in_shards(tmp_path, 1000)
    few = in_shards(tmp_path, 4000)
    assert {file.name for file in tmp_path.iterdir()} >= {INDEX, WEIGHTS, PLAN}
    count = len(shards(tmp_path)) + 1
    assert {file.name[-len("-of-00002.safetensors") :] for file in shards(tmp_path)} == {
        f"-of-{count:05d}.safetensors"
    }
    assert_same(few, fxcompress.load(tmp_path, Net()))
    in_shards(tmp_path, LARGE)
    assert sorted(file.name for file in tmp_path.iterdir()) == [WEIGHTS, PLAN]


@pytest.mark.parametrize("most", [0, -1, "a lot", "5 apples", 2.5, None])
def test_sizes_that_are_none(most: Any, tmp_path: Path) -> None:
    small = fxcompress.compile(net(), rules(), data())
    with pytest.raises(SaveError, match="max_shard_size is a number of bytes"):
        fxcompress.save(small, tmp_path / "new", max_shard_size=most)
    assert not (tmp_path / "new").exists()


def refuse(path: Path, words: str) -> None:
    model = Net()
    state = copy.deepcopy(model.state_dict())
    with pytest.raises(LoadError, match=words):
        fxcompress.load(path, model)
    assert model.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_a_file_that_is_missing(tmp_path: Path) -> None:
    in_shards(tmp_path)
    gone = shards(tmp_path)[0]
    gone.unlink()
    refuse(tmp_path, f"{gone.name} is missing: .* is one of several files of a save")


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    in_shards(tmp_path)
    cut = shards(tmp_path)[-1]
    cut.write_bytes(cut.read_bytes()[:-1])
    refuse(tmp_path, f"{cut.name} cannot be read")


def test_a_file_of_another_save(tmp_path: Path) -> None:
    """Of the same names, shapes and types."""
    old, new = two_saves()
    fxcompress.save(old, tmp_path / "a", max_shard_size=4000)
    fxcompress.save(new, tmp_path / "b", max_shard_size=4000)
    for mine, other in zip(shards(tmp_path / "a"), shards(tmp_path / "b"), strict=True):
        mine.write_bytes(other.read_bytes())
    refuse(tmp_path / "a", "is of another save than .*: save the model again")


def _altered(path: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    with safe_open(path, "pt") as file:
        about = file.metadata()
    state = load_file(path)
    change(state)
    save_file(state, path, metadata=about)


def test_a_file_that_was_altered(tmp_path: Path) -> None:
    in_shards(tmp_path)
    shard = shards(tmp_path)[0]
    whole, first = shard.read_bytes(), next(iter(load_file(shard)))
    _altered(shard, lambda state: state.pop(first))
    refuse(tmp_path, f"{shard.name} has no {first}: it was changed")
    shard.write_bytes(whole)
    _altered(shard, lambda state: state.update(evil=torch.ones(1)))
    refuse(tmp_path, f"{shard.name} has, beside what the index says, evil: it was changed")
    shard.write_bytes(whole)
    _altered(shard, lambda state: state.update({first: torch.ones(3, 1, 2)}))
    refuse(tmp_path, f"does not fit .*{first} is .3, 1, 2. in the file")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", "has an index that cannot be read"),
        ("[]", "has an index that cannot be read"),
        ('{"weight_map": []}', "has an index that cannot be read"),
        ('{"weight_map": {"up.bias": "../a.safetensors"}}', "with a file that no save has"),
        ('{"weight_map": {"up.bias": 3}}', "with a file that no save has"),
        ('{"weight_map": {"up.bias": "model.safetensors"}}', "with a file that no save has"),
        (
            '{"weight_map": {"a": "model.fxcompress-0123456789abcdef-00002-of-00002.safetensors"}}',
            "00002-of-00002.safetensors is missing",
        ),
    ],
)
def test_an_index_of_a_stranger(text: str, words: str, tmp_path: Path) -> None:
    in_shards(tmp_path, LARGE)
    path = tmp_path / WEIGHTS
    with safe_open(path, "pt") as file:
        about = {**file.metadata(), INDEX: text}
    save_file(load_file(path), path, metadata=about)
    refuse(tmp_path, words)


def test_weights_on_another_device_are_copied_file_by_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a file holds is all that is made at a time."""
    from fxcompress.saved import weights

    alive: list[set[str]] = []
    monkeypatch.setattr(weights, "save_file", lambda found, path, metadata: (
        alive.append({*found}), save_file(found, path, metadata)))  # fmt: skip
    small = in_shards(tmp_path, 1)
    assert [len(names) for names in alive] == [1] * len(small.state_dict())
