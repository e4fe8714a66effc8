"""Rounds inside compile: what is promised of the objective, the budget, the model, the files."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxcompress
from fxcompress import CalibrationError, CheckpointError, RuleError
from fxcompress.isvt import attempts
from fxcompress.isvt import rounds as module
from fxcompress.isvt.correction import correctable, cross_moments, cut_again, fitted
from fxcompress.isvt.descent import gradient
from fxcompress.isvt.objective import Objective, fitting, pieces, references
from fxcompress.metric.output import divergence
from fxcompress.pipeline.held_back import Division
from fxcompress.plans.plan import Plan, Round
from fxcompress.rules import LoadedRules
from tests.isvt.problems import Problem, mlp, rules
from tests.report.pages import Page
from tests.small import unchanged

X = torch.randn(512, 16, generator=torch.Generator().manual_seed(3))
DATA = list(X.split(32))


def network(width: int = 48) -> nn.Module:
    """Trained a little: random networks hardly depend on their input."""
    torch.manual_seed(0)
    model = mlp(width)
    y = (X @ torch.randn(16, 7)).argmax(1)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for _ in range(40):
        optimizer.zero_grad()
        F.cross_entropy(model(X), y).backward()
        optimizer.step()
    for parameter in model.parameters():
        parameter.grad = None
    return model.eval()


def kl(dense: nn.Module, other: nn.Module) -> float:
    with torch.no_grad():
        total, count = divergence(dense(X), other(X))
    return total / count


def compiled(model: nn.Module, loaded: LoadedRules, **more: Any) -> tuple[nn.Module, Plan]:
    small = fxcompress.compile(model, loaded, DATA, **more)
    return small, fxcompress.plan_of(small)


HOW = {
    "factors, soft": {"rounds": 4, "steps": 12, "learning_rate": 3e-3},
    "factors, hard": {"rounds": 4, "steps": 12, "learning_rate": 3e-3, "schedule": "hard"},
    "whitened, soft": {"rounds": 3, "steps": 4, "gradient": "whitened"},
    "whitened, hard": {"rounds": 2, "steps": 6, "gradient": "whitened", "schedule": "hard"},
    "corrected": {"rounds": 3, "correct": True},
    "all": {"rounds": 3, "steps": 8, "correct": True, "learning_rate": 3e-3},
}


@pytest.mark.parametrize("how", HOW.values(), ids=HOW)
@pytest.mark.parametrize(
    "forms", [("low_rank",), ("low_rank", "pivoted"), ("narrow", "low_rank")], ids=str
)
def test_rounds_lose_less_than_one_shot(how: dict[str, Any], forms: tuple[str, ...]) -> None:
    model = network()
    once, _ = compiled(model, rules(0.35, forms))
    with unchanged(model):
        small, plan = compiled(model, rules(0.35, forms, **how))
    assert kl(model, small) < (1.0 if "steps" not in how else 0.97) * kl(model, once)
    assert plan.budget.cost <= plan.budget.limit
    assert plan.budget.keep == 0.35
    assert plan.budget.cost > 0.9 * plan.budget.limit
    sizes = sum(p.numel() for p in small.parameters())
    assert sizes == plan.model_after.parameters
    _require_monotone(plan.rounds)
    assert plan.rounds[-1].keep == 0.35


def _require_monotone(records: tuple[Round, ...]) -> None:
    """Accepted steps descend, and at one budget the objective never rises from one to the next."""
    accepted = [one for one in records if one.accepted]
    assert accepted
    for one in accepted:
        assert one.after is not None
        assert one.after < one.before
    for kind in {one.kind == "whitened" for one in accepted}:
        same = [one for one in accepted if (one.kind == "whitened") == kind]
        for one, two in itertools.pairwise(same):
            if one.keep == two.keep:
                assert one.after is not None
                assert two.before <= one.after * (1 + 1e-4) + 1e-6  # thresholded in between
    for one in records:
        assert one.accepted == (one.after is not None and one.after < one.before)


def test_what_one_round_takes_away_can_come_back_at_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where next to nothing is learned, every lower budget is cut from the dense weights."""
    model = network()
    once, plan = compiled(model, rules(0.35, ("low_rank", "pivoted")))
    given = []
    threshold = module.threshold

    def seen(survey: Any, *args: Any, **more: Any) -> Any:
        given.append(survey.model[2].weight.detach().clone())
        return threshold(survey, *args, **more)

    monkeypatch.setattr(module, "threshold", seen)
    still = rules(0.35, ("low_rank", "pivoted"), rounds=4, steps=1, learning_rate=0.0001)
    small, soft = compiled(model, still)
    assert len({one.keep for one in soft.rounds}) > 1
    for weight in given[:2]:
        torch.testing.assert_close(weight, model[2].weight, rtol=0.0, atol=1e-3)  # type: ignore[index]
    assert [(s.form, s.rank) for s in soft.sites] == [(s.form, s.rank) for s in plan.sites]
    assert kl(model, small) == pytest.approx(kl(model, once), rel=0.01)


