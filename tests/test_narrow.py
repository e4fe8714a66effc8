"""Hidden values with fewer channels, end to end: against the dense model, and what is refused."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress
from fxcompress import LoadError
from fxcompress.rules import LoadedRules, parse_rules
from tests.hidden import trained

N, HIDDEN = 12, 24


class Gated(nn.Module):
    """Gate, up and down, as in a Llama."""

    def __init__(self, bias: bool = False) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(N, HIDDEN, bias=bias) for _ in range(2))
        self.down = nn.Linear(HIDDEN, N, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.silu(self.gate(x)) * self.up(x))


class Plain(nn.Module):
    """Up, an activation, down, as in a BERT."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.act, self.drop = nn.Linear(N, HIDDEN), nn.GELU(), nn.Dropout(0.1)
        self.down = nn.Linear(HIDDEN, N)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(self.drop(self.act(self.up(x))))


BLOCKS: dict[str, Callable[[], nn.Module]] = {
    "gated": Gated,
    "gated with biases": lambda: Gated(bias=True),
    "plain": Plain,
}


def network(block: str = "gated") -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(BLOCKS[block](), BLOCKS[block](), nn.Linear(N, 6)).double().eval()


def data(count: int = 4) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(16, N, generator=generator).double() for _ in range(count)]


TEXT = """
version: 1
budget: {{keep: {keep}, of: matched, unit: parameters}}
metric: {{kind: {metric}, output: gaussian, held_back: 0.0}}
{more}
rules:
  - id: hidden
    match: {{node: {{op: linear, name: "*.down"}}}}
    rewrite: {{any_of: [{form}]}}
"""


def rules(
    keep: float = 0.7, form: str = "narrow", more: str = "", metric: str = "kfac"
) -> LoadedRules:
    text = TEXT.format(keep=keep, form=form, more=more, metric=metric)
    return parse_rules(text, "narrow.yaml")


@pytest.mark.parametrize("block", BLOCKS)
def test_nothing_but_smaller_layers_is_left(block: str) -> None:
    model = network(block)
    small = fxcompress.compile(model, rules(), data())
    plan = fxcompress.plan_of(small)
    assert {site.form for site in plan.sites} == {"narrow"}
    names = [name for name, _ in model.named_modules()]
    assert [name for name, _ in small.named_modules()] == names
    for (_, new), (_, old) in zip(small.named_modules(), model.named_modules(), strict=True):
        assert type(new) is type(old)
    width = small[0].down.in_features
    assert width < HIDDEN
    assert small[0].up.out_features == small[0].up.weight.shape[0] == width
    assert small[0].down.weight.shape == (N, width)
    counted = sum(p.numel() for p in small.parameters())
    assert plan.model_after.parameters == counted
    after = sum(site.after.parameters for site in plan.sites)
    assert after <= 0.7 * sum(site.before.parameters for site in plan.sites)


@pytest.mark.parametrize("block", BLOCKS)
def test_the_loss_is_that_of_the_consumer_with_columns_of_zeros(block: str) -> None:
    """Narrowing is a change of one weight: a dense model with that weight says the same."""
    model = network(block)
    small = fxcompress.compile(model, rules(0.6), data())
    reference = copy.deepcopy(model)
    for at in (0, 1):
        rows = small[at].up.weight
        own = reference[at].up.weight
        kept = [int((own - row).abs().sum(1).argmin()) for row in rows]
        assert torch.equal(own[kept], rows)  # rows of the producers, unchanged
        assert kept == sorted(set(kept))
        wide = torch.zeros_like(reference[at].down.weight)
        wide[:, kept] = small[at].down.weight
        reference[at].down.weight = nn.Parameter(wide)
    x = data(1)[0]
    torch.testing.assert_close(small(x), reference(x), rtol=1e-12, atol=1e-12)


