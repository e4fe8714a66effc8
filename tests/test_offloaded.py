"""Weights that are not all in memory: mapped from files, or offloaded by accelerate."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, disk_offload, dispatch_model
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import offload_state_dict
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import fxcompress
from fxcompress.errors import LoadError, RecordError
from fxcompress.mapped import map_tensor, mapped_copies
from fxcompress.rewrite import is_offloaded, resident
from fxcompress.saved.weights import WEIGHTS
from tests.small import Net, data, net, rules

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


def llama(dtype: torch.dtype = torch.float32, tied: bool = True) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=3,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=32,
        tie_word_embeddings=tied,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval().to(dtype)


def tokens() -> list[Any]:
    generator = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(3, 64, (4, 9), generator=generator)} for _ in range(4)]


def on_cpu(model: nn.Module, place: Path) -> nn.Module:
    return cpu_offload(model)


def on_disk(model: nn.Module, place: Path) -> nn.Module:
    return disk_offload(model, place)


def in_parts(model: nn.Module, place: Path) -> nn.Module:
    """Some layers in memory, some on the disk."""
    where = {name: "cpu" for name, _ in model.named_children() if name != "model"}
    inner = model.get_submodule("model")
    where |= {f"model.{name}": "cpu" for name, _ in inner.named_children() if name != "layers"}
    where |= {f"model.layers.{i}": "cpu" if i == 1 else "disk" for i in range(3)}
    return dispatch_model(model, where, main_device="cpu", offload_dir=place)


def in_blocks(model: nn.Module, place: Path) -> nn.Module:
    """A hook that loads all there is below a block."""
    return cpu_offload(model, preload_module_classes=["LlamaMLP"])


OFFLOADED = [on_cpu, on_disk, in_parts, in_blocks]


def told(model: nn.Module) -> dict[str, Any]:
    """A plan, without times."""
    left_out = {"seconds", "speed", "warnings"}
    plan = fxcompress.plan_of(model)
    return plan.model_dump(
        exclude={**dict.fromkeys(left_out, True), "earlier": {"__all__": left_out}}
    )


@pytest.mark.parametrize("memory", [None, "250KiB"])
@pytest.mark.parametrize("offload", OFFLOADED)
def test_an_offloaded_model_is_compressed_as_if_it_were_in_memory(
    offload: Callable[[nn.Module, Path], nn.Module], memory: str | None, tmp_path: Path
) -> None:
    expected = fxcompress.compile(llama(), "every-linear", tokens(), keep=0.6, memory=memory)
    given = offload(llama(), tmp_path)
    before = given(**tokens()[0]).logits
    small = fxcompress.compile(given, "every-linear", tokens(), keep=0.6, memory=memory)
    assert told(small) == told(expected)
    state, wanted = small.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[name], wanted[name]) for name in wanted)
    assert torch.equal(small(**tokens()[0]).logits, expected(**tokens()[0]).logits)
    # What was given is as it was.
    assert is_offloaded(given)
    assert any(parameter.is_meta for parameter in given.parameters())
    assert torch.equal(given(**tokens()[0]).logits, before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("offload", OFFLOADED)
def test_a_copy_without_hooks_computes_the_same(
    offload: Callable[[nn.Module, Path], nn.Module],
    tied: bool,
    dtype: torch.dtype,
    tmp_path: Path,
) -> None:
    reference = llama(dtype, tied)
    given = offload(llama(dtype, tied), tmp_path)
    copy = resident(given)
    assert [*copy.state_dict()] == [*reference.state_dict()]
    assert len([*copy.parameters()]) == len([*reference.parameters()])  # ties are ties
    batch = tokens()[0]
    assert torch.equal(copy(**batch).logits, reference(**batch).logits)
    assert not any(hasattr(module, "_hf_hook") for module in copy.modules())
    assert not any("forward" in vars(module) for module in copy.modules())
    assert not {"to", "cuda", "hf_device_map"} & vars(copy).keys()
    assert "to" in vars(given) or offload is not in_parts  # of the model that was given


def test_a_model_without_hooks_is_itself() -> None:
    model = net()
    assert resident(model) is model


def test_whole_weights_of_modules_with_buffers_are_found(tmp_path: Path) -> None:
    """Batch norms have buffers, which may be offloaded, too."""
    x = data(1)[0]
    for buffers in (False, True):
        for given in (
            cpu_offload(net(), offload_buffers=buffers),
            disk_offload(net(), tmp_path / str(buffers), offload_buffers=buffers),
        ):
            assert given.norm.running_mean.is_meta == buffers
            assert torch.equal(resident(given)(x), net()(x))


def test_weights_kept_on_the_processor_are_not_copied() -> None:
    state = net().state_dict()
    given = cpu_offload(net(), state_dict=state)
    small = fxcompress.compile(given, rules(name="up"), data())
    for name in ("down.weight", "head.weight", "head.bias"):
        assert small.state_dict()[name].data_ptr() == state[name].data_ptr()


def test_files_of_the_disk_are_only_read(tmp_path: Path) -> None:
    given = disk_offload(net(), tmp_path)
    small = fxcompress.compile(given, rules(name="up"), data())
    with torch.no_grad():
        for parameter in small.parameters():
            parameter.zero_()
    assert torch.equal(given(data()[0]), net()(data()[0]))


def test_a_checkpoint_of_another_type_is_read_in_that_of_the_model(tmp_path: Path) -> None:
    """from_pretrained offloads to the checkpoint itself, and notes the type that was asked for."""
    model = net().double()
    save_file({name: tensor.float() for name, tensor in model.state_dict().items()
               if tensor.is_floating_point()}, tmp_path / "m.safetensors")  # fmt: skip
    index = {
        name: {"safetensors_file": str(tmp_path / "m.safetensors"), "dtype": "float64"}
        for name, _ in model.named_parameters()
    }
    where = {"up": "disk", "down": "disk", "norm": "cpu", "head": "disk"}
    given = dispatch_model(model, where, main_device="cpu", offload_index=index, force_hooks=True)
    copy = resident(given)
    assert copy.up.weight.dtype == torch.float64
    assert torch.equal(copy(data()[0].double()), given(data()[0].double()))


def test_everything_else_takes_offloaded_models(tmp_path: Path) -> None:
    given, plain = disk_offload(net(), tmp_path), net()
    chosen = fxcompress.plan(given, rules(), data())
    wanted = fxcompress.plan(plain, rules(), data())
    assert chosen.model_dump(exclude={"seconds"}) == wanted.model_dump(exclude={"seconds"})
    small = fxcompress.compile(given, rules(), data())
    assert str(fxcompress.explain(given, rules(), data()[0])) == str(
        fxcompress.explain(plain, rules(), data()[0])
    )
    assert fxcompress.forecast(given, rules(), data()).peak == (
        fxcompress.forecast(plain, rules(), data()).peak
    )
    assert str(fxcompress.diff(given, small)) == str(fxcompress.diff(plain, small))
    one, other = (fxcompress.measure(each, small, data()) for each in (given, plain))
    assert one.measured == other.measured


def test_what_was_returned_can_be_offloaded_and_compressed_again(tmp_path: Path) -> None:
    first = fxcompress.compile(net(), rules(name="up"), data())
    again = fxcompress.compile(net(), rules(name="up"), data())
    expected = fxcompress.compile(first, rules(name="down"), data())
    small = fxcompress.compile(disk_offload(again, tmp_path), rules(name="down"), data())
    assert told(small) == told(expected)
    assert torch.equal(small(data()[0]), expected(data()[0]))


# ---- what cannot be done -----------------------------------------------------------------


def test_in_place_is_refused(tmp_path: Path) -> None:
    given = disk_offload(net(), tmp_path)
    with pytest.raises(RecordError, match="so it cannot be compressed in place: leave inplace out"):
        fxcompress.compile(given, rules(), data(), inplace=True)


def test_other_hooks_are_refused() -> None:
    given = net()
    add_hook_to_module(given.up, ModelHook())
    with pytest.raises(RecordError, match="a ModelHook on up, which does more than to place"):
        fxcompress.compile(given, rules(), data())


def test_files_that_are_gone_are_named(tmp_path: Path) -> None:
    given = disk_offload(net(), tmp_path)
    (tmp_path / "down.weight.dat").unlink()
    with pytest.raises(RecordError, match=r"down\.weight is offloaded, and cannot be read"):
        fxcompress.compile(given, rules(), data())


def test_files_that_are_too_short_are_named(tmp_path: Path) -> None:
    given = disk_offload(net(), tmp_path)
    (tmp_path / "down.weight.dat").write_bytes(b"1234")
    with pytest.raises(RecordError, match=r"down\.weight is offloaded, and cannot be read"):
        fxcompress.compile(given, rules(), data())


def test_files_of_another_model_are_told(tmp_path: Path) -> None:
    given = disk_offload(net(), tmp_path)
    offload_state_dict(tmp_path, {"down.weight": torch.zeros(2, 3)})
    given._modules["down"]._hf_hook.weights_map.dataset.index["down.weight"]["shape"] = [2, 3]
    with pytest.raises(RecordError, match=r"another shape: \(2, 3\) in place of \(24, 48\)"):
        fxcompress.compile(given, rules(), data())


def test_a_weight_that_nobody_loads_is_told() -> None:
    given = cpu_offload(net())
    given.up.extra = nn.Parameter(torch.empty(3, device="meta"))
    del given.up._hf_hook.weights_map
    given.up._hf_hook.offload = False
    with pytest.raises(RecordError, match=r"up\.weight is on the meta device"):
        fxcompress.compile(given, rules(), data())


# ---- mapped files --------------------------------------------------------------------------


def stored(path: Path, model: nn.Module) -> nn.Module:
    """The model, with its weights mapped from a file."""
    save_file(model.state_dict(), path)
    model.load_state_dict(load_file(path), assign=True)
    return model


def in_file(tensor: Tensor, path: Path) -> bool:
    """Whether a tensor is mapped from a file."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, stop = (int(each, 16) for each in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < stop:
            return line.endswith(str(path))
    return False


