"""The shared part of joint layers: computed once, and never at the wrong moment."""

from __future__ import annotations

import copy
import gc
import pickle
import shutil
import threading
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from torch.utils.checkpoint import checkpoint

from fxcompress.rewrite import JointMember
from tests.full_rank import factorized, rewrite

N, RANK = 12, 5


class Attention(nn.Module):
    """Three projections of one input; ``between`` runs before the second is called."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(N, 10)
        self.k = nn.Linear(N, 6, bias=False)
        self.v = nn.Linear(N, 6)
        self.between: Any = None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x)
        if self.between is not None:
            self.between(x)
        return torch.cat([q, self.k(x), self.v(x)], -1)


class Calls:
    """Counts how often the shared part runs."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        model.q.shared.down.register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.count += 1


def joint(rank: int = RANK) -> tuple[Attention, Attention]:
    """Two of the same: one with the memo, one that computes everything by itself."""
    torch.manual_seed(0)
    pair = rewrite(Attention().double(), torch.randn(4, N).double(), "joint", rank)
    plain = copy.deepcopy(pair.model)
    for layer in factorized(plain).values():
        layer.joint.values = lambda x, member, layer=layer: layer.joint._compute(x)
    return pair.model, plain


def rows(*size: int) -> Tensor:
    return torch.randn(*(size or (4,)), N, dtype=torch.float64)


@pytest.fixture
def pair() -> tuple[Attention, Attention]:
    return joint()


def test_it_runs_once_a_pass(pair: tuple[Attention, Attention]) -> None:
    model, plain = pair
    calls = Calls(model)
    for done, x in enumerate([rows(), rows(2, 3), rows()], start=1):
        assert torch.equal(model(x), plain(x))
        assert calls.count == done
    x = rows()
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    assert calls.count == 4
    assert torch.equal(model(x), plain(x))  # the same tensor again
    assert torch.equal(model(x), plain(x))
    assert calls.count == 6


def test_parameters_are_counted_once(pair: tuple[Attention, Attention]) -> None:
    model, _ = pair
    names = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert names == {
        "q.body.up.weight": (10, RANK),
        "q.body.up.bias": (10,),
        "q.shared.down.weight": (RANK, N),
        "k.body.up.weight": (6, RANK),
        "v.body.up.weight": (6, RANK),
        "v.body.up.bias": (6,),
    }
    assert model.state_dict().keys() == names.keys()


def test_gradients(pair: tuple[Attention, Attention]) -> None:
    model, plain = pair
    calls = Calls(model)
    for _ in range(2):  # accumulated over two passes
        x = rows().requires_grad_()
        y = x.detach().clone().requires_grad_()
        model(x).square().sum().backward()
        plain(y).square().sum().backward()
        torch.testing.assert_close(x.grad, y.grad)
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad)
    assert calls.count == 2


def test_an_optimizers_step_is_noticed(pair: tuple[Attention, Attention]) -> None:
    """Also between two members, and though the input is the same tensor."""
    model, _ = pair
    x = rows()

    def step(_: Tensor) -> None:
        with torch.no_grad():
            model.q.shared.down.weight.mul_(2)

    model.between = step
    before = model.k.joint.module(x)[0].detach().clone()
    out = model(x)
    k = out[:, 10:16]
    torch.testing.assert_close(k, model.k.body.up(2 * before))


@pytest.mark.parametrize("write", ["method", "data", "setitem", "view"])
def test_inputs_changed_in_place_are_seen(pair: tuple[Attention, Attention], write: str) -> None:
    model, plain = pair
    writes = {
        "method": lambda x: x.mul_(2),
        "data": lambda x: torch.add(x, 1, out=x),
        "setitem": lambda x: x.__setitem__(0, 3.0),
        "view": lambda x: x[1:].neg_(),
    }
    for each in (model, plain):
        each.between = writes[write]
    x = rows()
    with torch.no_grad():
        assert torch.equal(model(x.clone()), plain(x.clone()))


def test_other_modes_compute_anew(pair: tuple[Attention, Attention]) -> None:
    """A value made without a graph is not handed to a member that needs one."""
    model, _ = pair
    x = rows()
    with torch.no_grad():
        model.q(x)
    assert model.k(x).requires_grad
    model.k(x).sum().backward()
    assert model.q.shared.down.weight.grad is not None
    with torch.autocast("cpu", torch.bfloat16):
        low = model.float().q(x.float())
    assert low.dtype == torch.bfloat16
    assert model.k(x.float()).dtype == torch.float32


def test_a_member_that_is_asked_twice_computes_anew(pair: tuple[Attention, Attention]) -> None:
    model, plain = pair
    calls = Calls(model)
    x = rows()
    for _ in range(3):
        assert torch.equal(model.k(x), plain.k(x))
    assert calls.count == 3
    # Two backward passes through one tensor would need retain_graph.
    model.k(x).sum().backward()
    model.k(x).sum().backward()


@pytest.mark.parametrize("reentrant", [True, False])
def test_checkpointing(pair: tuple[Attention, Attention], reentrant: bool) -> None:
    model, plain = pair
    calls = Calls(model)
    x = rows().requires_grad_()
    y = x.detach().clone().requires_grad_()
    checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
    plain(y).square().sum().backward()
    torch.testing.assert_close(x.grad, y.grad)
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad)
    assert calls.count == 2  # forward, and once more in the backward pass


