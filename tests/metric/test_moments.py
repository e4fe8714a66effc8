"""The data pass against dense float64 references: one gradient per prediction, by autograd."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress.errors import CalibrationError
from fxcompress.forms import Shape
from fxcompress.graph.padding import NONE
from fxcompress.metric import METRICS, Draws, calibrate
from fxcompress.metric.grams import GramSum, RowSum, finish_together
from fxcompress.metric.kronecker import KroneckerMetric
from fxcompress.metric.memory import free_memory
from fxcompress.metric.passes import run_pass
from fxcompress.metric.seeds import seeded
from fxcompress.metric.squares import SquareSums
from fxcompress.metric.starts import backward_starts
from fxcompress.operators.modules import shape_of
from fxcompress.rules import parse_rules

ALL = KroneckerMetric("all", frozenset({"input", "output", "weight"}), "", lambda m: (None, None))


@dataclass(frozen=True)
class Target:
    name: str
    shape: Shape
    source: str
    calls: int = 1


def target(model: nn.Module, name: str, source: str | None = None, calls: int = 1) -> Target:
    return Target(name, shape_of(model.get_submodule(name)), source or name, calls)


class Classifier(nn.Module):
    """Two layers and an in-place activation; positions are mixed, so gradients are not local."""

    def __init__(self, n: int = 5, hidden: int = 4, classes: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(n, hidden)
        self.second = nn.Linear(hidden, classes)

    def forward(self, x: Tensor) -> Tensor:
        h = self.first(x).tanh_()
        if h.dim() == 3:
            h = h + 0.5 * h.cumsum(1)
        return self.second(h)


def model_and_data(*shape: int, seed: int = 0) -> tuple[Classifier, list[Tensor]]:
    torch.manual_seed(seed)
    model = Classifier(shape[-1]).double()
    return model, [torch.randn(*shape, dtype=torch.float64) for _ in range(3)]


def reference(
    model: nn.Module, names: list[str], batches: list[Tensor], seed: int
) -> dict[str, Any]:
    """A, G and the mean-square weight gradient per row, from autograd, label by label."""
    rows: dict[str, list[Tensor]] = {name: [] for name in names}
    gradients: dict[str, list[Tensor]] = {name: [] for name in names}
    squares = {name: torch.zeros(1, dtype=torch.float64) for name in names}
    predictions = 0
    for place, batch in enumerate(batches):
        generator = seeded(torch.Generator(), seed, place)
        with torch.no_grad():
            logits = model(batch)
            p = logits.float().softmax(-1)
            flat = p.reshape(-1, p.shape[-1])
            labels = torch.multinomial(flat, 1, generator=generator).view(p.shape[:-1])
        predictions += labels.numel()
        for sample, y in zip(batch, labels, strict=True):
            seen: dict[str, tuple[Tensor, Tensor]] = {}

            def keep(name: str, seen: dict[str, tuple[Tensor, Tensor]]) -> Any:
                def hook(module: nn.Module, args: Any, out: Tensor) -> Tensor:
                    out = out.clone()
                    out.retain_grad()
                    seen[name] = (args[0].detach(), out)
                    return out.clone()

                return hook

            handles = [
                model.get_submodule(name).register_forward_hook(keep(name, seen)) for name in names
            ]
            model.zero_grad()
            logits = model(sample[None])
            F.cross_entropy(
                logits.reshape(-1, logits.shape[-1]), y.reshape(-1), reduction="sum"
            ).backward()
            for handle in handles:
                handle.remove()
            for name in names:
                a, out = seen[name]
                assert out.grad is not None
                rows[name].append(a.reshape(-1, a.shape[-1]))
                gradients[name].append(out.grad.reshape(-1, out.shape[-1]))
                weight = model.get_submodule(name).weight
                assert isinstance(weight.grad, Tensor)
                squares[name] = squares[name] + weight.grad.square().mean(1)
    result = {}
    for name in names:
        a, g = torch.cat(rows[name]), torch.cat(gradients[name])
        result[name] = (a.T @ a / len(a), g.T @ g / predictions, squares[name] / predictions)
    return result


@pytest.mark.parametrize("shape", [(6, 5), (4, 7, 5), (1, 1, 5), (2, 3, 40)])
def test_moments_equal_autograd_label_by_label(shape: tuple[int, ...]) -> None:
    model, batches = model_and_data(*shape)
    names = ["first", "second"]
    expected = reference(model, names, batches, seed=3)
    found = calibrate(
        model, [target(model, name) for name in names], batches, ALL, drawn=Draws(seed=3)
    )
    assert found.kind == "categorical"
    assert found.predictions == 3 * batches[0].numel() // shape[-1]
    for name in names:
        a, g, w = expected[name]
        # The labels come from float32 probabilities on both sides; all else is float64, but for
        # the probabilities themselves, which enter the gradient rounded to float32.
        torch.testing.assert_close(found.moments[name].input, a, rtol=1e-12, atol=1e-14)
        torch.testing.assert_close(
            found.moments[name].output, g, rtol=0, atol=2e-6 * float(g.max())
        )
        torch.testing.assert_close(
            found.moments[name].weight, w, rtol=0, atol=2e-6 * float(w.max())
        )


def test_a_weight_used_twice_is_summed_before_squaring() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core = nn.Linear(4, 4)
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.core(torch.tanh(self.core(x))))

    torch.manual_seed(0)
    model = Twice().double()
    batch = torch.randn(5, 2, 4, dtype=torch.float64)
    generator = seeded(torch.Generator(), 0, 0)
    with torch.no_grad():
        p = model(batch).float().softmax(-1).reshape(-1, 3)
    labels = torch.multinomial(p, 1, generator=generator).view(5, 2)
    expected = torch.zeros(4, dtype=torch.float64)
    for sample, y in zip(batch, labels, strict=True):
        model.zero_grad()
        F.cross_entropy(model(sample[None])[0], y, reduction="sum").backward()
        assert model.core.weight.grad is not None
        expected += model.core.weight.grad.square().mean(1)
    model.zero_grad()
    found = calibrate(
        model, [target(model, "core", calls=2)], [batch], METRICS["diagonal"], drawn=Draws(seed=0)
    )
    moment = found.moments["core"].weight
    torch.testing.assert_close(moment, expected / 10, rtol=0, atol=2e-6 * float(expected.max()))


def sampled(output: Tensor, kind: Any, generator: torch.Generator) -> Tensor:
    """Gradients at the output for labels drawn from it."""
    starts = backward_starts(
        output, None, kind=kind, fisher="sampled", loss=None, mask=NONE, generator=generator
    )
    ((gradient,),) = (start.gradients for start in starts.passes)
    return gradient.double()


def test_labels_are_drawn_from_the_model() -> None:
    """E[g gᵀ] over draws is the Fisher of the softmax, diag(p) - p pᵀ."""
    torch.manual_seed(0)
    logits = torch.tensor([[1.0, -0.5, 0.2, 2.0]]).repeat(200_000, 1)
    p = logits[0].softmax(-1).double()
    g = sampled(logits, "auto", torch.Generator().manual_seed(1))
    exact = torch.diag(p) - torch.outer(p, p)
    # Entries are means of 200,000 variables of magnitude at most 1: five standard errors.
    assert float((g.T @ g / len(g) - exact).abs().max()) < 5 / 200_000**0.5
    assert float((g.T @ g / len(g) - exact).abs().max()) > 0  # sampled, not exact


def test_sampled_gradient_of_the_other_families() -> None:
    generator = torch.Generator().manual_seed(0)
    f = torch.randn(50_000, 2, generator=generator)
    gaussian = sampled(f, "gaussian", generator)
    cov = gaussian.T @ gaussian / len(gaussian)
    assert float((cov - torch.eye(2)).abs().max()) < 5 * 2**0.5 / 50_000**0.5
    constant = torch.full((50_000, 1), 0.7)
    bernoulli = sampled(constant, "bernoulli", generator)
    p = float(constant[0].sigmoid())
    assert abs(float(bernoulli.square().mean()) - p * (1 - p)) < 5 * 0.5 / 50_000**0.5
    assert abs(float(bernoulli.mean())) < 5 * 0.5 / 50_000**0.5


def test_same_seed_same_moments_other_seed_others() -> None:
    model, batches = model_and_data(4, 7, 5)
    sites = [target(model, "first")]
    runs = [
        calibrate(model, sites, batches, METRICS["kfac"], drawn=Draws(seed=s)) for s in (0, 0, 1)
    ]
    first, again, other = (run.moments["first"].output for run in runs)
    assert first is not None
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_sites_with_one_input_share_one_gram() -> None:
    model = nn.ModuleDict({"q": nn.Linear(5, 4), "k": nn.Linear(5, 3)}).double()

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = model

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([self.layers["q"](x), self.layers["k"](x)], -1)

    both = Both()
    sites = [target(both, "layers.q", "x"), target(both, "layers.k", "x")]
    batch = torch.randn(6, 5, dtype=torch.float64)
    found = calibrate(both, sites, [batch], METRICS["kfac"])
    assert found.moments["layers.q"].input is found.moments["layers.k"].input
    torch.testing.assert_close(found.moments["layers.q"].input, batch.T @ batch / 6)


def test_sharing_that_does_not_hold_on_a_batch_is_an_error() -> None:
    class Sometimes(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.q(x) + self.k(x if len(x) == 2 else x + 1)

    model = Sometimes()
    sites = [target(model, "q", "x"), target(model, "k", "x")]
    calibrate(model, sites, [torch.randn(2, 4)], METRICS["kfac"])
    with pytest.raises(CalibrationError, match=r"k shared its input .* batch 1"):
        calibrate(model, sites, [torch.randn(2, 4), torch.randn(3, 4)], METRICS["kfac"])


def test_padding_makes_no_prediction_and_no_position() -> None:
    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Linear(4, 3)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(x)

    torch.manual_seed(0)
    model = Masked().double()
    x = torch.randn(2, 5, 4, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    found = calibrate(
        model, [target(model, "head")], [{"x": x, "attention_mask": mask}], METRICS["kfac"]
    )
    assert found.predictions == 8
    real = x[mask.bool()]
    torch.testing.assert_close(found.moments["head"].input, real.T @ real / 8)


def test_a_user_loss_replaces_the_sampled_labels() -> None:
    model, (batch, *_) = model_and_data(6, 5)
    labels = torch.arange(6) % 3

    def loss(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1], reduction="none")

    found = calibrate(
        model,
        [target(model, "second")],
        [(batch, labels)],
        METRICS["kfac"],
        loss=loss,
        forward=lambda model, pair: model(pair[0]),
    )
    g = model(batch).detach().softmax(-1) - F.one_hot(labels, 3)
    torch.testing.assert_close(found.moments["second"].output, g.T @ g / 6)
    with pytest.raises(CalibrationError, match="one value per prediction"):
        calibrate(
            model, [target(model, "second")], [batch], METRICS["kfac"],
            loss=lambda output, batch: output.sum(),
        )  # fmt: skip


@pytest.mark.parametrize("features", [1, 3, 256, 300, 513])
@pytest.mark.parametrize("flush", [1, 20, 8192])
def test_gram_sum_equals_the_full_product(
    features: int, flush: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(GramSum, "FLUSH", flush)
    x = torch.randn(40, features, dtype=torch.float64)
    gram = GramSum(features, torch.device("cpu"), torch.float64)
    assert all(gram.add(part) for part in x.split(15))
    torch.testing.assert_close(gram.finish(40), x.T @ x / 40, rtol=1e-12, atol=1e-14)


def test_diagonal_gram_sum() -> None:
    x = torch.randn(40, 7, dtype=torch.float64)
    gram = GramSum(7, torch.device("cpu"), torch.float64, diagonal=True)
    assert all(gram.add(part) for part in x.split(15))
    torch.testing.assert_close(gram.finish(40), x.square().mean(0), rtol=1e-12, atol=0)


@pytest.mark.parametrize("position", [(0, 0), (3, 299)])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_gram_sum_notices_what_is_not_finite(position: tuple[int, int], value: float) -> None:
    x = torch.randn(5, 300)
    x[position] = value
    assert not GramSum(300, torch.device("cpu")).add(x)


def test_long_sums_go_on_in_float64() -> None:
    """2^25 ones: in bfloat16 counting stops at 256, in float32 at 2^24."""
    gram = GramSum(1, torch.device("cpu"))
    for _ in range(512):
        gram.add(torch.ones(65536, 1, dtype=torch.bfloat16))
    assert float(gram.finish(1)) == 2**25


def test_the_model_is_left_as_it_was() -> None:
    model, batches = model_and_data(4, 7, 5)
    model.first.weight.requires_grad_(False)
    model.train()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    calibrate(model, [target(model, "first")], batches, ALL)
    assert model.training
    assert model.second.training
    assert not model.first.weight.requires_grad
    assert model.second.weight.requires_grad
    assert all(p.grad is None for p in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_errors_name_the_place_and_the_remedy() -> None:
    model, batches = model_and_data(4, 7, 5)
    sites = [target(model, "first")]
    kfac = METRICS["kfac"]
    with pytest.raises(CalibrationError, match="empty or exhausted"):
        calibrate(model, sites, iter([]), kfac)
    with pytest.raises(CalibrationError, match=r"rejected calibration batch 1: .*\n.*forward="):
        calibrate(model, sites, [batches[0], torch.randn(2, 3).double()], kfac)
    poisoned = batches[1].clone()
    poisoned[0, 0, 0] = torch.nan
    with pytest.raises(CalibrationError, match=r"input of first .* calibration batch 1"):
        calibrate(model, sites, [batches[0], poisoned], kfac)
    with pytest.raises(CalibrationError, match="no gradient reaches"):
        calibrate(model, sites, batches, kfac, forward=lambda m, b: m(b).detach())

    class Skips(Classifier):
        def forward(self, x: Tensor) -> Tensor:
            return x[..., :3]

    skips = Skips().double()
    with pytest.raises(CalibrationError, match="no calibration data reached first"):
        calibrate(skips, sites, [batches[0]], METRICS["activation"])
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("diagonal", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("power", [-1000, -120, -60, 0, 60, 120, 1000])
def test_sums_are_right_for_finite_values_of_any_size(
    power: int, dtype: torch.dtype, diagonal: bool
) -> None:
    """Every column in a unit of its own, every batch in another; against exact fractions."""
    if abs(power) > 120 and dtype == torch.float32:
        pytest.skip("out of the range of the type")
    generator = torch.Generator().manual_seed(0)
    gram = GramSum(3, torch.device("cpu"), dtype, diagonal=diagonal)
    exact = [[Fraction(0)] * 3 for _ in range(3)]
    for shift in (0, 3, -5):
        x = torch.randn(16, 3, generator=generator, dtype=torch.float64).to(dtype)
        x = x * torch.tensor([2.0**power, 2.0 ** (power // 2), 1.0], dtype=dtype) * 2.0**shift
        assert gram.add(x)
        rows = [[Fraction(value) for value in row] for row in x.tolist()]
        for i in range(3):
            for j in range(3):
                exact[i][j] += sum(row[i] * row[j] for row in rows)
    (mean,), exponent = finish_together([gram], 48)
    largest = max(exact[i][i] for i in range(3))
    for i in range(3):
        for j in range(3):
            if diagonal and i != j:
                continue
            found = Fraction(float(mean[i] if diagonal else mean[i, j])) * Fraction(4) ** exponent
            scale = float(exact[i][i] / largest * exact[j][j] / largest) ** 0.5
            if scale > 1e-280:  # what is smaller beside the largest is 0 in float64
                bound = Fraction(1e-5 if dtype == torch.float32 else 1e-13) * largest
                assert abs(found - exact[i][j] / 48) <= bound * Fraction(scale)
    assert float((mean if diagonal else mean.diagonal()).max()) >= 0.25 or exponent == 0


def test_gradients_of_any_exponent_add_up() -> None:
    gram = GramSum(2, torch.device("cpu"))
    x = torch.randn(4, 2)
    for exponent in (-300, 0, -300):
        gram.add(torch.ldexp(x, torch.tensor(2)), exponent)
    torch.testing.assert_close(gram.finish(1), 16 * (x.T @ x).double(), rtol=1e-6, atol=0)
    tiny = GramSum(2, torch.device("cpu"))
    tiny.add(x, -600)
    (mean,), exponent = finish_together([tiny], 1)
    torch.testing.assert_close(
        torch.ldexp(mean, torch.tensor(2 * (exponent + 600))), (x.T @ x).double()
    )


class Looped(nn.Module):
    """One layer, or one table, that is used over and over."""

    def __init__(self, kind: str, loops: int) -> None:
        super().__init__()
        self.loops = loops
        self.core: nn.Module = {
            "linear": lambda: nn.Linear(4, 4),
            "conv": lambda: nn.Conv1d(4, 4, 3, padding=1),
            "table": lambda: nn.Embedding(6, 4),
        }[kind]()
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        value: Tensor = torch.zeros(1)
        for loop in range(self.loops):
            if isinstance(self.core, nn.Embedding):
                value = value + (loop + 1) * self.core((x + loop) % 6)
            elif isinstance(self.core, nn.Conv1d):
                x = value = torch.tanh(self.core(x.transpose(1, 2)).transpose(1, 2))
            else:
                x = value = torch.tanh(self.core(x))
        out: Tensor = self.head(value.mean(1))
        return out


def looped_data(kind: str) -> Tensor:
    if kind == "table":
        return torch.randint(0, 6, (5, 2), generator=torch.Generator().manual_seed(0))
    return torch.randn(5, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("kind", ["linear", "conv", "table"])
@pytest.mark.parametrize("metric", ["diagonal", "elementwise"])
def test_gradients_of_all_calls_are_summed_before_squaring(kind: str, metric: str) -> None:
    torch.manual_seed(0)
    model, data = Looped(kind, 3).double(), looped_data(kind)

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        return F.cross_entropy(output, torch.arange(5) % 3, reduction="none")

    found = calibrate(
        model, [target(model, "core", calls=3)], [data], METRICS[metric], loss=loss
    ).moments["core"]
    weight = model.core.weight
    assert isinstance(weight, Tensor)
    expected = torch.zeros_like(weight)
    for one in loss(model(data), data):
        (gradient,) = torch.autograd.grad(one, weight, retain_graph=True)
        expected += gradient.square() / 5
    if kind == "table":
        expected = expected.T  # (features x entries of the table)
    own = found.entries if metric == "elementwise" else found.weight
    assert own is not None
    wanted = expected.flatten(1) if metric == "elementwise" else expected.flatten(1).mean(1)
    torch.testing.assert_close(own.reshape(wanted.shape), wanted)


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_memory_does_not_grow_with_the_calls_of_a_layer(kind: str) -> None:
    """What waits for the end of a backward pass is one gradient per sample."""
    kept = []
    for loops in (2, 9):
        model, data = Looped(kind, loops).double(), looped_data(kind)
        site = target(model, "core", calls=loops)
        sums = SquareSums([site], torch.device("cpu"), entries=False)
        end = sums.end

        def count(sums: SquareSums = sums, end: Any = end) -> None:
            assert not sums.looked_up
            kept.append(sum(total.numel() for total, _ in sums.pending.values()))
            end()
            assert not sums.pending

        sums.end = count  # type: ignore[method-assign]
        run_pass(model, sums.sites, [data], sums)
    weight = model.core.weight
    assert isinstance(weight, Tensor)
    assert kept == [5 * weight.numel()] * 2


@pytest.mark.parametrize("metric", ["diagonal", "ekfac"])
def test_calls_on_other_numbers_of_samples_are_an_error(metric: str) -> None:
    class Uneven(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.core, self.head = nn.Linear(4, 4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.head(torch.tanh(self.core(x)) + self.core(x.mean(0, keepdim=True)))
            return out

    rules = parse_rules(
        f"budget: {{keep: 0.5, of: matched}}\nmetric: {{kind: {metric}}}\n"
        "rules: [{id: r, match: {node: {op: linear, name: core}}, rewrite: {form: low_rank}}]",
        "r.yaml",
    )
    with pytest.raises(CalibrationError, match="core is called on 1 samples and on 5"):
        fxcompress.compile(Uneven(), rules, [torch.randn(5, 4)], progress=False)


@pytest.mark.parametrize("positions", [0, 1, 10, 11, 30])
def test_few_rows_are_kept_as_they_are(positions: int) -> None:
    features, x = 40, torch.randn(positions, 40, dtype=torch.float64)
    total = RowSum(features, torch.device("cpu"), torch.float64)
    given = x.clone()
    for part in given.split(7):
        assert total.add(part)
        part.zero_()  # as an activation that works in place does
    found = total.finish(30)
    few = positions <= features // 4
    assert found.shape == ((positions if few else features), features)
    torch.testing.assert_close(found.T @ found if few else found, x.T @ x / 30)


@pytest.mark.parametrize("positions", [3, 30])
def test_few_rows_that_are_not_finite_are_noticed(positions: int) -> None:
    x = torch.randn(positions, 40)
    x[1, 3] = torch.nan
    assert not RowSum(40, torch.device("cpu")).add(x)


def test_moments_that_take_too_much_memory_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fxcompress.metric.grams.free_memory", lambda device: 3 << 30)
    monkeypatch.setattr("fxcompress.metric.grams.FEW", 10**6)
    model = nn.Sequential(nn.Linear(20_000, 2), nn.Tanh(), nn.Linear(2, 2))
    with pytest.raises(CalibrationError, match=r"input of 0, 20,000 wide, take about 12 GiB"):
        calibrate(model, [target(model, "0")], [torch.randn(2, 20_000)], METRICS["kfac"])


def test_what_is_free_is_known_on_linux() -> None:
    free = free_memory(torch.device("cpu"))
    assert (free is not None and free > 1 << 20) or not Path("/proc/meminfo").exists()
    assert free_memory(torch.device("meta")) is None


def test_a_layer_of_many_inputs_and_few_rows_takes_little_memory() -> None:
    """The second moments of 60,000 inputs would take 27 GiB."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(60_000, 8), nn.Tanh(), nn.Linear(8, 3))
    rules = parse_rules(
        "budget: {keep: 0.6, of: matched}\nrules: [{id: r, match: {node: {op: linear, name: '0'}},"
        " rewrite: {form: low_rank}}]",
        "r.yaml",
    )
    data = torch.randn(4, 60_000)
    small = fxcompress.compile(model, rules, [data], progress=False)
    assert fxcompress.plan_of(small).sites[0].rank == 4
    # Four samples have four directions: nothing that they show is lost, but for the damping.
    assert float((small(data) - model(data)).norm()) < 0.05 * float(model(data).norm())
