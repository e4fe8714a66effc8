"""ISVT beside a training loop: bare, accumulated, clipped, autocast, resumed, in a Trainer."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxcompress
from fxcompress import ISVT, RewriteError, RuleError, TrainingError
from fxcompress.rules import parse_rules
from tests.isvt.problems import mlp, rules

X = torch.randn(256, 16, generator=torch.Generator().manual_seed(1))
Y = (X @ torch.randn(16, 7, generator=torch.Generator().manual_seed(2))).argmax(1)
DATA = list(X.split(64))


def network(dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return mlp(32).to(dtype)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    isvt: ISVT[Any] | None,
    steps: int,
    *,
    accumulate: int = 1,
    clip: bool = False,
    autocast: bool = False,
) -> float:
    """A bare loop over the whole data."""
    loss = torch.zeros(())
    for _ in range(steps):
        for x, y in zip(X.chunk(accumulate), Y.chunk(accumulate), strict=True):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = F.cross_entropy(model(x.to(next(model.parameters()).dtype)).float(), y)
            (loss / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if isvt is not None:
            isvt.step()
    return float(loss.detach())


def adam(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=5e-3)


def error(model: nn.Module) -> float:
    with torch.no_grad():
        return float(F.cross_entropy(model(X), Y))


def ranks(model: nn.Module) -> list[int]:
    linears = [m.weight.detach().double() for m in model.modules() if isinstance(m, nn.Linear)]
    return [
        int((torch.linalg.svdvals(w) > 1e-5 * torch.linalg.svdvals(w)[0]).sum()) for w in linears
    ]


@pytest.mark.parametrize("schedule", ["soft", "hard"])
@pytest.mark.parametrize(
    "how", [{}, {"accumulate": 4}, {"clip": True}, {"autocast": True}], ids=str
)
def test_a_bare_loop(schedule: Any, how: dict[str, Any]) -> None:
    model = network()
    isvt = ISVT(model, rules(0.4), DATA, steps=40, every=4, schedule=schedule)
    parameters = [id(p) for p in model.parameters()]
    train(model, adam(model), isvt, 60, **how)
    assert [id(p) for p in model.parameters()] == parameters  # the optimizer's own
    keeps = [record.keep for record in isvt.history]
    assert len(keeps) == 15
    assert keeps == sorted(keeps, reverse=True)
    assert keeps[-1] == 0.4
    if schedule == "soft":
        assert 0.8 < keeps[0] < 1.0
    small = isvt.finalize()
    plan = fxcompress.plan_of(small)
    assert plan.budget.cost <= plan.budget.limit
    assert plan.calibration["batches"] == len(DATA) - 1  # damping is chosen on the other one
    assert "predicted loss" in str(plan)  # no KL: the weights were trained since
    assert "by the last thresholding" in str(plan)
    torch.testing.assert_close(small(X), model(X), rtol=1e-3, atol=1e-3)  # thresholded, both
    assert error(small) < 0.6 * error(network())  # it learned
    # after finalize() the factors are ordinary parameters
    before = error(small)
    train(small, adam(small), None, 20, **how)
    assert error(small) < before


def test_a_step_that_is_due_leaves_the_ranks_of_the_budget() -> None:
    model = network()
    isvt = ISVT(model, rules(0.4), DATA, steps=10, every=5, schedule="hard")
    assert isvt.step() is None
    for _ in range(4):
        record = isvt.step()
    assert record is not None
    assert ranks(model) == [r or min(m.weight.shape) for r, m in _chosen(isvt, model)]
    assert record.cost <= 0.4 * sum(m.weight.numel() + len(m.bias) for _, m in _chosen(isvt, model))


def _chosen(isvt: ISVT[Any], model: nn.Module) -> list[tuple[int | None, nn.Linear]]:
    plan = fxcompress.plan_of(isvt.finalize())
    return [
        (site.rank if isinstance(site.rank, int) else None, model.get_submodule(site.name))  # type: ignore[misc]
        for site in plan.sites
    ]


def test_all_kinds_of_sites() -> None:
    """Convolutions with two forms, a joint bundle, an embedding, weights in bfloat16."""

    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(50, 16)
            self.conv = nn.Conv1d(16, 24, 3, padding=1)
            self.q, self.k = nn.Linear(24, 24), nn.Linear(24, 24)
            self.head = nn.Linear(24, 5)

        def forward(self, x: Tensor) -> Tensor:
            h = torch.relu(self.conv(self.table(x).transpose(1, 2))).transpose(1, 2)
            return self.head(torch.tanh(self.q(h)) * self.k(h)).mean(1)

    text = """
