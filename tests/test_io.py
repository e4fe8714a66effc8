"""Saved and loaded again: the same outputs to the bit, or an error and nothing touched."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, fx, nn

import fxcompress
from fxcompress import LoadError, RewriteError, plan_of
from fxcompress.rewrite import Factorized
from tests.small import Net, data, net, rules, unchanged
from tests.zoo import DECODER, ZOO, tensors

WEIGHTS = "model.fxcompress.safetensors"


def saved(path: Path, keep: float = 0.5) -> Net:
    """A small net, compressed and saved."""
    small = fxcompress.compile(net(), rules(keep), data())
    fxcompress.save(small, path)
    return small


def outputs(model: nn.Module, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(**batch) if isinstance(batch, dict) else model(batch))


def assert_same(a: nn.Module, b: nn.Module, batch: Any) -> None:
    """Equal to the bit: state, ties, plan and outputs."""
    x, y = a.state_dict(), b.state_dict()
    assert x.keys() == y.keys()
    assert all(torch.equal(x[key], y[key]) and x[key].dtype == y[key].dtype for key in x)
    assert plan_of(a) == plan_of(b)
    assert sum(p.numel() for p in a.parameters()) == sum(p.numel() for p in b.parameters())
    pairs = list(zip(outputs(a.eval(), batch), outputs(b, batch), strict=True))
    assert pairs
    assert all(torch.equal(p, q) for p, q in pairs)


def other_weights(model: nn.Module) -> nn.Module:
    """As freshly built: the weights of the model that is loaded into do not matter."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    return model


# ---- round trips ----------------------------------------------------------------------


def test_a_plain_module(tmp_path: Path) -> None:
    small = saved(tmp_path)
    fresh = other_weights(Net().train())
    loaded = fxcompress.load(tmp_path, fresh)
    assert loaded is fresh
    assert isinstance(loaded.up, Factorized)
    assert not any(module.training for module in loaded.modules())
    assert_same(small, loaded, data()[0])
    assert str(fxcompress.diff(net(), loaded)) == str(fxcompress.diff(net(), small))


def test_saved_again_it_is_the_same(tmp_path: Path) -> None:
    small = saved(tmp_path / "a")
    loaded = fxcompress.load(tmp_path / "a", Net())
    assert fxcompress.save(loaded, tmp_path / "deep" / "b") == tmp_path / "deep" / "b"
    assert_same(small, fxcompress.load(tmp_path / "deep" / "b", Net()), data()[0])
    first, second = ((tmp_path / p / "plan.json").read_text() for p in ("a", "deep/b"))
    assert first == second


def test_a_model_trained_after_compression(tmp_path: Path) -> None:
    small = fxcompress.compile(net(), rules(), data()).train()
    small(data()[0]).square().sum().backward()
    torch.optim.SGD(small.parameters(), 0.1).step()
    fxcompress.save(small, tmp_path)
    assert_same(small, fxcompress.load(tmp_path, Net()), data()[0])


@pytest.mark.parametrize("name", ["transformer_encoder", "attention", "bert", "lstm", "resnet"])
def test_architectures_that_are_built_by_hand(name: str, tmp_path: Path) -> None:
    case = ZOO[name]
    small = fxcompress.compile(case.build(), rules(0.6), [case.batch()])
    assert plan_of(small).rewritten
    fxcompress.save(small, tmp_path)
    loaded = fxcompress.load(tmp_path, other_weights(case.build()))
    assert_same(small, loaded, case.batch())
    assert_same(small, loaded, case.other_batch())


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(24, 4, batch_first=True)
        self.spare = nn.MultiheadAttention(24, 4, batch_first=True)
        self.head = nn.Linear(24, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.spare(*[self.attention(x, x, x)[0]] * 3)[0])


def test_attention(tmp_path: Path) -> None:
    """Only the attention that was rewritten is in pieces."""
    torch.manual_seed(0)
    x = torch.randn(4, 6, 24)
    small = fxcompress.compile(_Attention().eval(), rules(0.6, name="attention.*"), [x])
    assert any(site.name == "attention.q_proj" for site in plan_of(small).rewritten)
    assert type(small.spare) is nn.MultiheadAttention
    fxcompress.save(small, tmp_path)
    assert_same(small, fxcompress.load(tmp_path, other_weights(_Attention())), x)


def _sequential() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 10)).eval()


