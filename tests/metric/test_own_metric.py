"""Metrics of one's own, by the public interface only: the one of the examples, and a dense one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import FxcompressWarning, RuleError
from fxcompress.forms import Rank, Spectrum, Truncations, View
from fxcompress.forms.target import Losses, Ranks
from fxcompress.metric import (
    METRICS,
    Draws,
    KroneckerMetric,
    Metric,
    Moments,
    QuadraticForm,
    Statistic,
    calibrate,
    decompose,
    words,
)
from fxcompress.metric import registry as registered
from fxcompress.metric.whiten import Whiteners
from fxcompress.operators.modules import shape_of
from fxcompress.operators.shape import is_grouped
from fxcompress.rules import json_schema, load_rules, parse_rules
from tests.convolutions import CASES, build
from tests.metric.test_conv_fisher import SEED, Site, gradients, network
from tests.metric.test_moments import target

ROOT = Path(__file__).parents[2]


def close(found: Tensor, expected: Tensor) -> None:
    """Equal but for probabilities that were rounded to float32 where gradients start."""
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-6 * float(expected.abs().max()))


# ---- a metric that is no Kronecker product ---------------------------------------------


class Whole(Statistic):
    """The Fisher itself, (mn x mn)."""

    name = "whole"
    reads = "weights"

    def size(self, m: int, n: int) -> tuple[int, int]:
        return m * n, m * n

    def added(self, found: Tensor) -> Tensor:
        flat = found.double().flatten(2)
        return torch.einsum("sga,sgb->gab", flat, flat)


@dataclass(frozen=True, eq=False)
class Dense(QuadraticForm):
    matrix: Tensor

    @property
    def null(self) -> bool:
        return not bool(self.matrix.any())

    def loss(self, change: Tensor) -> float:
        flat = change.flatten().double()
        return 0.5 * float(flat @ self.matrix @ flat)

    def truncations(self, weight: Tensor, view: View) -> Truncations:
        assert view == "matrix"
        return Plain(weight, self, decompose(weight.flatten(1), None, None, damping=(0, 0)))

    def solve(self, gradient: Tensor) -> Tensor:
        eye = torch.eye(len(self.matrix)).to(self.matrix)
        damped = self.matrix + 0.1 * self.matrix.diagonal().mean() * eye
        found = torch.linalg.solve(damped, gradient.flatten().double())
        return found.reshape(gradient.shape)


@dataclass(frozen=True, eq=False)
class Plain(Truncations):
    """Truncated singular value decompositions; what they lose in the whole Fisher."""

    weight: Tensor
    form: Dense
    spectrum: Spectrum

    @property
    def sigma(self) -> Tensor:
        return self.spectrum.sigma

    def losses(self, ranks: Ranks) -> Losses:
        losses = [self._loss(int(rank)) for rank in ranks]
        return np.minimum.accumulate(np.array(losses, dtype=np.float64))

    def _loss(self, rank: int) -> float:
        left, right = self.factors(rank)
        return self.form.loss(left.double() @ right.double() - self.weight.flatten(1))

    def factors(self, rank: Rank) -> tuple[Tensor, ...]:
        return self.spectrum.factors(rank)


class WholeMetric(Metric):
    name = "whole"
    needs = frozenset({Whole()})

    def form(self, moments: Moments, damping: tuple[float, float]) -> Dense:
        return Dense(moments.own["whole"])


@pytest.fixture(scope="module", autouse=True)
def _registered() -> Iterator[None]:
    """The metrics, known while this file is tested only."""
    place = ROOT / "examples" / "factored_fisher.py"
    spec = importlib.util.spec_from_file_location("factored_fisher", place)
    assert spec is not None
    assert spec.loader is not None
    spec.loader.exec_module(importlib.util.module_from_spec(spec))
    fxcompress.register_metric(WholeMetric())
    yield
    for name in ("factored", "whole"):
        del registered._METRICS[name]
        del words._WORDS[name]


# ---- statistics ------------------------------------------------------------------------


@pytest.mark.parametrize("case", ["1d", "2d, strided, dilated, groups", "depthwise", "embedding"])
def test_sums_over_rows_and_columns_of_the_fisher(case: str) -> None:
    model, batch = network(case)
    site = Site("layer", shape_of(model.layer))
    each = torch.stack([*gradients(model, batch)])
    found = calibrate(model, [site], [batch], METRICS["factored"], drawn=Draws(seed=SEED))
    fisher = each.square().mean(0)  # g x m x n
    fisher = fisher if is_grouped(site.shape) else fisher[0]
    own = found.moments["layer"].own
    close(own["rows"], fisher.sum(-1))
    close(own["columns"], fisher.sum(-2))


class Twice(nn.Module):
    """A layer that is used twice, over several positions."""

    def __init__(self) -> None:
        super().__init__()
        self.core = nn.Linear(5, 5).double()

    def forward(self, x: Tensor) -> Tensor:
        return self.core(self.core(x).tanh()).mean(1)


def test_calls_and_positions_are_summed_before_squaring() -> None:
    torch.manual_seed(0)
    model, batch = Twice(), torch.randn(4, 3, 5, dtype=torch.float64)

    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.square().sum(1)

    each = [
        torch.autograd.grad(one, model.core.weight, retain_graph=True)[0]
        for one in loss(model(batch), None)
    ]
    fisher = torch.stack(each).square().mean(0)
    site = target(model, "core", calls=2)
    found = calibrate(model, [site], [batch[:2], batch[2:]], METRICS["factored"], loss=loss)
    torch.testing.assert_close(found.moments["core"].own["rows"], fisher.sum(1))
    torch.testing.assert_close(found.moments["core"].own["columns"], fisher.sum(0))


class Mean(Statistic):
    """Mean absolute value of each feature of the rows (ASVD, arXiv 2312.05821)."""

    def __init__(self, reads: Any) -> None:
        self.reads = self.name = reads

    def size(self, m: int, n: int) -> tuple[int]:
        return ((n if self.reads == "inputs" else m),)

    def added(self, found: Tensor) -> Tensor:
        return found.abs().sum(1)


MEANS = KroneckerMetric(
    "means", frozenset({Mean("inputs"), Mean("gradients"), "input"}), "", lambda m: (None, None)
)


@pytest.mark.parametrize("case", ["2d, strided, dilated, groups", "embedding"])
def test_rows_of_inputs_and_of_gradients(case: str) -> None:
    model, batch = network(case)
    shape = shape_of(model.layer)
    found = calibrate(model, [Site("layer", shape)], [batch], MEANS, drawn=Draws(seed=SEED))
    rows = [each.double() for each in shape.input_rows(batch, None)]
    own = found.moments["layer"].own
    if case == "embedding":
        expected = torch.bincount(batch.flatten(), minlength=9) / batch.numel()
        torch.testing.assert_close(own["inputs"], expected.double())
    else:
        torch.testing.assert_close(own["inputs"], torch.cat(rows, 1).abs().mean(1))
    assert own["gradients"].shape == shape.matrix[:2] if is_grouped(shape) else (5,)
    assert bool((own["gradients"] > 0).all())


def test_padding_counts_for_nothing() -> None:
    torch.manual_seed(0)

    class Padded(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 5).double()

        def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            return self.fc(x)

    model, x = Padded(), torch.randn(2, 4, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    site = target(model, "fc")

    def loss(output: Tensor, batch: Any) -> Tensor:
        return output.square().sum(-1)

    for metric in (MEANS, METRICS["factored"]):
        padded = calibrate(model, [site], [{"x": x, "attention_mask": mask}], metric, loss=loss)
        plain = calibrate(model, [site], [{"x": x[:1]}, {"x": x[1:, :2]}], metric, loss=loss)
        assert padded.predictions == plain.predictions == 6
        for name, value in plain.moments["fc"].own.items():
            torch.testing.assert_close(padded.moments["fc"].own[name], value)


# ---- the form --------------------------------------------------------------------------


@pytest.mark.parametrize(
    "layer",
    [nn.Linear(7, 5).double(), build(CASES["2d, strided, dilated, groups"])],
    ids=["linear", "groups"],
)
def test_loss_and_best_rank_in_float64(layer: Any) -> None:
    torch.manual_seed(0)
    shape = shape_of(layer)
    weight = shape.canonical(layer.weight.detach())
    parts = weight.flatten(2) if is_grouped(shape) else weight[None]
    groups, m, n = parts.shape
    rows, columns = (torch.rand(groups, size, dtype=torch.float64) + 0.1 for size in (m, n))
    columns *= (rows.sum(1) / columns.sum(1))[:, None]  # of one matrix
    own = {"rows": rows, "columns": columns}
    own = own if is_grouped(shape) else {name: each[0] for name, each in own.items()}
    moments = Moments(own=own)
    form = METRICS["factored"].quadratic(shape, moments, Whiteners((0.0, 0.0)))
    fisher = rows[:, :, None] * columns[:, None] / rows.sum(1)[:, None, None]

    def dense(change: Tensor) -> float:
        return 0.5 * float((fisher * change.reshape(parts.shape).square()).sum())

    change = torch.randn(weight.shape, dtype=torch.float64)
    assert form.loss(change) == pytest.approx(dense(change), rel=1e-12)
    found = METRICS["factored"].undamped_loss(shape, moments, change)
    assert found == pytest.approx(dense(change), rel=1e-12)
    solved = form.solve(change).reshape(parts.shape)
    torch.testing.assert_close(solved, change.reshape(parts.shape) / fisher)
    truncations = form.truncations(weight, "matrix")
    scale = fisher.sqrt()
    _, sigma, _ = torch.linalg.svd(scale * parts, full_matrices=False)
    for rank in range(shape.full_rank + 1):
        least = 0.5 * float(sigma[:, rank:].square().sum())
        left, right = truncations.factors(rank)
        left, right = left.reshape(groups, m, rank), right.reshape(groups, rank, n)
        loss = float(truncations.losses(np.array([rank]))[0])
        assert loss == pytest.approx(least, rel=1e-9, abs=1e-12)
        assert dense(left @ right - parts) == pytest.approx(least, rel=1e-9, abs=1e-12)


def test_the_whole_fisher_is_the_one_that_all_others_approximate() -> None:
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(4, 3, bias=False)).double(), torch.randn(300, 4).double()
    site = target(model, "0")
    whole = calibrate(model, [site], [x], METRICS["whole"]).moments["0"]
    factored = calibrate(model, [site], [x], METRICS["factored"]).moments["0"]
    diagonal = whole.own["whole"].diagonal().reshape(3, 4)
    torch.testing.assert_close(factored.own["rows"], diagonal.sum(1))
    form = METRICS["whole"].quadratic(site.shape, whole, Whiteners((0.0, 0.0)))
    change = 1e-3 * torch.randn(3, 4, dtype=torch.float64)
    p, q = (x @ w.T for w in (model[0].weight, model[0].weight + change))
    kl = (p.softmax(1) * (p.log_softmax(1) - q.log_softmax(1))).sum(1).mean().detach()
    assert form.loss(change) == pytest.approx(float(kl), rel=0.2)  # labels are drawn


def test_a_form_of_one_group_is_that_of_a_convolution() -> None:
    torch.manual_seed(0)
    layer = build(CASES["2d, strided, dilated, groups"])
    shape = shape_of(layer)
    groups, m, n = shape.matrix
    root = torch.randn(groups, m * n, m * n, dtype=torch.float64)
    fisher = root @ root.mT
    moments = Moments(own={"whole": fisher})
    form = METRICS["whole"].quadratic(shape, moments, Whiteners((0.0, 0.0)))
    weight = shape.canonical(layer.weight.detach())
    flat = weight.flatten(1)
    dense = 0.5 * float(torch.einsum("ga,gab,gb->", flat, fisher, flat))
    assert form.loss(weight) == pytest.approx(dense, rel=1e-12)
    assert form.truncations(weight, "matrix").losses(np.array([0]))[0] == pytest.approx(dense)
    assert len(form.by_group) == groups
    assert form.solve(weight).shape == weight.shape


# ---- the whole compiler ----------------------------------------------------------------


class Gated(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(12, 16)
        self.up = nn.Linear(12, 16)
        self.down = nn.Linear(16, 12)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(x + self.down(torch.tanh(self.gate(x)) * self.up(x)))


def data() -> list[Tensor]:
    torch.manual_seed(1)
    return [torch.randn(24, 12) for _ in range(6)]


def small() -> nn.Module:
    torch.manual_seed(0)
    return Gated()


def rules(kind: str, keep: float = 0.6, **solver: Any) -> Any:
    document = {
        "budget": {"keep": keep},
        "metric": {"kind": kind, "held_back": 0.2},
        "solver": solver,
        "rules": [
            {
                "id": "pair",
                "match": {"group": {"op": "linear", "name": ["gate", "up"]}},
                "rewrite": {"any_of": ["joint", "pivoted", "low_rank"]},
            },
            {
                "id": "rest",
                "match": {"node": {"op": "linear"}},
                "rewrite": {"any_of": ["pivoted", "low_rank"]},
            },
        ],
    }
    return parse_rules(json.dumps(document), "own.yaml")


@pytest.mark.parametrize("kind", ["factored", "whole"])
@pytest.mark.filterwarnings("ignore::fxcompress.errors.FxcompressWarning")
def test_compiled_saved_and_loaded(kind: str, tmp_path: Path) -> None:
    model, x = small(), data()[0]
    whole = fxcompress.compile(model, rules(kind, 1.0), data(), progress=False)
    torch.testing.assert_close(whole(x), model(x))
    found = fxcompress.compile(model, rules(kind), data(), progress=False)
    plan = fxcompress.plan_of(found)
    assert plan is not None
    assert plan.metric == kind
    assert plan.loss_unit.startswith("nats per prediction")
    assert plan.budget.cost <= plan.budget.limit
    assert any(site.form for site in plan.sites)
    fxcompress.save(found, tmp_path / "out")
    loaded = fxcompress.load(tmp_path / "out", small())
    torch.testing.assert_close(loaded(x), found(x), rtol=0, atol=0)


def test_what_cannot_be_weighed_together_is_told() -> None:
    with pytest.warns(FxcompressWarning, match="gate, up: metric whole cannot weigh them together"):
        fxcompress.compile(small(), rules("whole"), data(), progress=False)


@pytest.mark.parametrize("kind", ["factored", "whole"])
@pytest.mark.parametrize("gradient", ["factors", "whitened"])
@pytest.mark.filterwarnings("ignore::fxcompress.errors.FxcompressWarning")
def test_rounds(kind: str, gradient: str) -> None:
    loaded = rules(kind, 0.5, rounds=2, steps=3, gradient=gradient)
    found = fxcompress.compile(small(), loaded, data(), progress=False)
    plan = fxcompress.plan_of(found)
    assert plan is not None
    assert [each.accepted for each in plan.rounds].count(True) >= 1
    assert plan.budget.cost <= plan.budget.limit


@pytest.mark.parametrize("kind", ["factored", "whole"])
def test_training_object(kind: str) -> None:
    model = small()
    loaded = rules(kind, 0.5)
    isvt = fxcompress.ISVT(model, loaded, data(), steps=4, every=2, progress=False)
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for x in data()[:4]:
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        isvt.step()
    state = isvt.state_dict()
    other = fxcompress.ISVT(model, loaded, data()[:2], steps=4, every=2, progress=False)
    other.load_state_dict(state)
    first, second = isvt.finalize(), other.finalize()
    torch.testing.assert_close(first(data()[0]), second(data()[0]), rtol=0, atol=0)


# ---- names -----------------------------------------------------------------------------


def test_rule_files_know_a_metric_once_it_is_registered() -> None:
    loaded = load_rules(ROOT / "examples" / "factored_fisher.yaml")
    assert loaded.rules.metric.kind == "factored"
    assert "factored" in json_schema()["$defs"]["Metric"]["properties"]["kind"]["enum"]
    with pytest.raises(RuleError, match="unknown metric 'factord'") as error:
        rules("factord")
    assert "did you mean 'factored'?" in str(error.value)


def test_registering_twice_or_nonsense() -> None:
    with pytest.raises(ValueError, match="a metric named 'kfac' is already registered"):
        fxcompress.register_metric(METRICS["kfac"])
    with pytest.raises(TypeError, match="an instance of Metric"):
        fxcompress.register_metric(WholeMetric)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is an identifier, not 'a b'"):
        fxcompress.register_metric(KroneckerMetric("a b", frozenset(), "", lambda m: (None, None)))
    twice = frozenset({Mean("inputs"), Mean("inputs")})
    with pytest.raises(ValueError, match="two statistics named 'inputs'"):
        fxcompress.register_metric(KroneckerMetric("c", twice, "", lambda m: (None, None)))


@pytest.mark.parametrize("imported", [True, False])
def test_on_the_command_line(imported: bool) -> None:
    given = ["--import", "examples/factored_fisher.py"] if imported else []
    done = subprocess.run(
        [sys.executable, "-m", "fxcompress.cli", *given, "check", "examples/factored_fisher.yaml"],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode == 0) == imported, done.stderr
    assert ("unknown metric 'factored'" in done.stderr + done.stdout) != imported


def test_plugins_are_found_by_entry_point(tmp_path: Path) -> None:
    (tmp_path / "plugin.py").write_text(
        "import fxcompress\nfrom fxcompress.metric import KroneckerMetric\n"
        "fxcompress.register_metric(\n"
        "    KroneckerMetric('mine', frozenset(), '', lambda moments: (None, None)))\n"
    )
    info = tmp_path / "plugin-1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: plugin\nVersion: 1\n")
    (info / "entry_points.txt").write_text("[fxcompress.metrics]\nmine = plugin\n")
    code = (
        "import sys; sys.path.insert(0, sys.argv[1])\n"
        "from fxcompress.metric import metric_words\n"
        "print(metric_words()[-1])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout == "mine\n", done.stderr