budget: {keep: 0.5}
metric: {output: categorical}
rules:
  - id: conv
    match: {node: {op: conv1d}}
    rewrite: {any_of: [channel, spatial, tucker2, pivoted]}
  - id: table
    match: {node: {op: embedding}}
    rewrite: {form: embedding}
  - id: qk
    match: {group: {op: linear, name: "{q,k}"}}
    rewrite: {any_of: [joint, low_rank]}
  - id: rest
    match: {node: {op: linear}}
    rewrite: {form: low_rank}
"""
    model = Mixed().to(torch.bfloat16)
    batch = [torch.randint(0, 50, (32, 9))]
    isvt = ISVT(model, parse_rules(text, "r.yaml"), batch, steps=12, every=3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    target = torch.randint(0, 5, (32,))
    for _ in range(12):
        F.cross_entropy(model(batch[0]).float(), target).backward()
        optimizer.step()
        optimizer.zero_grad()
        isvt.step()
    small = isvt.finalize()
    plan = fxcompress.plan_of(small)
    assert plan.budget.cost <= plan.budget.limit
    assert len(plan.rewritten) >= 3
    difference = (small(batch[0]) - model(batch[0])).float().abs().max()
    assert float(difference) < 0.1  # bfloat16, twice rounded


def test_state_is_saved_and_restored_to_the_same_numbers(tmp_path: Path) -> None:
    def begin() -> tuple[nn.Module, torch.optim.Optimizer, ISVT[nn.Module]]:
        model = network()
        made = ISVT(model, rules(0.4, ("pivoted",)), DATA, steps=30, every=3)
        return model, adam(model), made

    model, optimizer, isvt = begin()
    train(model, optimizer, isvt, 14)
    torch.save([model.state_dict(), optimizer.state_dict(), isvt.state_dict()], tmp_path / "s.pt")
    train(model, optimizer, isvt, 22)
    whole = isvt.finalize()

    other, again, resumed = begin()
    states = torch.load(tmp_path / "s.pt", weights_only=True)
    other.load_state_dict(states[0])
    again.load_state_dict(states[1])
    # An ISVT made from the weights of now has another metric; the state brings the old one.
    resumed = ISVT(other, rules(0.4, ("pivoted",)), DATA, steps=30, every=3)
    resumed.load_state_dict(states[2])
    train(other, again, resumed, 22)
    again_whole = resumed.finalize().state_dict()
    assert whole.state_dict().keys() == again_whole.keys()
    assert all(torch.equal(value, again_whole[k]) for k, value in whole.state_dict().items())
    strip = [(r.step, r.keep, r.rank, r.cost) for r in isvt.history]
    assert strip == [(r.step, r.keep, r.rank, r.cost) for r in resumed.history]


def test_a_state_of_another_model_is_refused() -> None:
    one = ISVT(network(), rules(0.4), DATA, steps=10)
    torch.manual_seed(0)
    other = ISVT(mlp(24), rules(0.4), DATA, steps=10)
    with pytest.raises(TrainingError, match="another model"):
        other.load_state_dict(one.state_dict())
    with pytest.raises(TrainingError, match="format"):
        other.load_state_dict({**one.state_dict(), "format": 99})


def test_weights_that_diverged_are_named_and_nothing_is_changed() -> None:
    model = network()
    isvt = ISVT(model, rules(0.4), DATA, steps=2, every=1)
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")  # type: ignore[index]
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(TrainingError, match=r"2\.weight is not finite after 1 steps"):
        isvt.step()
    assert all(
        torch.equal(v.nan_to_num(), before[k].nan_to_num()) for k, v in model.state_dict().items()
    )
    with pytest.raises(TrainingError, match="diverged"):
        isvt.finalize()


def test_the_metric_is_estimated_anew() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 7))
    kept = ISVT(copy.deepcopy(model), rules(0.5), DATA, steps=20, every=2)
    fresh = ISVT(copy.deepcopy(model), rules(0.5), iter(DATA), steps=20, every=2, refresh=2)
    for isvt in (kept, fresh):
        isvt.model.train()
        train(isvt.model, torch.optim.SGD(isvt.model.parameters(), lr=0.1), isvt, 20)
    moved = [
        float((kept._moments[n].output - fresh._moments[n].output).abs().max())  # type: ignore[operator]
        for n in ("0", "3")
    ]
    assert min(moved) > 1e-4
    small = fresh.finalize()  # with the statistics of now
    assert torch.equal(small[1].running_mean, fresh.model[1].running_mean)
    assert torch.equal(fresh._survey.model[1].running_mean, small[1].running_mean)  # type: ignore[index]
    assert fresh.model.training


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(RuleError, match="kfac"):
        ISVT(network(), rules(0.4, metric="ekfac"), DATA, steps=10)
    conv = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(288, 4))
    text = json.dumps(
        {
            "budget": {"keep": 0.5},
            "rules": [
                {
                    "id": "c",
                    "match": {"node": {"op": "conv2d"}},
                    "rewrite": {"form": "spatial", "fold_batch_norm": True},
                }
            ],
        }
    )
    with pytest.raises(RuleError, match="fold_batch_norm"):
        ISVT(conv.eval(), parse_rules(text, "r.yaml"), [torch.randn(2, 3, 8, 8)], steps=10)
    attention = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    with pytest.raises(RewriteError, match="part of a larger parameter"):
        ISVT(attention, rules(0.5), [torch.randn(2, 5, 16)], steps=10)
    for wrong in ({"steps": 0}, {"steps": 5, "every": 0}, {"steps": 5, "refresh": 0}):
        with pytest.raises(ValueError, match="at least 1"):
            ISVT(network(), rules(0.4), DATA, **wrong)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="schedule"):
        ISVT(network(), rules(0.4), DATA, steps=5, schedule="linear")  # type: ignore[arg-type]


def test_nearest_is_what_a_step_would_set() -> None:
    model = network()
    isvt = ISVT(model, rules(0.4), DATA, steps=1, every=1, schedule="hard")
    before = copy.deepcopy(model.state_dict())
    near = {name: value.clone() for name, value in isvt.nearest()}
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    isvt.step()
    for name, value in near.items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=1e-4, atol=1e-5)


def _trainer(model: Any, isvt: ISVT[Any], folder: Path, steps: int, data: Any) -> Any:
    transformers = pytest.importorskip("transformers")
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        max_steps=steps,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_grad_norm=1.0,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        seed=0,
        logging_steps=1000,
    )
    return transformers.Trainer(
        model=model, args=arguments, train_dataset=data, callbacks=[isvt.callback()]
    )


def test_in_a_trainer_with_a_resumed_run(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")

    def model() -> Any:
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(config)

    tokens = torch.randint(0, 64, (64, 12), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    calibration = [{"input_ids": tokens[:8]}]

    def isvt_of(network: Any) -> ISVT[Any]:
        return ISVT(network, "every-linear", calibration, steps=8, every=2, keep=0.6)

    whole = model()
    first = isvt_of(whole)
    _trainer(whole, first, tmp_path / "a", 8, data).train()
    assert first.count == 8
    assert [record.step for record in first.history] == [2, 4, 6, 8]
    small = first.finalize()
    assert type(small) is type(whole)
    assert fxcompress.plan_of(small).budget.cost <= fxcompress.plan_of(small).budget.limit

    broken = model()
    before = isvt_of(broken)
    _trainer(broken, before, tmp_path / "b", 4, data).train()
    resumed = model()
    after = isvt_of(resumed)
    _trainer(resumed, after, tmp_path / "b", 8, data).train(resume_from_checkpoint=True)
    assert [record.step for record in after.history] == [2, 4, 6, 8]
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)

    (tmp_path / "b" / "checkpoint-4" / "isvt.pt").unlink()
    lost = model()
    with pytest.raises(TrainingError, match="saved without"):
        _trainer(lost, isvt_of(lost), tmp_path / "b", 8, data).train(
            resume_from_checkpoint=str(tmp_path / "b" / "checkpoint-4")
        )