def test_a_graph_module(tmp_path: Path) -> None:
    small = fxcompress.compile(fx.symbolic_trace(_sequential()), rules(0.6), data())
    fxcompress.save(small, tmp_path)
    loaded = fxcompress.load(tmp_path, fx.symbolic_trace(other_weights(_sequential())))
    assert isinstance(loaded, fx.GraphModule)
    assert loaded.code == small.code
    assert_same(small, loaded, data()[0])


def test_an_exported_graph(tmp_path: Path) -> None:
    """Its linear layers are function calls until they are rewritten."""

    def exported() -> Any:
        return torch.export.export(_sequential(), (data()[0],)).module()

    small = fxcompress.compile(exported(), rules(0.6), data())
    assert plan_of(small).rewritten
    fxcompress.save(small, tmp_path)
    assert_same(small, fxcompress.load(tmp_path, other_weights(exported())), data()[0])


def test_a_model_compressed_twice(tmp_path: Path) -> None:
    once = fxcompress.compile(net(), rules(0.5, name="up"), data())
    twice = fxcompress.compile(once, rules(0.5, name="down"), data())
    fxcompress.save(twice, tmp_path)
    loaded = fxcompress.load(tmp_path, Net())
    assert isinstance(loaded.up, Factorized)
    assert isinstance(loaded.down, Factorized)
    assert_same(twice, loaded, data()[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_types_are_those_that_were_saved(dtype: torch.dtype, tmp_path: Path) -> None:
    """Whatever type the fresh model was built in."""
    batches = [x.to(dtype) for x in data()]
    small = fxcompress.compile(net().to(dtype), rules(), batches)
    fxcompress.save(small, tmp_path)
    for built in (torch.float32, dtype):
        fresh = Net().to(built)
        head = fresh.head.weight
        loaded = fxcompress.load(tmp_path, fresh)
        assert_same(small, loaded, batches[0])
        assert loaded.norm.num_batches_tracked.dtype == torch.int64
        assert loaded.head.weight is head  # an optimizer may have it already


class _Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(24, 50, bias=False)
        self.fc = nn.Linear(24, 24)
        self.embed = nn.Embedding(50, 24)
        self.embed.weight = self.head.weight
        self.twin = self.fc

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.twin(self.fc(self.embed(x))))


def test_tied_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    batch = torch.randint(50, (8, 6))
    small = fxcompress.compile(_Tied().eval(), rules(), [batch])
    fxcompress.save(small, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert len([key for key in file.keys() if "embed" in key or "head" in key]) == 1  # noqa: SIM118
    loaded = fxcompress.load(tmp_path, other_weights(_Tied()))
    assert loaded.embed.weight is loaded.head.weight
    assert loaded.twin is loaded.fc
    assert_same(small, loaded, batch)


# ---- Hugging Face ---------------------------------------------------------------------


def _llama(tied: bool = False, dtype: torch.dtype = torch.float32) -> nn.Module:
    config = transformers.LlamaConfig(**{**DECODER, "tie_word_embeddings": tied})
    model: nn.Module = transformers.LlamaForCausalLM._from_config(config, dtype=dtype)
    return model.eval()


HUGGING_FACE: dict[str, Callable[[], nn.Module]] = {
    "llama": _llama,
    "llama_tied": lambda: _llama(tied=True),
    "llama_bfloat16": lambda: _llama(dtype=torch.bfloat16),
    "gpt2": lambda: ZOO["gpt2"].build(),
}
PROMPT = torch.tensor([[5, 9, 17, 33], [6, 8, 20, 3]])
GENERATE = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False}

_LOADER = """
import sys
import torch, fxcompress
torch.set_num_threads(1)
prompt = torch.tensor({prompt})
for directory in sys.argv[1:]:
    model = fxcompress.load(directory)
    tokens = model.generate(input_ids=prompt, **{options})
    print(type(model).__name__, next(model.parameters()).dtype, tokens.tolist())
"""


def test_hugging_face_models_in_a_new_process(tmp_path: Path) -> None:
    """Nothing but the directory: the class, the config, and the same tokens."""
    wanted = []
    for name, make in HUGGING_FACE.items():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.mul_(3)  # so that the tokens say something about the weights
        batches = [{"input_ids": torch.randint(3, 128, (4, 16))} for _ in range(2)]
        small: Any = fxcompress.compile(model, rules(0.5), batches)
        fxcompress.save(small, tmp_path / name)
        tokens = small.generate(input_ids=PROMPT, **GENERATE)
        assert not torch.equal(tokens, model.generate(input_ids=PROMPT, **GENERATE))  # type: ignore[operator]
        dtype = next(small.parameters()).dtype
        wanted.append(f"{type(small).__name__} {dtype} {tokens.tolist()}")
        here = fxcompress.load(tmp_path / name)
        assert here.generation_config.to_dict() == small.generation_config.to_dict()
        assert_same(small, here, batches[0])
        if name == "llama_tied":
            assert here.lm_head.weight is here.model.embed_tokens.weight
    root = str(Path(fxcompress.__file__).parents[1])
    script = _LOADER.format(prompt=PROMPT.tolist(), options=GENERATE)
    done = subprocess.run(
        [sys.executable, "-c", script, *(str(tmp_path / name) for name in HUGGING_FACE)],
        capture_output=True, text=True, timeout=300, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == wanted


def test_from_pretrained_does_not_take_it_for_a_dense_model(tmp_path: Path) -> None:
    """It would fill what it cannot find with random numbers, and only warn."""
    batch = {"input_ids": PROMPT}
    small = fxcompress.compile(_llama(), rules(), [batch])
    fxcompress.save(small, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        WEIGHTS, "plan.json", "config.json", "generation_config.json"
    }  # fmt: skip
    with pytest.raises(OSError, match="no file named"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)


# ---- nothing is executed --------------------------------------------------------------


def test_nothing_is_pickled(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    batch = {"input_ids": PROMPT}
    small, llama = (
        fxcompress.compile(net(), rules(), data()),
        fxcompress.compile(_llama(), rules(), [batch]),
    )

    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("something was pickled")

    for name in ("load", "loads", "dump", "dumps", "Pickler", "Unpickler"):
        monkeypatch.setattr(pickle, name, refuse)
    for name in ("load", "save"):
        monkeypatch.setattr(torch, name, refuse)
    fxcompress.save(small, tmp_path / "net")
    fxcompress.load(tmp_path / "net", Net())
    fxcompress.save(llama, tmp_path / "llama")
    fxcompress.load(tmp_path / "llama")


@pytest.mark.parametrize(
    "name",
    [
        "os.system",
        "subprocess.Popen",
        "builtins.eval",
        "trap.Trap",
        "transformersx.models.trap.Trap",
        "transformers.Trainer",
        "transformers.utils.logging.os",
        "transformers.models.llama.modeling_llama.torch",
        "transformers.models.llama.modeling_llama.LlamaMLP",
        "transformers.models.llama.modeling_llama.NoSuchModel",
        "transformers.models.no_such_model.NoSuchModel",
        "transformers.models...os.system",
        "transformers.models.llama.__init__.system",
        "",
        ".",
    ],
)
def test_no_class_but_a_model_of_transformers_is_built(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "trap.py").write_text("raise SystemExit('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    fxcompress.save(fxcompress.compile(_llama(), rules(), [{"input_ids": PROMPT}]), tmp_path / "o")
    edit(tmp_path / "o", model_class=name)
    with pytest.raises(LoadError, match="model"):
        fxcompress.load(tmp_path / "o")
    assert "trap" not in sys.modules


def test_a_config_that_is_broken(tmp_path: Path) -> None:
    fxcompress.save(fxcompress.compile(_llama(), rules(), [{"input_ids": PROMPT}]), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for text, words in [
        ("{", "config.json"),
        (json.dumps({**config, "hidden_size": "wide"}), "config.json"),
        (json.dumps({**config, "hidden_size": 32}), "not what the plan was made for"),
        (json.dumps({**config, "num_hidden_layers": 1}), "no linear layer"),
        (json.dumps({**config, "num_hidden_layers": 3}), "the file has no model.layers.2"),
        (json.dumps({**config, "vocab_size": 99}), "lm_head is linear 64→99"),
    ]:
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(LoadError, match=words):
            fxcompress.load(tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(LoadError, match=r"load\(directory, model\)"):
        fxcompress.load(tmp_path)


# ---- strictness -----------------------------------------------------------------------


def edit(path: Path, **changes: Any) -> None:
    """Change entries of a saved plan."""
    plan = json.loads((path / "plan.json").read_text())
    (path / "plan.json").write_text(json.dumps({**plan, **changes}))


def refuse(path: Path, *words: str, model: nn.Module | None = None) -> None:
    """load() raises LoadError with these words, and the model is as it was."""
    model = net() if model is None else model
    with unchanged(model), pytest.raises(LoadError) as caught:
        fxcompress.load(path, model)
    assert all(word in str(caught.value) for word in words), caught.value


def test_a_model_without_a_plan(tmp_path: Path) -> None:
    for model in (net(), nn.Linear(2, 2), fx.symbolic_trace(_sequential())):
        with pytest.raises(RewriteError, match=r"did not come from fxcompress\.compile"):
            fxcompress.save(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("name", [WEIGHTS, "plan.json"])
def test_a_missing_file(name: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / name).unlink()
    refuse(tmp_path, name, "missing")
    (tmp_path / name).mkdir()
    refuse(tmp_path, name, "cannot be read")


def test_a_missing_directory(tmp_path: Path) -> None:
    refuse(tmp_path / "nowhere", "nowhere", "missing")
    (tmp_path / "file").write_text("")
    refuse(tmp_path / "file", "plan.json")


@pytest.mark.parametrize("size", [0, 4, 100, -1])
def test_truncated_weights(size: int, tmp_path: Path) -> None:
    saved(tmp_path)
    raw = (tmp_path / WEIGHTS).read_bytes()
    (tmp_path / WEIGHTS).write_bytes(raw[:size])
    refuse(tmp_path, WEIGHTS, "cannot be read")


def test_weights_that_are_no_safetensors(tmp_path: Path) -> None:
    saved(tmp_path)
    torch.save(net().state_dict(), tmp_path / WEIGHTS)
    refuse(tmp_path, WEIGHTS, "cannot be read")


def _rename(state: dict[str, Tensor]) -> None:
    state["up.body.other"] = state.pop("up.body.pivot.weight")


def _cut(state: dict[str, Tensor]) -> None:
    state["up.body.pivot.weight"] = state["up.body.pivot.weight"][:-1].contiguous()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("head.weight"), ["the file has no head.weight"]),
        (lambda state: state.pop("norm.running_mean"), ["the file has no norm.running_mean"]),
        (lambda state: state.clear(), ["the file has no", "more)"]),
        (lambda state: state.update(new=torch.ones(1)), ["the model has no new"]),
        (_rename, ["the file has no up.body.pivot.weight", "the model has no up.body.other"]),
        (_cut, ["up.body.pivot.weight is", "in the file"]),
        (lambda s: s.update({"head.weight": s["head.weight"].int()}), ["head.weight", "int32"]),
    ],
)
def test_weights_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], Any], words: list[str], tmp_path: Path
) -> None:
    saved(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    change(state)
    save_file(state, tmp_path / WEIGHTS)
    refuse(tmp_path, *words)


def _ordered(path: Path) -> Net:
    """A small net of which one layer has no pivots among its first channels, saved."""
    model = net()
    with torch.no_grad():
        model.up.weight[:, :8] = 0
    small = fxcompress.compile(model, rules(0.5), data())
    fxcompress.save(small, path)
    return small


def test_an_order_of_the_input_is_loaded(tmp_path: Path) -> None:
    small = _ordered(tmp_path)
    (order,) = (site.order for site in plan_of(small).sites if site.name == "up")
    assert order == len(small.up.body.order) > 0  # type: ignore[operator, union-attr, arg-type]
    assert_same(small, fxcompress.load(tmp_path, net()), data()[0])
    stored = load_file(tmp_path / WEIGHTS)
    assert sum(t.nbytes for t in stored.values()) == plan_of(small).model_after.bytes


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("up.body.order"), ["the file has no up.body.order"]),
        (lambda s: s.update({"up.body.order": s["up.body.order"].float()}), ["torch.float32"]),
    ],
)
def test_orders_that_do_not_fit(
    change: Callable[[dict[str, Tensor]], Any], words: list[str], tmp_path: Path
) -> None:
    _ordered(tmp_path)
    state = load_file(tmp_path / WEIGHTS)
    change(state)
    save_file(state, tmp_path / WEIGHTS)
    refuse(tmp_path, *words)


