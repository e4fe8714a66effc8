"""Models that do odd things: each is compressed, or refused by an error that says what to do."""

from __future__ import annotations

import json
import warnings
from collections import namedtuple
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import rnn
from torch.utils.checkpoint import checkpoint

import fxcompress
from fxcompress.errors import CalibrationError, FxcompressError, RecordError, RewriteError
from tests.small import rules, unchanged

Build = Callable[["Odd"], None]
Run = Callable[..., Any]


class Odd(nn.Module):
    """Two linear layers, whatever ``build`` adds, and any forward."""

    def __init__(self, run: Run, build: Build | None = None) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 8)
        self.run = run
        if build is not None:
            build(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.run(self, *args, **kwargs)


def adds(**members: Callable[[], Any]) -> Build:
    def build(model: Odd) -> None:
        for name, make in members.items():
            if name.startswith("buffer_"):
                model.register_buffer(name, make(), persistent=False)
            else:
                setattr(model, name, make())

    return build


def parameter(*size: int) -> Callable[[], nn.Parameter]:
    return lambda: nn.Parameter(torch.randn(*size))


@dataclass
class Result:
    logits: Tensor
    more: list[Tensor]


class Boxes(nn.Module):
    def forward(self, x: Tensor) -> Result:
        return Result(x.relu(), [x])


class Unboxes(nn.Module):
    def forward(self, given: Result) -> Tensor:
        return given.logits + given.more[0]


Pair = namedtuple("Pair", "x y")


class Strict(Pair):
    """Takes nothing but tensors, as ``PackedSequence`` does."""

    def __new__(cls, x: Tensor, y: Tensor) -> Strict:
        assert x.device == y.device
        return super().__new__(cls, x, y)


class Adds(nn.Module):
    def forward(self, pair: Strict) -> Tensor:
        return pair.x + pair.y


class Root(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.sign() * x.abs().sqrt()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


@torch.jit.script
def scripted_gelu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(1.7 * x)


def packs(model: Odd, x: Tensor) -> Tensor:
    packed = rnn.pack_padded_sequence(model.a(x).relu(), [10, 7], batch_first=True)
    return model.b(rnn.pad_packed_sequence(model.rnn(packed)[0], batch_first=True)[0])


def in_place(model: Odd, x: Tensor) -> Tensor:
    y = model.a(x)
    y += x
    y[:, 0] = 0
    return model.b(y.mul_(2))


def in_autocast(model: Odd, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        h = model.a(x)
    return model.b(h.float())


def takes_a_gradient(model: Odd, x: Tensor) -> Tensor:
    with torch.enable_grad():
        y = x.detach().requires_grad_()
        (slope,) = torch.autograd.grad(model.a(y).tanh().sum(), y, create_graph=True)
    return model.b(slope)


def jagged(model: Odd, x: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor([x[:2], x[2:]], layout=torch.jagged)
    return model.b(model.a(rows).values())


def strided(model: Odd, x: Tensor) -> Tensor:
    rows = torch.nested.nested_tensor([x[:2], x[2:]])
    return model.b(torch.nested.to_padded_tensor(model.a(rows), 0.0))


def ensemble(model: Odd, x: Tensor) -> Tensor:
    held = torch.func.stack_module_state(list(model.three))

    def one(parameters: Any, buffers: Any, row: Tensor) -> Tensor:
        return torch.func.functional_call(model.three[0], (parameters, buffers), (row,))

    return model.b(model.a(x) + torch.func.vmap(one, in_dims=(0, 0, None))(*held, x).sum(0))


def derivative(model: Odd, x: Tensor) -> Tensor:
    return model.b(torch.func.grad(lambda y: model.a(y).tanh().sum())(x))


def conditional(model: Odd, x: Tensor) -> Tensor:
    return model.b(torch.cond(x.sum() > 0, lambda y: model.a(y), lambda y: model.a(y) * 2, (x,)))


def yields(model: Odd, x: Tensor) -> Iterator[Tensor]:
    yield model.b(model.a(x))


WORKS: dict[str, tuple[Run, Build | None]] = {
    "a parameter into a module": (
        lambda m, x: m.b(m.a(x) + m.norm(m.q)),
        adds(q=parameter(16), norm=lambda: nn.LayerNorm(16)),
    ),
    "a view of a parameter into a module": (
        lambda m, x: m.b(m.a(x) + m.norm(m.q.expand(len(x), -1))),
        adds(q=parameter(1, 16), norm=lambda: nn.LayerNorm(16)),
    ),
    "a slice of a parameter into a linear layer": (
        lambda m, x: m.b(x + m.a(m.q[1:3]).sum(0)),
        adds(q=parameter(4, 16)),
    ),
    "a buffer into a linear layer": (
        lambda m, x: m.b(x + m.a(m.buffer_q.expand(len(x), -1))),
        adds(buffer_q=lambda: torch.randn(1, 16)),
    ),
    "a view as output": (lambda m, x: m.b(m.a(x)).view(-1, 2, 4).transpose(1, 2), None),
    "a list as output": (lambda m, x: [m.b(m.a(x)), m.b(x)], None),
    "a dataclass as output": (lambda m, x: Result(m.b(m.a(x)), []), None),
    "a dataclass between modules": (
        lambda m, x: m.b(m.back(m.there(m.a(x)))),
        adds(there=Boxes, back=Unboxes),
    ),
    "a container that takes tensors only": (
        lambda m, x: m.b(m.both(Strict(m.a(x), x))),
        adds(both=Adds),
    ),
    "writes in place": (in_place, None),
    "autocast inside": (in_autocast, None),
    "vmap over rows": (lambda m, x: m.b(torch.func.vmap(lambda row: m.a(row).relu())(x)), None),
    "vmap of everything": (
        lambda m, x: torch.func.vmap(lambda row: m.b(m.a(row).relu()))(x),
        None,
    ),
    "vmap in vmap": (
        lambda m, x: m.b(torch.func.vmap(torch.func.vmap(m.a))(x.view(2, -1, 16))).flatten(0, 1),
        None,
    ),
    "vmap over another dimension": (
        lambda m, x: m.b(torch.func.vmap(m.a, in_dims=1, out_dims=1)(x.view(2, -1, 16))),
        None,
    ),
    "an ensemble of states": (
        ensemble,
        adds(three=lambda: nn.ModuleList(nn.Linear(16, 16) for _ in range(3))),
    ),
    "a functional call": (
        lambda m, x: m.b(torch.func.functional_call(m.a, dict(m.a.named_parameters()), (x,))),
        None,
    ),
    "a gradient taken inside": (takes_a_gradient, None),
    "a function with a backward of its own": (lambda m, x: m.b(Root.apply(m.a(x))), None),
    "a checkpoint": (
        lambda m, x: m.b(checkpoint(lambda y: m.a(y).relu(), x, use_reentrant=False)),
        None,
    ),
    "a sparse buffer": (
        lambda m, x: m.b(m.a(x) + torch.sparse.mm(m.buffer_s, x)),
        adds(buffer_s=lambda: torch.eye(6).to_sparse()),
    ),
    "a compressed sparse buffer": (
        lambda m, x: m.b(m.a(x) + m.buffer_s @ x),
        adds(buffer_s=lambda: torch.eye(6).to_sparse_csr()),
    ),
    "complex numbers": (
        lambda m, x: m.b(torch.fft.irfft(torch.fft.rfft(m.a(x)) * m.w, n=16)),
        adds(w=lambda: nn.Parameter(torch.randn(9, dtype=torch.complex64))),
    ),
    "a complex layer": (
        lambda m, x: m.b(m.a(m.c(x.to(torch.complex64)).real)),
        adds(c=lambda: nn.Linear(16, 16, dtype=torch.complex64)),
    ),
    "weight_norm": (
        lambda m, x: m.b(m.w(m.a(x))),
        adds(w=lambda: nn.utils.parametrizations.weight_norm(nn.Linear(16, 16))),
    ),
    "spectral_norm": (
        lambda m, x: m.b(m.w(m.a(x))),
        adds(w=lambda: nn.utils.spectral_norm(nn.Linear(16, 16))),
    ),
    "calls with different shapes": (
        lambda m, x: m.b(sum(m.a(x[:n]).sum(0, keepdim=True) for n in (1, 2, 5))),
        None,
    ),
    "a scripted function": (lambda m, x: m.b(scripted_gelu(m.a(x))), None),
    "a scripted part": (
        lambda m, x: m.b(m.part(m.a(x))),
        adds(part=lambda: torch.jit.script(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))),
    ),
    "a traced layer": (
        lambda m, x: m.b(m.part(m.a(x))),
        adds(part=lambda: torch.jit.trace(nn.Linear(16, 16), torch.randn(2, 16))),
    ),
    "a compiled part": (
        lambda m, x: m.b(m.part(m.a(x))),
        adds(part=lambda: torch.compile(nn.Sequential(nn.Linear(16, 16), nn.ReLU()))),
    ),
    "a module made in the forward": (lambda m, x: m.b(nn.LayerNorm(16)(m.a(x))), None),
    "an empty layer": (
        lambda m, x: m.b(m.a(x)) + m.z(x).sum(),
        adds(z=lambda: nn.Linear(16, 0)),
    ),
    "rows picked by their values": (lambda m, x: m.b(m.a(x[x[:, 0] > -9])), None),
    "a cell in a loop": (
        lambda m, x: m.b(m.cell(m.a(x), m.cell(x))),
        adds(cell=lambda: nn.GRUCell(16, 16)),
    ),
}


def batches(*size: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*(size or (6, 16)), generator=generator) for _ in range(2)]


def compressed(model: nn.Module, data: list[Any], **given: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fxcompress.compile(model, rules(0.7, **given), data, progress=False)


@pytest.mark.parametrize("name", WORKS)
def test_it_is_compressed(name: str) -> None:
    torch.manual_seed(0)
    run, build = WORKS[name]
    model, data = Odd(run, build).eval(), batches()
    with unchanged(model):
        small = compressed(model, data)
    plan = fxcompress.plan_of(small)
    assert {site.name for site in plan.sites} & {"a", "b"}
    assert plan.rewritten
    small(data[0])
    assert all(p.is_leaf for p in small.parameters())
    own = {p.data_ptr() for p in model.parameters() if p.numel()}
    assert not own & {p.data_ptr() for p in small.parameters() if p.numel()}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_types(dtype: torch.dtype) -> None:
    model = Odd(lambda m, x: m.b(m.a(x).relu())).to(dtype).eval()
    data = [each.to(dtype) for each in batches()]
    assert compressed(model, data)(data[0]).dtype == dtype


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_packed_sequences(kind: type[nn.Module]) -> None:
    model = Odd(packs, adds(rnn=lambda: kind(16, 16, batch_first=True))).eval()
    small = compressed(model, batches(2, 10, 16))
    told = {each.weight: each.reason for each in fxcompress.plan_of(small).unmatched}
    assert "inside, out of the reach of rules" in told["rnn.weight_ih_l0"]


def test_jagged_tensors() -> None:
    """All rows count; forms that permute channels have no operator for them in torch."""
    model = Odd(jagged).eval()
    small = compressed(model, batches(), rewrite={"form": "low_rank"})
    assert fxcompress.plan_of(small).rewritten
    assert fxcompress.plan_of(small).model_before.macs == 6 * (16 * 16 + 16 * 8)
    with pytest.raises(RewriteError, match="take that one out of the rules"):
        compressed(model, batches(), rewrite={"form": "pivoted"})


def test_vmap_is_measured_as_what_it_computes() -> None:
    """The same model with and without it: the same inputs, gradients, ranks and losses."""
    torch.manual_seed(0)
    plain = Odd(lambda m, x: m.b(m.a(x).relu())).eval()
    mapped = Odd(WORKS["vmap of everything"][0]).eval()
    mapped.load_state_dict(plain.state_dict())
    sites = [fxcompress.plan_of(compressed(model, batches())).sites for model in (plain, mapped)]
    for left, right in zip(*sites, strict=True):
        assert (left.rank, left.form) == (right.rank, right.form)
        assert left.predicted == pytest.approx(right.predicted, rel=1e-5)


def test_convolutions_in_vmap() -> None:
    def run(model: Odd, x: Tensor) -> Tensor:
        images = x.view(2, 3, 4, 4)
        each = torch.func.vmap(model.conv)(images) if model.mapped else model.conv(images)
        return model.b(each.flatten(1))

    sites = []
    for mapped in (False, True):
        torch.manual_seed(0)
        model = Odd(run, adds(conv=lambda: nn.Conv2d(3, 4, 3))).eval()
        model.mapped = mapped
        text = {
            "budget": {"keep": 0.7},
            "rules": [
                {"id": "c", "match": {"node": {"op": "conv2d"}}, "rewrite": {"form": "tucker2"}}
            ],
        }
        loaded = fxcompress.rules.parse_rules(json.dumps(text), "conv.yaml")
        sites.append(fxcompress.plan(model, loaded, batches(2, 48)).sites[0])
    assert sites[0].rank == sites[1].rank
    assert sites[0].predicted == pytest.approx(sites[1].predicted, rel=1e-5)


def test_compiled_models_run_as_they_were_written() -> None:
    """Nothing is compiled for the sake of hooks that are gone afterwards."""
    compilations = []

    def backend(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        compilations.append(graph)
        return graph.forward

    model = Odd(lambda m, x: m.b(m.part(m.a(x)))).eval()
    model.part = torch.compile(nn.Sequential(nn.Linear(16, 16), nn.ReLU()), backend=backend)
    small = compressed(model, batches())
    assert not compilations
    assert "part._orig_mod.0" in {site.name for site in fxcompress.plan_of(small).sites}
    model(batches()[0])
    assert compilations  # afterwards it is compiled as ever


@pytest.mark.parametrize("metric", ["euclidean", "activation", "kfac"])
def test_a_model_made_in_inference_mode(metric: str) -> None:
    with torch.inference_mode():
        model = Odd(lambda m, x: m.b(m.a(x).relu())).eval()
        model.tied = nn.Linear(16, 16)
        model.tied.weight = model.a.weight
        data = batches()
    small = compressed(model, data, metric=metric, name="b")
    assert not any(p.is_inference() for p in small.parameters())
    assert small.tied.weight is small.a.weight
    small(batches()[0]).sum().backward()


# ---- refused ----------------------------------------------------------------------------


def meta() -> nn.Module:
    with torch.device("meta"):
        return Odd(lambda m, x: m.b(m.a(x)))


def subclassed() -> nn.Module:
    class Own(Tensor):
        pass

    model = Odd(lambda m, x: m.b(m.a(x)))
    model.a.weight = nn.Parameter(model.a.weight.detach().as_subclass(Own))
    return model


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 8))


REFUSED: dict[str, tuple[Callable[[], nn.Module], type[FxcompressError], str]] = {
    "lazy": (
        lambda: Odd(lambda m, x: m.b(m.l(x)), adds(l=lambda: nn.LazyLinear(16))),
        RecordError,
        "l.weight has no shape yet .* call the model on a batch once",
    ),
    "meta": (meta, CalibrationError, "load the model's weights first"),
    "scripted": (lambda: torch.jit.script(plain()), RecordError, "was scripted or traced from"),
    "traced": (
        lambda: torch.jit.trace(plain(), torch.randn(2, 16)),
        RecordError,
        "was scripted or traced from",
    ),
    "a parameter that cannot be copied": (subclassed, RecordError, "cannot be copied"),
    "a file": (
        lambda: Odd(lambda m, x: m.b(m.a(x)), adds(file=lambda: (i for i in range(3)))),
        RecordError,
        "take what cannot be copied off the model",
    ),
    "strided nested tensors": (lambda: Odd(strided), RecordError, "layout=torch.jagged"),
    "a derivative by torch.func": (
        lambda: Odd(derivative),
        CalibrationError,
        "takes derivatives of a .*unless: .*activation",
    ),
    "a branch of torch.cond": (
        lambda: Odd(conditional),
        CalibrationError,
        "a runs where no gradient can be followed .*unless: .*activation",
    ),
    "a generator": (lambda: Odd(yields), RecordError, "forward=lambda model, batch: list"),
    "no layer": (lambda: nn.Sequential(nn.ReLU()), fxcompress.RuleError, "match nothing"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_it_is_refused_with_what_to_do(name: str) -> None:
    make, error, text = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = make().eval()
    with pytest.raises(error, match=f"(?s){text}"):
        compressed(model, batches())


@pytest.mark.parametrize("name", ["a derivative by torch.func", "a branch of torch.cond"])
def test_what_the_error_advises_works(name: str) -> None:
    make, _, _ = REFUSED[name]
    assert fxcompress.plan_of(compressed(make().eval(), batches(), metric="activation")).rewritten


def test_sharded_parameters(tmp_path: Path) -> None:
    """As of FSDP2: what one process holds is not the weight."""
    from torch import distributed
    from torch.distributed.fsdp import fully_shard

    store = distributed.FileStore(str(tmp_path / "store"), 1)
    distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        model = plain()
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        fully_shard(model, mesh=mesh)
        with pytest.raises(RecordError, match=r"0.weight is sharded .*before it is sharded"):
            compressed(model, batches())
    finally:
        distributed.destroy_process_group()
