"""Rules about several operators, templates and forms of one's own, from the file to the model."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import fxcompress
from fxcompress import RuleError
from fxcompress.forms import find_form, registry, words
from fxcompress.rewrite import Factorized, JointMember
from fxcompress.rules import LoadedRules, parse_rules
from tests.small import COUNTED_WORDS, unchanged

ROOT = Path(__file__).parent.parent
WIDTH = 24


class Attention(nn.Module):
    """Grouped queries, a gated feed-forward layer, classes; k and v are a third of q."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(WIDTH, WIDTH)
        self.k = nn.Linear(WIDTH, WIDTH // 3)
        self.v = nn.Linear(WIDTH, WIDTH // 3, bias=False)
        self.o = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 10)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        x = x + self.o(q * torch.sigmoid(k.repeat(1, 3)) + v.repeat(1, 3))
        x = x + self.down(torch.nn.functional.silu(self.gate(x)) * self.up(x))
        return self.head(x)


def model() -> Attention:
    """Queries, keys and values have a row space of rank 5 in common, gate and up of rank 7."""
    torch.manual_seed(0)
    made = Attention()
    with torch.no_grad():
        for layers, rank in (((made.q, made.k, made.v), 5), ((made.gate, made.up), 7)):
            shared = torch.randn(rank, WIDTH)
            for layer in layers:
                layer.weight.copy_(torch.randn(len(layer.weight), rank) @ shared / WIDTH)
                layer.weight += 1e-3 * torch.randn_like(layer.weight)
    return made.eval()


def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(64, WIDTH) for _ in range(4)]


QKV = """
  - id: qkv
    match:
      inputs: [x]
      nodes:
        q: {op: linear, input: $x, name: q}
        k: {op: linear, input: $x, name: k}
        v: {op: linear, input: $x, name: v}
    rewrite: {any_of: [joint, low_rank]}"""
GATES = """
  - id: gates
    match: {group: {op: linear, as: half, name: "{gate,up}"}}
    rewrite: {any_of: [joint, low_rank]}"""
REST = """
  - id: rest
    match: {node: {op: linear, name: "{o,down}"}}
    rewrite: {form: low_rank}"""


def rules(*parts: str, keep: float = 0.5, head: str = "") -> LoadedRules:
    return parse_rules(f"budget: {{keep: {keep}}}\n{head}\nrules:{''.join(parts)}\n", "r.yaml")


def compiled(loaded: LoadedRules, given: nn.Module | None = None, **options: Any) -> Any:
    return fxcompress.compile(
        model() if given is None else given, loaded, data(), progress=False, **options
    )


def forms(small: nn.Module) -> dict[str, tuple[str | None, int | None]]:
    return {site.name: (site.form, site.rank) for site in fxcompress.plan_of(small).sites}


# ---- joint ----------------------------------------------------------------------------


def test_the_solver_takes_the_joint_form_where_rows_are_shared() -> None:
    original = model()
    with unchanged(original):
        small = compiled(rules(QKV, GATES, REST, keep=0.4), original)
    found = forms(small)
    assert {found[name][0] for name in ("q", "k", "v", "gate", "up")} == {"joint"}
    assert len({found[name] for name in ("q", "k", "v")}) == 1
    # The budget is spent on what the row spaces have in common.
    assert 4 <= found["q"][1] <= 6
    assert 6 <= found["gate"][1] <= 8
    plan = fxcompress.plan_of(small)
    assert {len(sites) for sites in plan.bundles.values()} == {3, 2}
    # The plan's numbers are those of the model.
    assert plan.model_after.parameters == sum(p.numel() for p in small.parameters())
    held = [*small.parameters(), *small.buffers()]
    assert plan.model_after.bytes == sum(t.numel() * t.element_size() for t in held)
    assert plan.budget.cost <= plan.budget.limit
    apart = compiled(
        rules(QKV.replace("joint, ", ""), GATES.replace("joint, ", ""), REST, keep=0.4)
    )
    assert plan.budget.predicted < 0.5 * fxcompress.plan_of(apart).budget.predicted
    x = torch.randn(64, WIDTH)
    errors = [(each(x) - original(x)).square().mean() for each in (small, apart)]
    assert errors[0] < 0.5 * errors[1]


def test_macs_are_counted_with_the_shared_half_once() -> None:
    plan = fxcompress.plan_of(compiled(rules(QKV, GATES, REST)))
    counted = sum(site.before.macs - site.after.macs for site in plan.sites)
    assert plan.model_before.macs - plan.model_after.macs == counted