def test_a_checkpoint_around_one_member_only(pair: tuple[Attention, Attention]) -> None:
    model, plain = pair
    x = rows().requires_grad_()
    y = x.detach().clone().requires_grad_()
    q = model.q(x)
    k = checkpoint(model.k, x, use_reentrant=False)
    (q.sum() + k.square().sum() + model.v(x).sum()).backward()
    (plain.q(y).sum() + plain.k(y).square().sum() + plain.v(y).sum()).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_nothing_is_kept(pair: tuple[Attention, Attention]) -> None:
    model, _ = pair
    x = rows()
    with torch.no_grad():
        model(x)
        assert model.q.joint._computed is None
        model.q(x)  # the others never come
    assert model.q.joint._computed is not None
    held = weakref.ref(model.q.joint._computed.values[0])
    del x
    gc.collect()
    assert model.q.joint._computed is None
    assert held() is None


def test_inference_mode_is_right(pair: tuple[Attention, Attention]) -> None:
    """Without versions a write could not be seen, so nothing is handed on."""
    model, plain = pair
    for each in (model, plain):
        each.between = lambda x: x.mul_(2)
    with torch.inference_mode():
        x = rows()
        assert torch.equal(model(x.clone()), plain(x.clone()))


@pytest.mark.parametrize("treat", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_among_themselves(pair: tuple[Attention, Attention], treat: Any) -> None:
    model, plain = pair
    x = rows()
    model.q(x)  # a value is held, which must not travel
    twin = treat(model)
    assert {layer.joint.module for layer in factorized(twin).values()} == {twin.q.shared}
    assert twin.q.shared is not model.q.shared
    assert twin.q.joint._computed is None
    calls = Calls(twin)
    assert torch.equal(twin(x), plain(x))
    assert calls.count == 1
    with torch.no_grad():
        twin.q.shared.down.weight.zero_()
    assert not torch.equal(twin.v(x), plain.v(x))
    assert torch.equal(model.v(x), plain.v(x))


def test_moving_and_loading(pair: tuple[Attention, Attention]) -> None:
    model, plain = pair
    x = rows()
    assert model.float()(x.float()).dtype == torch.float32
    model.double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    model.load_state_dict(plain.state_dict())
    assert torch.equal(model(x), plain(x))
    model.load_state_dict(plain.state_dict(), assign=True)
    assert torch.equal(model(x), plain(x))


COMPILER = pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")


@pytest.mark.parametrize(
    "backend", ["eager", "aot_eager", pytest.param("inductor", marks=COMPILER)]
)
def test_compiled(pair: tuple[Attention, Attention], backend: str) -> None:
    model, plain = pair
    torch.compiler.reset()
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for x in (rows(), rows()):
        torch.testing.assert_close(compiled(x), plain(x))
    y = rows().requires_grad_()
    compiled(y).square().sum().backward()
    plain(y.detach()).square().sum().backward()
    wanted = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, wanted[name].grad)


def test_the_compiler_computes_the_shared_part_once(pair: tuple[Attention, Attention]) -> None:
    """What torch is shown three times it merges before it makes code for training."""
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.compilers import min_cut_rematerialization_partition, nop

    graphs: list[fx.GraphModule] = []

    def keep(graph: fx.GraphModule, inputs: Any) -> Any:
        graphs.append(graph)
        return nop(graph, inputs)

    model, _ = pair
    torch.compiler.reset()
    backend = aot_autograd(fw_compiler=keep, partition_fn=min_cut_rematerialization_partition)
    torch.compile(model, backend=backend, fullgraph=True)(rows().requires_grad_())
    products = [n for n in graphs[0].graph.nodes if "mm" in str(n.target)]
    assert len(products) == 4


def test_exported(pair: tuple[Attention, Attention]) -> None:
    model, plain = pair
    x = rows()
    exported = torch.export.export(model.eval(), (x,)).module()
    torch.testing.assert_close(exported(x), plain(x))


def test_vmap_and_functional_call(pair: tuple[Attention, Attention]) -> None:
    model, plain = pair
    x = rows(3, 4)
    torch.testing.assert_close(torch.vmap(model)(x), plain(x))
    halved = {name: p / 2 for name, p in model.named_parameters()}
    model.q(x)
    found = torch.func.functional_call(model, halved, (x,))
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter /= 2
    torch.testing.assert_close(found, plain(x))


def test_threads_do_not_mix_their_inputs(pair: tuple[Attention, Attention]) -> None:
    model, plain = pair
    inputs = [rows() for _ in range(8)]
    wanted = [plain(x).detach() for x in inputs]
    wrong: list[int] = []

    def work(index: int) -> None:
        outputs = (model(inputs[index]).detach() for _ in range(50))
        wrong.extend(index for out in outputs if not torch.equal(out, wanted[index]))

    threads = [threading.Thread(target=work, args=(index,)) for index in range(len(inputs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_weights_are_those_of_the_truncated_stack(pair: tuple[Attention, Attention]) -> None:
    model, _ = pair
    x = rows()
    for name, layer in factorized(model).items():
        assert isinstance(layer, JointMember)
        wanted = nn.functional.linear(x, layer.weight, layer.bias)
        torch.testing.assert_close(layer(x), wanted)
        assert torch.linalg.matrix_rank(layer.weight) == RANK
        assert "as joint of rank 5" in repr(layer), name
    assert model.k.bias is None
    (model.v.weight.square().sum() + model.v.bias.sum()).backward()
    assert model.q.shared.down.weight.grad is not None


def test_full_rank_is_the_dense_model() -> None:
    torch.manual_seed(0)
    pair = rewrite(Attention().double(), rows(), "joint")
    x = rows()
    torch.testing.assert_close(pair.model(x), pair.original(x), rtol=0, atol=1e-11)
