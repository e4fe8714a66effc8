"""An ``fx.GraphModule`` is rewritten in its graph."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

import fxcompress
from fxcompress.rewrite import Factorized, skeleton
from fxcompress.rewrite.lift import lift
from tests.full_rank import rewrite
from tests.small import rules

N = 16


class Network(nn.Module):
    """Linear layers as modules, one called twice, and one as a function of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(N, 24)
        self.again = nn.Linear(24, 24)
        self.norm = nn.LayerNorm(24)
        self.weight = nn.Parameter(torch.randn(N, 24) * 0.2)
        self.bias = nn.Parameter(torch.randn(N) * 0.2)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu(self.first(x))
        x = self.norm(self.again(self.again(x)))
        return F.linear(x, self.weight, bias=self.bias)


# fx keeps annotations in the graph, and cannot pickle those that are strings.
Network.forward.__annotations__.clear()


class Nested(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = Network()

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x) * 2


Nested.forward.__annotations__.clear()


def traced() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Network().eval())


def traced_nested() -> fx.GraphModule:
    torch.manual_seed(0)
    return fx.symbolic_trace(Nested().eval())


def exported() -> fx.GraphModule:
    """All linear layers are ``aten.linear`` on parameters here; one is read twice."""
    torch.manual_seed(0)
    return torch.export.export(Network().eval(), (batch(),)).module()


def batch() -> Tensor:
    return torch.randn(8, N, generator=torch.Generator().manual_seed(2))


def compressed(model: fx.GraphModule, keep: float = 0.6) -> fx.GraphModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", fxcompress.FxcompressWarning)
        return fxcompress.compile(model, "every-linear", [batch()], keep=keep, progress=False)


SOURCES = pytest.mark.parametrize("make", [traced, traced_nested, exported])
SITES = {
    traced: {"first", "again", "weight_linear"},
    traced_nested: {"inner.first", "inner.again", "inner_weight_linear"},
    exported: {"first", "again", "weight_linear"},
}


def new_nodes(model: fx.GraphModule) -> list[fx.Node]:
    return [node for node in model.graph.nodes if "fxcompress" in node.meta]


# ---- in float64 at full rank ----------------------------------------------------------


@SOURCES
@pytest.mark.parametrize("form", ["low_rank", "pivoted"])
def test_outputs_are_unchanged_at_full_rank(make: Callable[[], fx.GraphModule], form: str) -> None:
    x = batch().double()
    if make is exported:  # an exported graph has its type fixed
        model = torch.export.export(Network().double().eval(), (x,)).module()
    else:
        model = make().double()
    pair = rewrite(model, x, form)
    assert {site.name for site in pair.sites} == SITES[make]
    # Three layers in float64 through condition numbers of 1e4.
    torch.testing.assert_close(pair.model(x), pair.original(x), rtol=0, atol=1e-11)


# ---- the graph ------------------------------------------------------------------------


@SOURCES
def test_nodes_are_substituted_in_the_graph(make: Callable[[], fx.GraphModule]) -> None:
    model = make()
    small = compressed(model)
    assert isinstance(small, fx.GraphModule)
    small.graph.lint()
    code = small.code
    small.recompile()
    assert small.code == code
    assert not any(isinstance(module, Factorized) for module in small.modules())
    plan = fxcompress.plan_of(small)
    assert {site.name for site in plan.sites} == SITES[make]
    assert {node.meta["fxcompress"]["site"] for node in new_nodes(small)} == {
        site.name for site in plan.rewritten
    }
    assert plan.rewritten


@SOURCES
def test_every_new_node_says_where_it_comes_from(make: Callable[[], fx.GraphModule]) -> None:
    small = compressed(make())
    by_site = {site.name: site for site in fxcompress.plan_of(small).rewritten}
    old = {node.name for node in make().graph.nodes}
    for node in small.graph.nodes:
        assert ("fxcompress" in node.meta) == (node.name not in old)
    for node in new_nodes(small):
        origin = node.meta["fxcompress"]
        site = by_site[origin["site"]]
        assert origin["rule"] == "every-linear"
        assert origin["location"].startswith("every-linear.yaml:")
        assert (origin["form"], origin["rank"]) == (site.form, site.rank)
        assert origin["node"]


def test_untouched_nodes_are_unchanged_and_the_last_new_one_inherits() -> None:
    model = traced()
    ShapeProp(model).propagate(batch())
    for node in model.graph.nodes:
        node.meta["mark"] = node.name
    small = compressed(model)
    before = {node.name: node for node in model.graph.nodes}
    results = {}
    for node in small.graph.nodes:
        if "fxcompress" not in node.meta:
            old = before[node.name]
            assert (node.op, node.target) == (old.op, old.target)
            assert node.meta == old.meta
        elif "mark" in node.meta:
            results[node.meta["mark"]] = node
    rewritten = {node.meta["fxcompress"]["node"] for node in new_nodes(small)}
    assert set(results) <= {"first", "again", "again_1", "linear"}
    assert len(results) == len(rewritten)
    for name, node in results.items():
        assert node.meta["tensor_meta"] == before[name].meta["tensor_meta"]
        assert [user.name for user in node.users if "fxcompress" not in user.meta] == [
            user.name for user in before[name].users if user.name not in results
        ]


@SOURCES
def test_the_input_is_left_as_it_was(make: Callable[[], fx.GraphModule]) -> None:
    model, fresh = make(), make()
    with torch.no_grad():
        wanted = model(batch())
    compressed(model)
    assert model.code == fresh.code
    assert [n.name for n in model.graph.nodes] == [n.name for n in fresh.graph.nodes]
    assert [n.name for n in model.graph.nodes if "fxcompress" in n.meta] == []
    assert model.state_dict().keys() == fresh.state_dict().keys()
    with torch.no_grad():
        assert torch.equal(model(batch()), wanted)