@LINUX
def test_what_is_mapped_stays_mapped(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    given = stored(path, net())
    assert in_file(given.down.weight, path)  # the witness itself
    small = fxcompress.compile(given, rules(name="up"), data())
    assert in_file(small.down.weight, path)
    assert not any(in_file(parameter, path) for parameter in small.up.body.parameters())
    assert small.down.weight.data_ptr() != given.down.weight.data_ptr()


@LINUX
def test_a_mapped_copy_is_one_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    given = stored(path, net())
    small = fxcompress.compile(given, rules(name="up"), data())
    with torch.no_grad():
        small.down.weight.zero_()
    assert torch.equal(given.down.weight, net().down.weight)
    assert torch.equal(load_file(path)["down.weight"], net().down.weight)


@LINUX
def test_only_what_still_is_in_the_file_is_mapped_again(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    values = {name: torch.randn(64, 64) for name in "abc"} | {"nan": torch.full((3,), torch.nan)}
    save_file(values, path)
    found = load_file(path)
    found["b"][3, 4] += 1
    whole = [*found.values(), found["c"].T, torch.randn(4), torch.empty(0)]
    copies = mapped_copies(whole)
    assert copies.keys() == {id(found[name]) for name in ("a", "c", "nan")}
    assert torch.equal(copies[id(found["c"])], values["c"])
    save_file({"a": torch.zeros(1)}, tmp_path / "new")
    (tmp_path / "new").replace(path)
    assert mapped_copies(whole) == {}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
@pytest.mark.parametrize("shape", [(3, 5), (7,), (), (0, 4)])
def test_a_file_as_a_tensor(dtype: torch.dtype, shape: tuple[int, ...], tmp_path: Path) -> None:
    values = torch.randn(shape).to(dtype)
    path = tmp_path / "values"
    path.write_bytes(values.reshape(-1).view(torch.uint8).numpy().tobytes())
    found = map_tensor(path, dtype, shape)
    assert found.dtype == dtype
    assert torch.equal(found, values)


@LINUX
def test_loaded_weights_can_stay_in_their_file(tmp_path: Path) -> None:
    small = fxcompress.compile(net(), rules(), data())
    fxcompress.save(small, tmp_path)
    path = tmp_path / WEIGHTS
    loaded = fxcompress.load(tmp_path, Net(), mapped=True)
    assert all(in_file(tensor, path) for tensor in loaded.parameters())
    assert torch.equal(loaded(data()[0]), small(data()[0]))
    read = fxcompress.load(tmp_path, Net())
    assert not any(in_file(tensor, path) for tensor in read.parameters())
    # What is written stays here, and the file may be saved over meanwhile.
    with torch.no_grad():
        loaded.up.bias.zero_()
    assert torch.equal(fxcompress.load(tmp_path, Net())(data()[0]), small(data()[0]))
    fxcompress.save(loaded, tmp_path)
    assert torch.equal(loaded(data()[0]), fxcompress.load(tmp_path, Net())(data()[0]))


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_a_hugging_face_model_is_loaded_without_a_second_copy(
    tied: bool, mapped: bool, tmp_path: Path
) -> None:
    small = fxcompress.compile(llama(tied=tied), "every-linear", tokens(), keep=0.6)
    fxcompress.save(small, tmp_path, max_shard_size="8KB")
    loaded = fxcompress.load(tmp_path, mapped=mapped)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert torch.equal(loaded(**tokens()[0]).logits, small(**tokens()[0]).logits)
    assert torch.equal(
        loaded.generate(tokens()[0]["input_ids"], max_new_tokens=4, do_sample=False),
        small.generate(tokens()[0]["input_ids"], max_new_tokens=4, do_sample=False),
    )


@pytest.mark.parametrize("mapped", [False, True])
def test_a_model_is_loaded_into_one_without_memory(mapped: bool, tmp_path: Path) -> None:
    small = fxcompress.compile(net(), rules(), data())
    fxcompress.save(small, tmp_path)
    with torch.device("meta"):
        empty = Net()
    loaded = fxcompress.load(tmp_path, empty, mapped=mapped)
    assert loaded is empty
    assert torch.equal(loaded(data()[0]), small(data()[0]))
    assert all(parameter.requires_grad for parameter in loaded.parameters())


def test_ties_of_a_model_without_memory_stay(tmp_path: Path) -> None:
    small = fxcompress.compile(tied_to(net(classes=24)), rules(name=["up", "down"]), data())
    fxcompress.save(small, tmp_path)
    with torch.device("meta"):
        empty = tied_to(Net(classes=24))
    loaded = fxcompress.load(tmp_path, empty, mapped=True)
    assert loaded.extra is loaded.head.weight
    assert torch.equal(loaded(data()[0]), small(data()[0]))


def tied_to(model: Any) -> Any:
    model.extra = model.head.weight
    return model


def test_mapped_weights_are_on_the_processor(tmp_path: Path) -> None:
    fxcompress.save(fxcompress.compile(net(), rules(), data()), tmp_path)
    with pytest.raises(LoadError, match="they cannot be on meta"):
        fxcompress.load(tmp_path, Net(), device="meta", mapped=True)


def test_an_offloaded_compressed_model_is_saved(tmp_path: Path) -> None:
    small = fxcompress.compile(net(), rules(), data())
    fxcompress.save(small, tmp_path / "a")
    fxcompress.save(disk_offload(small, tmp_path / "parts"), tmp_path / "b", max_shard_size="4KB")
    one, other = (fxcompress.load(tmp_path / name, Net()) for name in "ab")
    assert all(map(torch.equal, one.state_dict().values(), other.state_dict().values()))
    assert fxcompress.plan_of(one) == fxcompress.plan_of(other)


LARGE = """
import ctypes, gc, re, sys, threading
from pathlib import Path
import torch
from accelerate import disk_offload
from safetensors.torch import load_file, save_file
from torch import nn
import fxcompress

class Large(nn.Module):
    def __init__(self, words, layers):
        super().__init__()
        self.words = nn.Embedding(words, 128)
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(layers))
    def forward(self, x):
        x = self.words(x)
        for layer in self.layers:
            x = x + layer(x).relu()
        return x

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

def given(model, place):
    if sys.argv[1] == "disk":
        return disk_offload(model, place / "parts")
    save_file(model.state_dict(), place / "m")
    model.load_state_dict(load_file(place / "m"), assign=True)
    return model

def peak(words, place):
    # MiB beside what there was before, of compressing and saving
    place.mkdir()
    model = given(Large(words, 3), place)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    start = most = anonymous()
    done = threading.Event()
    def watch():
        nonlocal most
        while not done.wait(0.001):
            most = max(most, anonymous())
    thread = threading.Thread(target=watch)
    thread.start()
    small = fxcompress.compile(model, sys.argv[3], batches)
    fxcompress.save(small, place / "saved")
    done.set()
    thread.join()
    del small
    return most - start, loading(words, place)

def loading(words, place):
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = anonymous()
    with torch.device("meta"):
        empty = Large(words, 3)
    loaded = fxcompress.load(place / "saved", empty, mapped=True)
    loaded(batches[0])
    return anonymous() - before

place = Path(sys.argv[2])
batches = [torch.arange(32).reshape(2, 16) for _ in range(2)]
peak(64, place / "first")  # what is imported and made once
print(*peak(64, place / "second"), *peak(300_000, place / "third"))
"""


@LINUX
@pytest.mark.parametrize("kind", ["mapped", "disk"])
def test_memory_does_not_grow_with_weights_that_stay_as_they_are(kind: str, tmp_path: Path) -> None:
    """A table of 146 MiB is in no step in memory."""
    (tmp_path / "rules.yaml").write_text(
        "budget: {keep: 0.5, of: matched}\n"
        "rules: [{id: a, match: {node: {op: linear}}, rewrite: {form: low_rank}}]\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", LARGE, kind, str(tmp_path),
         str(tmp_path / "rules.yaml")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    few, few_loaded, many, many_loaded = map(float, done.stdout.split())
    assert few > 0.1  # MiB: something was measured
    assert many - few < 146 / 4
    assert many_loaded - few_loaded < 146 / 4