def test_joint_only_and_dense_are_the_choices_of_a_rule_without_others() -> None:
    joint = QKV.replace("{any_of: [joint, low_rank]}", "{form: joint}")
    found = forms(compiled(rules(joint, REST, keep=0.6)))
    assert {found[name][0] for name in "qkv"} in ({"joint"}, {None})
    assert len({found[name][0] for name in "qkv"}) == 1


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("unit", COUNTED_WORDS)
def test_budgets_hold(allocation: str, unit: str) -> None:
    head = f"solver: {{allocation: {allocation}}}"
    loaded = rules(QKV, GATES, REST, head=head)
    text = loaded.text.replace("{keep: 0.5}", f"{{keep: 0.5, unit: {unit}}}")
    plan = fxcompress.plan_of(compiled(parse_rules(text, "r.yaml")))
    after = sum(site.after[unit] for site in plan.sites)
    assert plan.budget.cost == after <= plan.budget.limit
    assert plan.budget.predicted == pytest.approx(sum(site.predicted for site in plan.sites))


def test_at_full_rank_nothing_changes() -> None:
    loaded = rules(QKV.replace("low_rank]", "low_rank], min_rank: 24"), keep=1.0)
    joint = parse_rules(loaded.text.replace("{any_of: [joint, low_rank], ", "{form: joint, "), "r")
    original = model().double()
    batches = [batch.double() for batch in data()]
    small = fxcompress.compile(original, joint, batches, keep=1.0, progress=False)
    x = torch.randn(8, WIDTH).double()
    torch.testing.assert_close(small(x), original(x), rtol=0, atol=1e-10)