# ---- what else one does with a graph --------------------------------------------------


@SOURCES
def test_copies_and_interpreters_give_the_same(make: Callable[[], fx.GraphModule]) -> None:
    small, x = compressed(make()), batch()
    wanted = small(x)
    others = [
        copy.deepcopy(small),
        fx.Interpreter(small).run,
        fx.Transformer(small).transform(),
    ]
    if make is not exported:  # torch cannot pickle the guards of an exported graph
        others.append(pickle.loads(pickle.dumps(small)))
    for other in others:
        assert torch.equal(other(x), wanted)


@pytest.mark.parametrize("make", [traced, traced_nested])
def test_further_passes_run_on_it(make: Callable[[], fx.GraphModule]) -> None:
    small = compressed(make())
    ShapeProp(small).propagate(batch())
    shapes = [
        node.meta["tensor_meta"].shape for node in new_nodes(small) if "tensor_meta" in node.meta
    ]
    assert shapes
    assert {shape[0] for shape in shapes if len(shape) == 2} == {8}

    class Swap(fx.Transformer):
        def call_function(self, target: object, args: object, kwargs: object) -> object:
            swapped = torch.nn.functional.gelu if target is torch.relu else target
            return super().call_function(swapped, args, kwargs)

    swapped = Swap(small).transform()
    swapped.graph.lint()
    assert not torch.equal(swapped(batch()), small(batch()))
    retraced = fx.symbolic_trace(small)
    assert torch.equal(retraced(batch()), small(batch()))


@SOURCES
def test_factors_can_be_trained(make: Callable[[], fx.GraphModule]) -> None:
    small = compressed(make())
    small(batch()).square().sum().backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in small.parameters())


@SOURCES
def test_it_has_fewer_parameters_as_planned(make: Callable[[], fx.GraphModule]) -> None:
    small = compressed(make(), keep=0.5)
    plan = fxcompress.plan_of(small)
    count = sum(p.numel() for p in small.parameters())
    assert count == plan.model_after.parameters < plan.model_before.parameters


# ---- lift -----------------------------------------------------------------------------


@SOURCES
def test_lifting_turns_linear_functions_into_modules(make: Callable[[], fx.GraphModule]) -> None:
    model = make()
    lifted = skeleton(model)
    lift(lifted)
    with torch.no_grad():
        assert torch.equal(lifted(batch()), model(batch()))
    for path in SITES[make]:
        assert isinstance(lifted.get_submodule(path), nn.Linear)
    left = [n for n in lifted.graph.nodes if n.op == "call_function" and "linear" in str(n.target)]
    assert not left
    mine = {id(p) for p in model.parameters()}
    assert {id(p) for p in lifted.parameters()} == mine


@SOURCES
def test_lifting_nothing_changes_nothing(make: Callable[[], fx.GraphModule]) -> None:
    model, fresh = make(), make()
    lift(model, only=[])
    assert model.code == fresh.code
    assert model.state_dict().keys() == fresh.state_dict().keys()


@SOURCES
def test_paths_do_not_depend_on_what_else_is_lifted(make: Callable[[], fx.GraphModule]) -> None:
    for path in SITES[make]:
        model = make()
        lift(model, only=[path])
        assert isinstance(model.get_submodule(path), nn.Linear)
        others = SITES[make] - {path} if make is exported else set()
        for other in others:
            with pytest.raises(AttributeError):
                assert isinstance(model.get_submodule(other), nn.Linear) or model.missing


class Spellings(nn.Module):
    """The same call, however its arguments are passed; and an owner of more than a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(N, N) for _ in range(3))
        self.c.register_buffer("scale", torch.full((1,), 3.0))

    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(bias=self.a.bias, input=x, weight=self.a.weight)
        x = F.linear(x, self.b.weight, bias=None)
        return F.linear(x, self.c.weight, self.c.bias) * self.c.scale


def test_lifting_handles_keywords_and_owners_of_more() -> None:
    model = fx.symbolic_trace(Spellings())
    lifted = skeleton(model)
    lift(lifted)
    assert torch.equal(lifted(batch()), model(batch()))
    modules = {n.target for n in lifted.graph.nodes if n.op == "call_module"}
    assert modules == {"a", "b", "c_weight_linear"}
    assert "c.scale" in lifted.state_dict()


def test_shared_parameters_are_not_lifted() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(N, N))

        def forward(self, x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.weight), self.weight) + self.weight.sum()

    model = fx.symbolic_trace(Shared())
    code = model.code
    lift(model)
    assert model.code == code


def test_new_nodes_say_what_their_values_are() -> None:
    """As those of torch.export do: one dimension is free, those of the factors are not."""
    model = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 10)).eval()
    x = torch.randn(16, 32)
    free = torch.export.Dim("rows")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: free},)).module()
    assert isinstance(exported, fx.GraphModule)
    small = fxcompress.compile(exported, rules(0.6), [x, x + 1])
    found = new_nodes(small)
    assert len(found) > 2
    rows = next(n for n in small.graph.nodes if n.op == "placeholder").meta["val"].shape[0]
    for node in found:
        shape = tuple(node.meta["val"].shape)
        assert shape[0] == rows or node.op == "get_attr"
        assert all(isinstance(size, int) for size in shape[1:])

    plain = fx.symbolic_trace(model)
    ShapeProp(plain).propagate(x)
    small = fxcompress.compile(plain, rules(0.6), [x, x + 1])
    told = {node.name: node.meta["tensor_meta"].shape for node in new_nodes(small)}
    ShapeProp(small).propagate(x)
    assert told == {node.name: node.meta["tensor_meta"].shape for node in new_nodes(small)}
    assert not any("val" in node.meta for node in new_nodes(small))