class _Table(Net):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.arange(3), persistent=False)


class _Convolution(Net):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Conv1d(24, 48, 1)  # type: ignore[assignment]


@pytest.mark.parametrize(
    ("model", "words"),
    [
        (nn.Sequential(nn.Linear(24, 48)), ["no linear layer up", "Sequential"]),
        (net(width=20), ["up is linear 20→40, the plan has linear 24→48"]),
        (net(classes=11), ["head is linear 24→11, the plan has linear 24→10"]),
        (_Table().to("meta"), ["table is on the meta device, and no save holds it"]),
    ],
)
def test_another_architecture(model: nn.Module, words: list[str], tmp_path: Path) -> None:
    saved(tmp_path)
    refuse(tmp_path, *words, model=model)


def test_a_compressed_model_is_not_a_fresh_one(tmp_path: Path) -> None:
    small = saved(tmp_path)
    refuse(tmp_path, "compressed already", model=small)


def test_no_model_where_one_is_needed(tmp_path: Path) -> None:
    saved(tmp_path)
    with pytest.raises(LoadError, match=r"load\(directory, model\)"):
        fxcompress.load(tmp_path)


def _site(**changes: Any) -> Callable[[dict[str, Any]], None]:
    return lambda plan: plan["sites"][0].update(changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plan: plan.update(format=3), ["format 3", "reads 4"]),
        (lambda plan: plan.update(format="2"), ["format 2"]),
        (lambda plan: plan.pop("format"), ["format None"]),
        (lambda plan: plan.update(extra=1), ["not a valid plan", "extra"]),
        (lambda plan: plan.pop("sites"), ["not a valid plan", "sites"]),
        (lambda plan: plan["budget"].update(keep=float("nan")), ["not a valid plan", "keep"]),
        (_site(form="__import__"), ["forms", "__import__"]),
        (_site(form=None), ["up: a form needs a rank"]),
        (_site(rank=None), ["up: a form needs a rank"]),
        (_site(rank=0), ["up: rank 0"]),
        (_site(rank=-3), ["up: rank -3"]),
        (_site(rank=10**9), ["up: rank 1000000000"]),
        (_site(rank=2), ["sites[0].after.parameters"]),
        (_site(order=5), ["sites[0].order", "does not put its channels in order in 5 blocks"]),
        (_site(order=48), ["sites[0].order"]),
        (_site(order=24), ["sites[0].after.bytes"]),
        (_site(dtype="load"), ["not a valid plan", "dtype"]),
        (_site(name="nowhere"), ["no linear layer nowhere"]),
        (_site(name=""), ["no linear layer"]),
        (_site(name="__class__"), ["no linear layer __class__"]),
        (_site(operator="linear 24→1000000000"), ["sites[0].operator", "24→1000000000"]),
        (lambda plan: plan["sites"].append(plan["sites"][0]), ["a site appears twice"]),
    ],
)
def test_a_plan_that_was_tampered_with(
    change: Callable[[dict[str, Any]], Any], words: list[str], tmp_path: Path
) -> None:
    saved(tmp_path)
    plan = json.loads((tmp_path / "plan.json").read_text())
    change(plan)
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    refuse(tmp_path, *words)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", "3", '"plan"', "\0", "[" * 10_000])
def test_a_plan_that_is_no_plan(text: str, tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "plan.json").write_text(text)
    refuse(tmp_path, "plan.json")


def test_a_plan_that_is_no_text(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "plan.json").write_bytes(b"\xff\xfe\x00")
    refuse(tmp_path, "plan.json", "cannot be read")


# ---- what is in the plan --------------------------------------------------------------


def test_no_paths_of_this_machine(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(
        "budget: {keep: 0.5}\n"
        "rules:\n"
        "  - {id: a, match: {node: {op: linear}}, rewrite: {form: pivoted}}\n"
        "  - {id: b, match: {node: {op: linear, name: nowhere}}, rewrite: {form: pivoted}}\n"
        "  - {id: c, priority: 1, match: {node: {op: linear, name: head}}, rewrite: none}\n"
    )
    with pytest.warns(fxcompress.FxcompressWarning, match=r"own\.yaml:4"):
        small = fxcompress.compile(net(), file, data())
    fxcompress.save(small, tmp_path / "out")
    text = (tmp_path / "out" / "plan.json").read_text()
    assert str(tmp_path) not in text
    assert '"rules":"own.yaml"' in text.replace(" ", "")
    assert "own.yaml:3" in text
    assert plan_of(small).warnings


def test_a_plan_survives_json(tmp_path: Path) -> None:
    small = saved(tmp_path)
    read = fxcompress.Plan.model_validate_json((tmp_path / "plan.json").read_text())
    assert read.save_id
    assert read.model_copy(update={"save_id": ""}) == plan_of(small)