def test_different_inputs_are_not_joined() -> None:
    """Same names, but k reads something else: the pattern does not fit, and says why."""

    class Apart(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return self.head(
                self.o(self.q(x) + self.k(x + 1).repeat(1, 3) + self.v(x).repeat(1, 3))
            )

    torch.manual_seed(0)
    with pytest.raises(RuleError, match="node k"):
        compiled(rules(QKV), Apart().eval())


def test_inputs_that_differ_in_some_example_are_not_joined() -> None:
    class Sometimes(Attention):
        def forward(self, x: Tensor) -> Tensor:
            other = x if len(x) > 8 else x * 2
            mixed = self.q(x) + self.k(other).repeat(1, 3) + self.v(x).repeat(1, 3)
            return self.head(self.o(mixed))

    torch.manual_seed(0)
    examples = [torch.randn(16, WIDTH), torch.randn(4, WIDTH)]
    with pytest.warns(fxcompress.FxcompressWarning, match="do not always read the same value"):
        small = compiled(rules(QKV), Sometimes().eval(), examples=examples)
    assert {form for form, _ in forms(small).values()} <= {"low_rank", None}


def test_save_load_and_compress_again(tmp_path: Path) -> None:
    small = compiled(rules(QKV, GATES, REST))
    assert any(isinstance(module, JointMember) for module in small.modules())
    fxcompress.save(small, tmp_path)
    x = torch.randn(8, WIDTH)
    loaded = fxcompress.load(tmp_path, Attention())
    assert torch.equal(loaded(x), small(x))
    assert fxcompress.plan_of(loaded) == fxcompress.plan_of(small)
    text = str(fxcompress.diff(model(), small))
    assert "q.shared.down" in text
    assert "shared by q, k, v" in text
    head = "\n  - id: head\n    match: {node: {op: linear}}\n    rewrite: {form: low_rank}"
    again = compiled(rules(head, keep=0.9), small)
    assert forms(again).keys() == {"head"}
    fxcompress.save(again, tmp_path / "again")
    assert torch.equal(fxcompress.load(tmp_path / "again", Attention())(x), again(x))


@pytest.mark.parametrize("make", ["traced", "exported"])
def test_an_fx_graph_gets_the_shared_nodes_once(make: str, tmp_path: Path) -> None:
    def build() -> Any:
        if make == "traced":
            return fx.symbolic_trace(model())
        return torch.export.export(model(), (data()[0],)).module()

    original = build()
    small = compiled(rules(QKV, GATES, REST), original)
    x = data()[0]
    assert torch.allclose(small(x), original(x), atol=0.2)
    together = fxcompress.plan_of(small).bundles
    assert together
    targets = [str(n.target) for n in small.graph.nodes if n.op == "call_module"]
    for sites in together.values():
        assert targets.count(f"{sites[0].name}.shared.down") == 1
        for site in sites:
            assert targets.count(f"{site.name}.body.up") == 1
    assert sum(p.numel() for p in small.parameters()) == (
        fxcompress.plan_of(small).model_after.parameters
    )
    origin = next(n.meta["fxcompress"] for n in small.graph.nodes if "shared" in str(n.target))
    assert (origin["form"], origin["location"][:7]) == ("joint", "r.yaml:")
    fxcompress.save(small, tmp_path)
    assert torch.equal(fxcompress.load(tmp_path, build())(x), small(x))


def test_a_joint_form_that_fails_is_replanned(monkeypatch: pytest.MonkeyPatch) -> None:
    from fxcompress.forms import FormError, find_form

    def fails(*_: Any) -> None:
        raise FormError("no luck")

    monkeypatch.setattr(type(find_form("joint")), "fill", fails)
    with pytest.warns(fxcompress.FxcompressWarning, match="joint was given up: no luck"):
        small = compiled(rules(QKV, GATES, REST))
    assert {form for form, _ in forms(small).values()} <= {"low_rank", None}
    assert fxcompress.plan_of(small).budget.cost <= fxcompress.plan_of(small).budget.limit


def test_wrong_heads_are_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every member is compared with its own rows, on inputs that it met."""
    from fxcompress.forms import find_form

    form = find_form("joint")
    fill = type(form).fill

    def swapped(self: Any, body: Any, lefts: Any, right: Tensor, biases: Any) -> None:
        fill(self, body, [lefts[0], *(1.01 * left for left in lefts[1:])], right, biases)

    monkeypatch.setattr(type(form), "fill", swapped)
    with pytest.warns(fxcompress.FxcompressWarning, match="is off by"):
        small = compiled(rules(QKV, GATES, REST))
    assert "joint" not in {form for form, _ in forms(small).values()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype: torch.dtype) -> None:
    original = model().to(dtype)
    small = fxcompress.compile(
        original, rules(QKV, GATES, REST), [b.to(dtype) for b in data()], progress=False
    )
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert fxcompress.plan_of(small).bundles


# ---- templates ------------------------------------------------------------------------

SHARED = """
  - id: mine
    match:
      inputs: [x]
      nodes:
        q: {op: linear, input: $x, name: q}
        k: {op: linear, input: $x, name: k}
        v: {op: linear, input: $x, name: v}
    rewrite:
      graph:
        h: {op: linear, input: $x, weight: joint.right}
        a: {op: linear, input: $h, weight: q.left, bias: q.bias}
        b: {op: linear, input: $h, weight: k.left, bias: k.bias}
        c: {op: linear, input: $h, weight: v.left}
      outputs: {q: a, k: b, v: c}
      cost: "r * (q.in_features + q.out_features + k.out_features + v.out_features)" """
SINGLE = """
  - id: bottleneck
    match:
      inputs: [x]
      nodes: {fc: {op: linear, input: $x, name: "{o,down,gate,up}"}}
    rewrite:
      graph:
        down: {op: linear, input: $x, weight: fc.right}
        up: {op: linear, input: $down, weight: fc.left, bias: fc.bias}
      outputs: {fc: up}
      cost: "r * (fc.in_features + fc.out_features)" """


def test_a_template_is_what_the_form_that_it_spells_out_is() -> None:
    joint = QKV.replace("{any_of: [joint, low_rank]}", "{form: joint}")
    low_rank = REST.replace("{o,down}", "{o,down,gate,up}")
    built = compiled(rules(SHARED, SINGLE))
    wanted = compiled(rules(joint, low_rank))
    x = torch.randn(8, WIDTH)
    assert torch.equal(built(x), wanted(x))
    ours, theirs = fxcompress.plan_of(built), fxcompress.plan_of(wanted)
    assert [site.rank for site in ours.sites] == [site.rank for site in theirs.sites]
    assert ours.model_after == theirs.model_after
    assert {site.form for site in ours.rewritten} == {"graph:mine", "graph:bottleneck"}


def test_saved_templates_need_no_rule_file(tmp_path: Path) -> None:
    """Also in a process that never heard of the rules."""
    small = compiled(rules(SHARED, SINGLE))
    fxcompress.save(small, tmp_path)
    x = torch.randn(8, WIDTH)
    torch.save(x, tmp_path / "x.pt")
    torch.save(small(x).detach(), tmp_path / "y.pt")
    code = (
        "import sys, torch, fxcompress; from tests.test_joint_rules import Attention\n"
        "d = sys.argv[1]; small = fxcompress.load(d, Attention())\n"
        "assert torch.equal(small(torch.load(d + '/x.pt')), torch.load(d + '/y.pt'))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_template_that_computes_something_else_is_refused() -> None:
    """Shapes fit, the function does not: it is found before there is a model."""
    wrong = SINGLE.replace(
        "up: {op: linear, input: $down,",
        "act: {op: relu, input: $down}\n        up: {op: linear, input: $act,",
    )
    with pytest.raises(RuleError, match=r"error\[wrong-template\]: 'up' does not compute fc\.left"):
        compiled(rules(wrong))


def test_a_template_without_a_bias_that_is_there_is_refused() -> None:
    with pytest.raises(RuleError, match="has a bias, and the template leaves it out"):
        compiled(rules(SINGLE.replace(", bias: fc.bias", "")))


def test_templates_in_an_fx_graph() -> None:
    original = fx.symbolic_trace(model())
    small = compiled(rules(SHARED, SINGLE), original)
    targets = [str(n.target) for n in small.graph.nodes if n.op == "call_module"]
    assert targets.count("q.shared.h") == 1
    assert {"q.body.a", "k.body.b", "v.body.c", "o.down", "o.up"} <= set(targets)


# ---- chains, and operators that are only context --------------------------------------

CHAIN = """
  - id: chain
    match:
      inputs: [x]
      nodes:
        gate: {op: linear, input: $x}
        act: {op: [silu, gelu], input: $gate}
        up: {op: linear, input: $x}
        product: {op: mul, inputs: [$up, $act]}
        down: {op: linear, input: $product}
    where: [gate.out_features == down.in_features]
    rewrite: {form: pivoted, nodes: [gate, down]}"""


def test_a_chain_rewrites_the_operators_that_it_names() -> None:
    assert forms(compiled(rules(CHAIN))).keys() == {"gate", "down"}
    whole = rules(CHAIN.replace(", nodes: [gate, down]", ""))
    assert forms(compiled(whole)).keys() == {"gate", "up", "down"}


# ---- forms of one's own ---------------------------------------------------------------


@pytest.fixture(scope="module")
def monarch() -> Iterator[Any]:
    """The example, registered for the tests of this file only."""
    spec = importlib.util.spec_from_file_location("monarch", ROOT / "examples" / "monarch.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["monarch"] = module
    spec.loader.exec_module(module)
    yield module
    registry._FORMS.pop(("monarch4", "linear"))
    words._WORDS.pop("monarch4")


def test_the_example_is_short_and_uses_the_public_interface_only() -> None:
    text = (ROOT / "examples" / "monarch.py").read_text()
    assert len(text.splitlines()) <= 80
    imports = [line for line in text.splitlines() if "fxcompress" in line and "import" in line]
    assert imports == [
        "import fxcompress",
        "from fxcompress.forms import Form, LinearShape, Target",
    ]


class Euclidean:
    """The plain metric."""

    def loss(self, change: torch.Tensor) -> float:
        return float(change.square().sum())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("rank", [1, 2, 4])
def test_monarch_against_a_dense_reference(monarch: Any, rank: int, bias: bool) -> None:
    torch.manual_seed(0)
    form = monarch.Monarch(4)
    shape = fxcompress.forms.LinearShape(16, 24, bias, torch.float64)
    weight, b = torch.randn(24, 16).double(), torch.randn(24).double() if bias else None
    target = fxcompress.forms.Target(weight, Euclidean())
    left, right = form.factors(target, rank)
    wanted = torch.zeros_like(weight)
    for i in range(4):
        for j in range(4):
            block = weight[6 * i : 6 * i + 6, 4 * j : 4 * j + 4]
            u, s, v = torch.linalg.svd(block, full_matrices=False)
            wanted[6 * i : 6 * i + 6, 4 * j : 4 * j + 4] = (u[:, :rank] * s[:rank]) @ v[:rank]
    torch.testing.assert_close(left @ right, wanted)
    body = form.empty(shape, rank)
    form.fill(body, (left, right), b)
    x = torch.randn(2, 5, 16).double()
    torch.testing.assert_close(body(x), x @ wanted.T + (0 if b is None else b))
    torch.testing.assert_close(form.weight(body, shape), wanted)
    ranks = np.array([rank])
    counted = sum(p.numel() for p in body.parameters()) - 24 * bias
    assert counted == form.parameters(shape, ranks)[0] == 4 * rank * (16 + 24)
    assert form.losses(target, ranks)[0] == pytest.approx(float((wanted - weight).square().sum()))
    if rank == form.full_rank(shape):
        torch.testing.assert_close(wanted, weight)


def test_a_form_of_ones_own_in_a_rule_file(monarch: Any, tmp_path: Path) -> None:
    gates = (
        '\n  - id: gates\n    match: {node: {op: linear, name: "{gate,up,head}"}}\n'
        "    rewrite: {form: monarch4}"
    )
    small = compiled(rules(gates, REST))
    found = forms(small)
    assert {found["gate"][0], found["up"][0]} & {"monarch4"}
    reasons = {site.name: site.reason for site in fxcompress.plan_of(small).sites}
    assert "10 features are not a multiple of 4 blocks" in reasons["head"]
    plan = fxcompress.plan_of(small)
    assert plan.model_after.parameters == sum(p.numel() for p in small.parameters())
    fxcompress.save(small, tmp_path)
    x = torch.randn(8, WIDTH)
    assert torch.equal(fxcompress.load(tmp_path, Attention())(x), small(x))
    saved = json.loads((tmp_path / "plan.json").read_text())["sites"]
    parts = next(site["parts"] for site in saved if site["form"] == "monarch4")
    assert [part["op"] for part in parts].count("einsum") == 2


def test_predicted_losses_of_a_projection_are_exact(monarch: Any) -> None:
    """In the Euclidean metric the predicted loss is half the squared error."""
    gates = (
        '\n  - id: gates\n    match: {node: {op: linear, name: "gate"}}\n'
        "    rewrite: {form: monarch4}"
    )
    original = model()
    small = compiled(rules(gates, keep=0.8, head="metric: {kind: euclidean}"), original)
    (site,) = fxcompress.plan_of(small).rewritten
    error = 0.5 * float((small.gate.weight - original.gate.weight).square().sum())
    assert site.predicted == pytest.approx(error, rel=1e-4)


def test_a_form_that_nobody_registered_cannot_be_loaded(monarch: Any, tmp_path: Path) -> None:
    gates = (
        '\n  - id: gates\n    match: {node: {op: linear, name: "gate"}}\n'
        "    rewrite: {form: monarch4}"
    )
    fxcompress.save(compiled(rules(gates, keep=0.8)), tmp_path)
    code = (
        "import sys, fxcompress; from tests.test_joint_rules import Attention\n"
        "fxcompress.load(sys.argv[1], Attention())\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "forms that are not known here: monarch4; install or import" in done.stderr


def test_registering_twice_or_nonsense(monarch: Any) -> None:
    with pytest.raises(ValueError, match="'monarch4' is already registered"):
        fxcompress.register_form(monarch.Monarch(4))
    with pytest.raises(TypeError, match="an instance of Form or JointForm"):
        fxcompress.register_form(monarch.Monarch)
    assert find_form("monarch4").name == "monarch4"


def test_plugins_are_found_by_entry_point(tmp_path: Path) -> None:
    """An installed package announces its forms; a broken one is reported and left out."""
    for name, text in {
        "good": "import fxcompress\nfrom fxcompress.forms import find_form\n"
        "class Mine(type(find_form('low_rank'))):\n    name = 'mine'\n"
        "fxcompress.register_form(Mine())\n",
        "bad": "1 / 0\n",
    }.items():
        (tmp_path / f"plugin_{name}.py").write_text(text)
        info = tmp_path / f"plugin_{name}-1.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: plugin-{name}\nVersion: 1\n")
        (info / "entry_points.txt").write_text(f"[fxcompress.forms]\n{name} = plugin_{name}\n")
    (tmp_path / "r.yaml").write_text(
        "budget: {keep: 0.5}\nrules:\n"
        "  - {id: a, match: {node: {op: linear}}, rewrite: {form: mine}}\n"
    )
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from fxcompress.rules import load_rules\n"
        "print(load_rules(sys.argv[1] + '/r.yaml').rules.rules[0].rewrite.form)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "mine\n", done.stderr
    assert "the plug-in bad (plugin_bad) cannot be imported: ZeroDivisionError" in done.stderr


def test_facades_of_all_kinds_are_told_apart() -> None:
    small = compiled(rules(QKV, GATES, REST))
    assert isinstance(small.q, JointMember)
    assert small.q.form == "joint"
    assert isinstance(small.o, Factorized)
    assert small.o.form == "low_rank"