def test_channels_that_are_combinations_of_others_cost_nothing() -> None:
    """Of a linear hidden value of rank 6, six channels are enough."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(N, HIDDEN), nn.Identity(), nn.Linear(HIDDEN, N)).double()
    with torch.no_grad():
        model[0].weight.copy_((torch.randn(HIDDEN, 6) @ torch.randn(6, N)).double())
        model[0].bias.zero_()
    text = rules(0.27).rules.model_dump()
    text["rules"][0]["match"] = {"node": {"op": "linear", "name": "2"}}
    text["metric"]["damping"] = {"input": 1e-12, "output": 1e-12}
    small = fxcompress.compile(
        model, fxcompress.rules.parse_rules(json.dumps(text), "r.json"), data()
    )
    assert small[2].in_features == 6
    x = data(1)[0]
    torch.testing.assert_close(small(x), model(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "metric", ["euclidean", "diagonal", "activation", "kfac", "ekfac", "elementwise"]
)
def test_every_metric_narrows(metric: str) -> None:
    small = fxcompress.compile(network(), rules(metric=metric), data())
    assert {site.form for site in fxcompress.plan_of(small).sites} == {"narrow"}
    assert bool(small(data(1)[0]).isfinite().all())


def test_the_solver_takes_what_loses_less() -> None:
    """With both forms the predicted loss is not above that of either."""
    forms = ("narrow", "narrow, pivoted")
    lost = [fxcompress.plan(network(), rules(0.8, f), data()).budget.predicted for f in forms]
    assert lost[1] <= lost[0] * (1 + 1e-9)


def test_saved_and_loaded(tmp_path: Path) -> None:
    small = fxcompress.compile(network("gated with biases"), rules(), data())
    fxcompress.save(small, tmp_path / "out")
    again = fxcompress.load(tmp_path / "out", network("gated with biases"))
    x = data(1)[0]
    assert torch.equal(again(x), small(x))
    assert str(fxcompress.plan_of(again)) == str(fxcompress.plan_of(small))
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    plan["sites"][0]["rank"] += 1
    (tmp_path / "out" / "plan.json").write_text(json.dumps(plan))
    with pytest.raises(LoadError):
        fxcompress.load(tmp_path / "out", network("gated with biases"))


def test_in_an_fx_graph() -> None:
    model = fx.symbolic_trace(network())
    small = fxcompress.compile(model, rules(), data())
    assert isinstance(small, fx.GraphModule)
    x = data(1)[0]
    torch.testing.assert_close(
        small(x), fxcompress.compile(network(), rules(), data())(x), rtol=1e-12, atol=1e-12
    )
    assert {n.meta["fxcompress"]["form"] for n in small.graph.nodes if "fxcompress" in n.meta} == {
        "narrow"
    }


def test_in_place_and_frozen() -> None:
    model = network()
    model[0].up.weight.requires_grad_(False)
    small = fxcompress.compile(model, rules(), data(), inplace=True)
    assert small is model
    assert not small[0].up.weight.requires_grad
    assert small[0].gate.weight.requires_grad


def test_rounds_descend() -> None:
    more = "solver: {rounds: 2, steps: 3}"
    small = fxcompress.compile(network(), rules(0.5, more=more), data(8))
    plan = fxcompress.plan_of(small)
    assert {site.form for site in plan.sites} == {"narrow"}
    assert all(each.after is None or each.after >= 0 for each in plan.rounds)
    once = fxcompress.compile(network(), rules(0.5), data(8))
    model, x = network(), torch.cat(data(2))
    with torch.no_grad():
        lost = [float((made(x) - model(x)).square().mean()) for made in (small, once)]
    assert lost[0] < lost[1]


def test_while_training() -> None:
    model = network().train()
    small = trained(model, rules(0.5), data())
    assert {site.form for site in fxcompress.plan_of(small).sites} == {"narrow"}
    x = data(1)[0]
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_hugging_face_knows_it(tmp_path: Path) -> None:
    """The preset narrows what it can; ``from_pretrained`` makes smaller layers, not facades."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 96, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_hidden_layers=2, vocab_size=64)
    model = transformers.LlamaForCausalLM(config).eval()
    batches = [{"input_ids": torch.randint(0, 64, (4, 32))} for _ in range(4)]
    small = fxcompress.compile(model, "decoder", batches, keep=0.6)
    down = small.model.layers[0].mlp.down_proj
    assert type(down) is nn.Linear
    assert down.in_features < 96
    small.save_pretrained(tmp_path / "out")
    again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert torch.equal(again(**batches[0]).logits, small(**batches[0]).logits)
    assert type(again.model.layers[0].mlp.down_proj) is nn.Linear
    assert small.generate(batches[0]["input_ids"][:, :4], max_new_tokens=3).shape == (4, 7)


# ---- what is refused ------------------------------------------------------------------


class Leaking(Gated):
    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.gate(x)) * self.up(x)
        return self.down(h) + h.sum(-1, keepdim=True)


class Normed(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.layer_norm(self.gate(x), (HIDDEN,)))


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(N, N), nn.Linear(N, N)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(x + F.relu(self.up(x)))


class Twice(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x))) + self.down(F.relu(self.gate(x)))


class Softmaxed(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.gate(x).softmax(-1) * self.up(x))


class Broadcast(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.up(x) * self.gate(x).mean(-1, keepdim=True))


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (Leaking, "reads the value of"),
        (Normed, "(layer_norm), which is not entrywise"),
        (Residual, "it reads what the model is given"),
        (Twice, "called several times"),
        (Softmaxed, "(softmax), which is not entrywise"),
        (Broadcast, "(mean), which is not entrywise"),
    ],
)
def test_what_cannot_be_narrowed_says_why(make: Callable[[], nn.Module], reason: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(make(), nn.Linear(N, N)).double().eval()
    batches = data()
    told = str(fxcompress.explain(model, rules(1.0), batches[0]))
    assert reason in told, told
    assert "narrow: " in told
    plan = fxcompress.plan(model, rules(1.0), batches)
    (site,) = plan.sites
    assert site.form is None
    assert reason in site.reason


def test_a_producer_that_is_protected_stays() -> None:
    protect = """
  - id: stay
    priority: 9
    match: {node: {op: linear, name: "*.gate"}}
    rewrite: none
"""
    given = parse_rules(
        TEXT.format(keep=1.0, form="narrow", more="", metric="kfac") + protect, "r.yaml"
    )
    told = str(fxcompress.explain(network(), given, data()[0]))
    assert "gate is kept dense by rule stay" in told


def test_a_producer_that_cannot_be_rewritten_stays() -> None:
    model = network()
    nn.utils.parametrizations.weight_norm(model[0].gate)
    told = str(fxcompress.explain(model, rules(1.0), data()[0]))
    assert "narrow: " in told
    small = fxcompress.compile(model, rules(0.8), data())
    assert small[0].down.in_features == HIDDEN
    assert small[1].down.in_features < HIDDEN


class Functional(Gated):
    def forward(self, x: Tensor) -> Tensor:
        return x + F.linear(F.silu(self.gate(x)) * self.up(x), self.down.weight)


def test_a_function_is_not_a_layer() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(Functional(), nn.Linear(N, N)).double().eval()
    told = str(fxcompress.explain(model, rules(1.0), data()[0]))
    assert "narrow: " in told or "down" in told
    plan = fxcompress.plan(model, rules(1.0), data())
    assert all(site.form is None for site in plan.sites)