def test_the_objective_that_is_recorded_is_the_one_that_is_measured() -> None:
    model = network()
    small, plan = compiled(model, rules(0.35, rounds=1, steps=10, learning_rate=3e-3))
    once, _ = compiled(model, rules(0.35))
    division = Division(DATA, len(DATA), 0.125, seed=0)
    list(division)
    held = torch.cat(division.held)
    assert plan.held_back is not None
    assert plan.held_back.measured == pytest.approx(plan.rounds[-1].after, rel=1e-3)
    with torch.no_grad():
        for other, recorded in ((once, plan.rounds[0].before), (small, plan.rounds[-1].after)):
            total, count = divergence(model(held), other(held))
            assert recorded == pytest.approx(total / count, rel=1e-3)


def test_inplace_and_repeatable() -> None:
    model = network()
    loaded = rules(0.35, ("pivoted",), rounds=2, steps=5)
    one, _ = compiled(model, loaded)
    with torch.no_grad():  # whatever the caller's mode is
        two, _ = compiled(model, loaded)
    same = fxcompress.compile(model, loaded, DATA, inplace=True)
    assert same is model
    for a, b, c in zip(one.parameters(), two.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
        assert c.requires_grad


def test_frozen_parameters_stay_frozen() -> None:
    model = network()
    model[0].requires_grad_(False)  # type: ignore[index]
    small, _ = compiled(model, rules(0.35, rounds=1, steps=2))
    assert [p.requires_grad for p in small[0].parameters()] == [False] * 3  # type: ignore[index]
    assert all(p.requires_grad for p in small[2].parameters())  # type: ignore[index]


class _Killed(Exception):
    pass


@pytest.mark.parametrize("schedule", ["soft", "hard"])
def test_a_run_that_was_killed_resumes_to_the_same_numbers(
    schedule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = network()
    loaded = rules(0.35, ("pivoted",), rounds=4, steps=6, schedule=schedule, learning_rate=3e-3)
    whole, plan = compiled(model, loaded)
    trained, calls = module.trained, []

    def killed(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 3:
            raise _Killed
        return trained(*args)

    monkeypatch.setattr(module, "trained", killed)
    with unchanged(model), pytest.raises(_Killed):
        compiled(model, loaded, checkpoint=tmp_path)
    monkeypatch.setattr(module, "trained", trained)
    assert [path.name for path in tmp_path.iterdir()] == ["rounds.pt"]
    resumed, again = compiled(model, loaded, checkpoint=tmp_path)
    assert again.rounds == plan.rounds
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)
    # what is finished is not done again
    monkeypatch.setattr(module, "trained", None)
    done, _ = compiled(model, loaded, checkpoint=tmp_path)
    assert all(
        torch.equal(a, b) for a, b in zip(done.parameters(), whole.parameters(), strict=True)
    )
    with pytest.raises(CheckpointError, match="another run"):
        compiled(network(40), loaded, checkpoint=tmp_path)
    with pytest.raises(CheckpointError, match="another run"):
        compiled(model, rules(0.5, rounds=4, steps=6), checkpoint=tmp_path)
    (tmp_path / "rounds.pt").write_bytes(b"half")
    with pytest.raises(CheckpointError, match="cannot be read"):
        compiled(model, loaded, checkpoint=tmp_path)


@pytest.mark.parametrize("gradient_of", ["factors", "whitened"])
def test_steps_that_are_too_long_are_given_up_and_the_best_is_kept(gradient_of: str) -> None:
    model = network()
    once, _ = compiled(model, rules(0.35))
    far = rules(0.35, rounds=2, steps=3, learning_rate=1e12, gradient=gradient_of, schedule="hard")
    small, plan = compiled(model, far)
    assert not any(one.accepted for one in plan.rounds)
    assert {one.rate for one in plan.rounds} > {1e12, 5e11}
    assert kl(model, small) == pytest.approx(kl(model, once), rel=1e-3)


def test_a_loss_that_becomes_nan_is_survived() -> None:
    model = network()
    calls = []

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        value = F.cross_entropy(output, output.argmax(1).detach() * 0, reduction="none")
        calls.append(1)
        poisoned = torch.is_grad_enabled() and len(calls) > 8
        return value * float("nan") if poisoned else value

    loaded = rules(0.35, metric="activation", rounds=2, steps=5, objective="task", schedule="hard")
    small, plan = compiled(model, loaded, loss=loss)
    assert any(one.after is None and not one.accepted for one in plan.rounds)
    assert all(p.isfinite().all() for p in small.parameters())
    assert plan.objective == "task"


def test_a_gradient_that_is_nan_ends_a_whitened_round() -> None:
    model = network()

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        value = F.cross_entropy(output, output.argmax(1).detach() * 0, reduction="none")
        return value * float("nan") if torch.is_grad_enabled() else value

    how = {"gradient": "whitened", "objective": "task", "schedule": "hard"}
    small, plan = compiled(
        model, rules(0.35, metric="activation", rounds=2, steps=3, **how), loss=loss
    )
    once, _ = compiled(model, rules(0.35, metric="activation"))
    assert not plan.rounds
    assert kl(model, small) == pytest.approx(kl(model, once), rel=1e-3)


def test_the_user_s_loss_falls() -> None:
    model = network()
    labels = (X @ torch.randn(16, 7)).argmax(1)
    batches = list(zip(X.split(32), labels.split(32), strict=True))

    def forward(network: nn.Module, batch: Any) -> Tensor:
        return network(batch[0])

    def loss(output: Tensor, batch: Any) -> Tensor:
        return F.cross_entropy(output, batch[1], reduction="none")

    def error(network: nn.Module) -> float:
        with torch.no_grad():
            return float(F.cross_entropy(network(X), labels))

    more = {"forward": forward, "loss": loss}
    once = fxcompress.compile(model, rules(0.4), batches, **more)
    loaded = rules(0.4, rounds=2, steps=28, objective="task", learning_rate=1e-2)
    small = fxcompress.compile(model, loaded, batches, **more)
    assert error(small) < 0.7 * error(once)
    with pytest.raises(RuleError, match="loss="):
        fxcompress.compile(model, loaded, batches, forward=forward)


def test_what_cannot_be_done_is_refused() -> None:
    model = network()
    with pytest.raises(CalibrationError, match="calibration"):
        fxcompress.compile(model, rules(0.4, metric="euclidean", rounds=2, steps=2), examples=DATA)
    with pytest.raises(RuleError, match="kfac"):
        compiled(model, rules(0.4, metric="ekfac", rounds=2, steps=2))
    with pytest.raises(RuleError, match="rounds without gradient steps"):
        rules(0.4, rounds=3)
    with pytest.raises(CalibrationError, match="exhausted"):
        fxcompress.compile(model, rules(0.4, rounds=2, steps=2), iter([]))


def test_one_batch_and_more_steps_than_batches() -> None:
    model = network()
    small = fxcompress.compile(model, rules(0.4, rounds=2, steps=9), iter(DATA[:1]))
    assert fxcompress.plan_of(small).rounds
    few = fxcompress.compile(model, rules(0.4, rounds=2, steps=9), (x for x in DATA[:3]))
    assert fxcompress.plan_of(few).calibration["batches"] == 2  # one is held back


def test_the_metric_may_take_fewer_batches_than_the_training() -> None:
    loaded = rules(0.4, rounds=1, steps=3)
    fewer = loaded.rules.metric.model_copy(update={"batches": 2})
    from dataclasses import replace

    loaded = replace(loaded, rules=loaded.rules.model_copy(update={"metric": fewer}))
    _, plan = compiled(network(), loaded)
    assert plan.calibration["batches"] == 2
    _, one_shot = compiled(
        network(), replace(rules(0.4), rules=rules(0.4).rules.model_copy(update={"metric": fewer}))
    )
    assert (one_shot.calibration["batches"], one_shot.calibration["held back"]) == (1, 1)


def test_pieces_have_the_gradient_of_the_whole() -> None:
    model, dense = network().double(), network().double()
    with torch.no_grad():
        model[2].weight += 0.1 * torch.randn_like(model[2].weight)  # type: ignore[index]
    objective = Objective(dense, None, "auto", None)
    parameters = [*model.parameters()]
    batches = [X[:33].double(), X[40:47].double()]
    means, gradients = [], []
    for size in (None, 1, 5, 100):
        means.append(gradient(objective, model, parameters, batches, size))
        gradients.append([p.grad.clone() for p in parameters if p.grad is not None])
    for mean, found in zip(means, gradients, strict=True):
        assert mean == pytest.approx(means[0], rel=1e-6)  # KL in float32
        for one, other in zip(found, gradients[0], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_padding_counts_for_nothing_in_pieces() -> None:
    mask = torch.tensor([[1, 1, 0], [1, 0, 0], [1, 1, 1]])
    batch = {"x": torch.randn(3, 3, 4), "attention_mask": mask}

    class Tagger(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 5)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.fc(x)

    objective = Objective(Tagger(), None, "categorical", None)
    model = Tagger()
    whole, count = objective.sum(model, batch)
    assert count == 6
    parts = [objective.sum(model, piece) for piece in pieces(batch, 1)]
    assert sum(n for _, n in parts) == 6
    torch.testing.assert_close(sum(value for value, _ in parts), whole)


def test_what_the_dense_model_says_is_kept_if_it_fits() -> None:
    dense, other = network(), network(40)
    objective = Objective(dense, None, "auto", None)
    size = sum(dense(batch).nbytes for batch in DATA[:3])
    known = references(objective, DATA[:3], size)
    assert references(objective, DATA[:3], size - 1) == []
    calls = []
    dense.register_forward_hook(lambda *_: calls.append(1))
    by_known = objective.mean(other, DATA[:3], known)
    assert not calls
    assert by_known == objective.mean(other, DATA[:3])
    assert len(calls) == 3
    assert references(Objective(None, lambda out, batch: out, "auto", None), DATA, size)[0] is None


def test_batches_are_cut_to_fit_the_memory() -> None:
    model = network(256)
    objective = Objective(network(256), None, "auto", None)
    one = fitting(objective, model, X, 1.0)
    many = fitting(objective, model, X, 1e6)
    assert one == 1
    assert many is not None
    # At least the two hidden layers are kept of every sample, and not much more.
    assert 1e6 / (40 * 256 * 4) < many < 1e6 / (2 * 256 * 4)
    assert fitting(objective, model, (X, X[:3]), 1e6) is None
    assert len(list(pieces(X, 100))) == 6
    assert len(list(pieces((X, X[:3]), 100))) == 1


def test_the_correction_is_the_least_squares_fit() -> None:
    """At full rank against lstsq; at a lower one against its truncation in the moments of x'."""
    dense, model = network().double(), network().double()
    with torch.no_grad():
        model[0].weight += 0.05 * torch.randn_like(model[0].weight)  # type: ignore[index]
    batches = [x.double() for x in DATA]
    case = Problem.of(model, rules(0.5), batches)
    sites = correctable(case.found.sites, case.metrics)
    moments = cross_moments(dense, case.found.model, sites, batches, 1e-12, None, lambda: None)

    cut = case.threshold()
    found = fitted(dense, case.found.model, sites, case.metrics, moments)
    target = found["2"][0]

    with torch.no_grad():
        before = torch.tanh(dense[0](X.double()))  # type: ignore[index]
        after = torch.tanh(model[0](X.double()))  # type: ignore[index]
        wanted = before @ dense[2].weight.T  # type: ignore[index]
    direct = torch.linalg.lstsq(after, wanted).solution.T
    torch.testing.assert_close(target, direct, rtol=1e-3, atol=1e-5)
    now = model[2].weight.detach()  # type: ignore[union-attr]
    quarter = now + 0.25 * (direct - now)  # type: ignore[operator]
    some = fitted(dense, case.found.model, sites, case.metrics, moments, 0.25)["2"][0]
    torch.testing.assert_close(some, quarter, rtol=1e-3, atol=1e-5)
    low = {site.name: weight for site, weight in cut_again(cut, found)}["2"]
    rank = cut.ranks()["2"]
    assert rank is not None
    lower_g = case.metrics["2"].outputs.lower

    def error(weight: Tensor) -> float:
        return float(((after @ weight.T - wanted) @ lower_g).square().sum())

    best = error(low)
    u, s, v = torch.linalg.svd(lower_g.T @ direct @ torch.linalg.qr(after).R.T)
    kept = torch.linalg.solve(lower_g.T, (u[:, :rank] * s[:rank]) @ v[:rank])
    kept = torch.linalg.solve(torch.linalg.qr(after).R, kept.T).T
    assert best == pytest.approx(error(kept), rel=1e-4)
    assert int((torch.linalg.svdvals(low) > 1e-9).sum()) == rank


class Deep(nn.Module):
    """Residual blocks: all of a later layer's inputs hold errors of all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.blocks = nn.ModuleList(nn.Linear(16, 16) for _ in range(24))
        self.head = nn.Linear(16, 7)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(x)


def test_the_correction_goes_as_far_as_that_descends(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a deep model the full step is rejected; the share that is found is better than others."""
    loaded = rules(0.4, rounds=1, correct=True)

    def found() -> Round:
        _, plan = compiled(Deep().eval(), loaded)
        (record,) = plan.rounds
        assert record.kind == "correction"
        assert f"{record.rate:.2g} of the correction" in str(plan)
        return record

    searched = found()
    assert searched.accepted
    assert searched.after is not None
    monkeypatch.setattr(attempts, "SMALLEST_SHARE", 1.0)
    afters = {}
    for share in (1.0, 2 * searched.rate, searched.rate / 2):
        monkeypatch.setattr(attempts, "SHARE", share)
        afters[share] = found()
    assert not afters[1.0].accepted
    others = [one.after for one in afters.values() if one.after is not None]
    assert searched.after < min(others)


def test_a_graph_module_and_convolutions_with_folded_norms() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(2, 12, 3, padding=1, bias=False)
            self.norm = nn.BatchNorm2d(12)
            self.deep = nn.Conv2d(12, 12, 3, padding=1)
            self.head = nn.Linear(12, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.norm(self.conv(x)))
            return self.head(torch.relu(self.deep(h)).mean((2, 3)))

    torch.manual_seed(0)
    model = Net()
    images = [torch.randn(16, 2, 6, 6) for _ in range(8)]
    model(images[0])
    text = """
budget: {keep: 0.5}
metric: {output: categorical}
solver: {rounds: 2, steps: 7, learning_rate: 2.0e-3}
rules:
  - id: conv
    match: {node: {op: conv2d}}
    rewrite: {any_of: [spatial, tucker2, channel], fold_batch_norm: FOLD}
  - id: head
    match: {node: {op: linear}}
    rewrite: {form: pivoted}
"""
    for traced in (False, True):
        network: Any = fx.symbolic_trace(model.eval()) if traced else model.eval()
        fold = "false" if traced else "true"
        loaded = fxcompress.rules.parse_rules(text.replace("FOLD", fold), "r.yaml")
        with unchanged(network):
            small = fxcompress.compile(network, loaded, images)
        plan = fxcompress.plan_of(small)
        assert type(small) is type(network) or isinstance(small, fx.GraphModule)
        assert plan.rewritten
        assert bool(plan.folded) != traced
        assert sum(p.numel() for p in small.parameters()) == plan.model_after.parameters
        assert any(one.accepted for one in plan.rounds)


def test_the_plan_is_saved_and_shown(tmp_path: Path) -> None:
    model = network()
    small, plan = compiled(model, rules(0.35, rounds=2, steps=6, learning_rate=3e-3))
    fxcompress.save(small, tmp_path)
    loaded = fxcompress.load(tmp_path, network())
    assert fxcompress.plan_of(loaded).rounds == plan.rounds
    assert torch.equal(loaded(X), small(X))
    difference = fxcompress.diff(model, small)
    assert "rounds: KL to the dense model" in str(difference)
    assert difference.to_json()["rounds"][0]["round"] == 1
    told = Page(difference.to_html()).data["rounds"]
    assert told["big"].startswith("rounds: KL to the dense model")
    assert len(told["plot"]["curve"]) >= 2
    assert "distance from the dense weights" in str(plan)
    once, _ = compiled(model, rules(0.35))
    assert "rounds" not in str(fxcompress.diff(model, once))
    # predicted: how far the weights are from the dense ones, in the metric
    assert plan.budget.predicted == pytest.approx(sum(s.predicted for s in plan.sites))
    assert plan.budget.predicted > 0.5 * fxcompress.plan_of(once).budget.predicted
