"""A form for hidden values that is not of the package: by the public interface, in every stage."""

from __future__ import annotations

import importlib.util
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress import LoadError
from fxcompress.forms import Body, JointForm, LinearShape, Narrow, Target, registry, words
from fxcompress.metric.elementwise import Elementwise
from fxcompress.metric.kronecker import Kronecker
from fxcompress.metric.whiten import whitener
from tests.documents import ROOT, Document
from tests.made_up_times import made_up_times
from tests.metric.test_channels import Own
from tests.test_narrow import HIDDEN, Leaking, N, data, network, rules

SIZE = 4


@pytest.fixture(scope="module")
def blocks() -> Iterator[Any]:
    """The example, and blocks of four: registered for the tests of this file only."""
    spec = importlib.util.spec_from_file_location("blocks", ROOT / "examples" / "blocks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["blocks"] = module
    spec.loader.exec_module(module)
    fxcompress.register_form(module.Blocks(SIZE))
    yield module
    for name in ("blocks16", "blocks4"):
        registry._FORMS.pop((name, "linear"))
        words._WORDS.pop(name)


def test_the_example_is_short_and_uses_the_public_interface_only() -> None:
    text = (ROOT / "examples" / "blocks.py").read_text()
    assert len(text.splitlines()) <= 50
    imports = [line for line in text.splitlines() if "fxcompress" in line and "import" in line]
    assert imports == [
        "import fxcompress",
        "from fxcompress.forms import LinearShape, Narrow, Target, Truncations",
    ]


def spd(n: int) -> Tensor:
    root = torch.randn(n, 2 * n).double()
    return root @ root.T / n


def left_over(w: Tensor, a: Tensor, g: Tensor, kept: list[int]) -> float:
    """The least ½ tr(G Δ A Δᵀ) of a weight that reads some channels, by least squares."""
    lower = torch.linalg.cholesky(a)
    fitted = torch.linalg.lstsq(lower[kept].T, (w @ lower).T).solution.T
    change = torch.zeros_like(w)
    change[:, kept] = fitted
    change -= w
    return 0.5 * float(torch.trace(g @ change @ a @ change.T))


def test_blocks_against_a_dense_reference(blocks: Any) -> None:
    torch.manual_seed(0)
    n, m = 12, 5
    w, a, g = torch.randn(m, n).double(), spd(n), spd(m)
    form, count = blocks.Blocks(SIZE), n // SIZE
    target = Target(w, Kronecker(whitener(a, 0.0), whitener(g, 0.0)))
    losses = form.losses(target, np.arange(1, n + 1))
    assert [k for k in range(1, n + 1) if np.isfinite(losses[k - 1])] == [4, 8, 12]
    # What channels gain, one after the other, each the best one given those before it.
    order: list[int] = []
    gains = torch.zeros(n).double()
    while len(order) < n:
        left = {j: left_over(w, a, g, [*order, j]) for j in range(n) if j not in order}
        before = left_over(w, a, g, order) if order else 0.5 * float(torch.trace(g @ w @ a @ w.T))
        best = min(left, key=left.__getitem__)
        gains[best] = before - left[best]
        order.append(best)
    taken = gains.reshape(count, SIZE).sum(1).argsort(descending=True).tolist()
    for k in range(1, count + 1):
        kept = sorted(b * SIZE + i for b in taken[:k] for i in range(SIZE))
        found, refitted = form.truncations(target).factors(k * SIZE)
        assert found.tolist() == kept
        wanted = left_over(w, a, g, kept)
        assert losses[k * SIZE - 1] == pytest.approx(wanted, abs=1e-9)
        wide = torch.zeros_like(w)
        wide[:, kept] = refitted
        assert target.loss(wide) == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize(
    "metric", ["euclidean", "diagonal", "activation", "kfac", "ekfac", "elementwise"]
)
def test_whole_blocks_are_kept(blocks: Any, metric: str) -> None:
    model = network("gated with biases")
    small = fxcompress.compile(model, rules(0.5, "blocks4", metric=metric), data())
    plan = fxcompress.plan_of(small)
    assert {site.form for site in plan.sites} == {"blocks4"}
    assert plan.model_after.parameters == sum(p.numel() for p in small.parameters())
    wide = network("gated with biases")
    for at in (0, 1):
        rows, own = small[at].up.weight, model[at].up.weight
        kept = [int((own - row).abs().sum(1).argmin()) for row in rows]
        starts = kept[::SIZE]
        assert all(start % SIZE == 0 for start in starts)
        assert kept == [start + i for start in starts for i in range(SIZE)]
        assert len(kept) < HIDDEN
        weight = torch.zeros_like(own.T)
        weight[:, kept] = small[at].down.weight
        wide[at].down.weight = nn.Parameter(weight)
    x = data(1)[0]
    torch.testing.assert_close(small(x), wide(x), rtol=1e-12, atol=1e-12)


def test_the_form_of_the_page(blocks: Any) -> None:
    """Channels by the sizes of their weights, refitted: never better than those of the metric."""
    (block,) = Document("docs/hidden-values.md").of("python")
    names: dict[str, Any] = {}
    exec(block.text, names)
    fxcompress.register_form(names["Largest"]())
    model = network("plain")
    try:
        lost = {
            form: fxcompress.plan(model, rules(0.6, form), data()).budget.fitted
            for form in ("narrow", "largest")
        }
        small = fxcompress.compile(model, rules(0.6, "largest"), data())
    finally:
        registry._FORMS.pop(("largest", "linear"))
        words._WORDS.pop("largest")
    assert lost["narrow"] < lost["largest"]
    up, down = model[0].up.weight, model[0].down.weight
    sizes = up.norm(dim=1) * down.norm(dim=0)
    kept = sizes.argsort(descending=True)[: small[0].down.in_features].sort().values
    assert torch.equal(small[0].up.weight, up[kept])


def test_it_stands_beside_the_forms_of_the_package(blocks: Any) -> None:
    """The solver takes what loses less: free channels never lose more than blocks of them."""
    lost = {
        forms: fxcompress.plan(network(), rules(0.7, forms), data()).budget.predicted
        for forms in ("narrow", "blocks4", "narrow, blocks4", "blocks4, pivoted")
    }
    assert lost["narrow, blocks4"] <= min(lost["narrow"], lost["blocks4"]) * (1 + 1e-9)
    assert lost["blocks4, pivoted"] <= lost["blocks4"] * (1 + 1e-9)


def test_what_it_cannot_take(blocks: Any) -> None:
    plan = fxcompress.plan(network(), rules(1.0, "blocks16"), data())
    assert {site.form for site in plan.sites} == {None}
    reason = f"{HIDDEN} channels are not a multiple of 16"
    consumers = [site for site in plan.sites if site.name.endswith("down")]
    assert all(reason in site.reason for site in consumers)
    model = nn.Sequential(Leaking(), nn.Linear(N, N)).double().eval()
    told = str(fxcompress.explain(model, rules(1.0, "narrow, blocks4"), data()[0]))
    assert "narrow, blocks4: " in told


def test_saved_loaded_and_shown(blocks: Any, tmp_path: Path) -> None:
    model = network("plain")
    small = fxcompress.compile(model, rules(form="blocks4"), data())
    fxcompress.save(small, tmp_path / "out")
    again = fxcompress.load(tmp_path / "out", network("plain"))
    x = data(1)[0]
    assert torch.equal(again(x), small(x))
    assert "blocks4" in str(fxcompress.plan_of(again))
    diff = fxcompress.diff(model, small)
    assert f"  up: {HIDDEN} → " in str(diff)
    assert "blocks4" in diff.to_html()
    plan = json.loads((tmp_path / "out" / "plan.json").read_text())
    text = json.dumps(plan).replace("blocks4", "blocks5")
    (tmp_path / "out" / "plan.json").write_text(text)
    with pytest.raises(LoadError, match="blocks5"):
        fxcompress.load(tmp_path / "out", network("plain"))


def test_in_rounds_and_while_training(blocks: Any) -> None:
    given = rules(0.5, "blocks4", "solver: {rounds: 2, steps: 2}")
    small = fxcompress.compile(network(), given, data())
    assert {site.form for site in fxcompress.plan_of(small).sites} == {"blocks4"}
    model = network().train()
    isvt = fxcompress.ISVT(model, rules(0.5, "blocks4"), data(), steps=2, every=1)
    for batch in data(2):
        model(batch).square().mean().backward()
        isvt.step()
        model.zero_grad()
    small = isvt.finalize()
    assert small[0].down.in_features % SIZE == 0
    x = data(1)[0]
    torch.testing.assert_close(small.eval()(x), model.eval()(x), rtol=1e-9, atol=1e-9)


def test_a_budget_of_latency(blocks: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    made_up_times(monkeypatch, tmp_path)
    text = rules(0.7, "blocks4").rules.model_dump()
    text["budget"] = {"keep": 0.7, "unit": "latency"}
    given = fxcompress.rules.parse_rules(json.dumps(text), "r.json")
    plan = fxcompress.plan(network(), given, data())
    assert {site.form for site in plan.sites} == {"blocks4"}


def test_what_cannot_be_registered(blocks: Any) -> None:
    class Bare(JointForm):
        name, hidden = "bare", True

        def parameters(self, shapes: Any, ranks: Any) -> Any: ...
        def empty(self, shapes: Any, rank: int) -> Body: ...
        def fill(self, *arguments: Any) -> None: ...

    with pytest.raises(TypeError, match=r"bare: .* derives from fxcompress.forms.Narrow"):
        fxcompress.register_form(Bare())
    for name in ("narrow", "pivoted", "blocks4"):
        again = type("Again", (Narrow,), {"name": name})()
        with pytest.raises(ValueError, match=f"'{name}' is already registered"):
            fxcompress.register_form(again)


def test_channels_in_an_order_of_ones_own() -> None:
    """In every metric the loss at k is that of the weight with these channels."""
    torch.manual_seed(0)
    w, order = torch.randn(3, 5).double(), torch.tensor([3, 0, 4, 1, 2])
    for form in (
        Kronecker(whitener(spd(5), 0.0), whitener(spd(3), 0.0)),
        Kronecker(whitener(torch.rand(5).double() + 0.1, 0.0), whitener(spd(3), 0.0)),
        Elementwise(torch.rand(3, 5).double()),
        Own(spd(15)),
    ):
        target = Target(w, form)
        found = target.channels(order)
        assert found.order.tolist() == order.tolist()
        losses = found.losses(np.arange(1, 6))
        for k in range(1, 6):
            kept, refitted = found.factors(k)
            assert kept.tolist() == sorted(order[:k].tolist())
            wide = torch.zeros_like(w)
            wide[:, kept] = refitted
            assert target.loss(wide) == pytest.approx(losses[k - 1], abs=1e-12)
        assert all(a >= b - 1e-12 for a, b in itertools.pairwise(losses))
        assert target.channels().losses(np.array([1]))[0] <= losses[0] + 1e-12


def test_the_shape_is_all_that_a_body_needs(blocks: Any) -> None:
    shapes = [LinearShape(3, 8, True, torch.float32), LinearShape(8, 2, True, torch.float32)]
    body = blocks.Blocks(SIZE).empty(shapes, SIZE)
    assert [tuple(head.linear.weight.shape) for head in body.heads] == [(4, 3), (2, 4)]
