"""What goes wrong is said in one of our errors, with the place and the remedy, and the model that
was given is the same afterwards, to the bit."""

from __future__ import annotations

import re
import threading
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import fxcompress
from fxcompress import (
    BudgetError,
    CalibrationError,
    FxcompressError,
    FxcompressWarning,
    RecordError,
    RuleError,
    plan_of,
)
from fxcompress.plans.units import UNITS
from fxcompress.rewrite import Factorized
from tests.small import COUNTED_WORDS, Net, data, net, rules, unchanged

METRICS = ("kfac", "diagonal", "activation")
VERBS = (fxcompress.compile, fxcompress.plan)


def refuse(
    error: type[FxcompressError],
    *words: str,
    model: Any = None,
    rules: Any = None,
    calibration: Any = None,
    verbs: tuple[Callable[..., Any], ...] = VERBS,
    **options: Any,
) -> str:
    """compile and plan raise exactly this error, all words are in it, nothing has changed."""
    model = net() if model is None else model
    rules = _rules if rules is None else rules
    text = ""
    for verb in verbs:
        given = calibration() if callable(calibration) else calibration
        with unchanged(model), pytest.raises(FxcompressError) as caught:
            verb(model, rules, given, **options)
        text = str(caught.value)
        assert caught.type is error, text
        assert all(word in text for word in words), text
    return text


_rules = rules()


# ---- rules ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("no_such_file.yaml", ("no_such_file.yaml", "No such file")),
        ("decodr", ("did you mean 'decoder'",)),
        ("a\0b", ("cannot read it",)),
        (3, ("not a int",)),
        (b"decoder", ("not a bytes",)),
        ({"rules": []}, ("not a dict", "RuleSet")),
    ],
)
def test_rules_that_are_none(given: Any, words: tuple[str, ...]) -> None:
    refuse(RuleError, *words, rules=given, calibration=data())
    with pytest.raises(RuleError):
        fxcompress.explain(net(), given, data()[0])


def test_rules_left_out() -> None:
    model = net()
    for verb in VERBS:
        with unchanged(model), pytest.raises(RuleError, match="not a NoneType"):
            verb(model, None, data())  # type: ignore[operator]


def test_wrong_rules_are_all_reported_with_their_places(tmp_path: Path) -> None:
    file = tmp_path / "wrong.yaml"
    file.write_text(
        "budget: {keep: 2}\n"
        "rules:\n"
        "  - id: a\n"
        "    match: {node: {op: linaer}}\n"
        "    rewrite: {form: pivotted}\n"
    )
    text = refuse(RuleError, "wrong.yaml:1", "wrong.yaml:4", rules=file, calibration=data())
    assert "did you mean 'linear'" in text
    assert "did you mean 'pivoted'" in text


def test_rules_that_match_nothing_show_the_funnel() -> None:
    nowhere = rules(name="decoder.*")
    refuse(RuleError, "small.yaml", "3 linear → 0 name", rules=nowhere, calibration=data())


def test_a_rule_that_matches_nothing_beside_one_that_does_is_a_warning() -> None:
    other = {"id": "other", "match": {"node": {"op": "linear", "name": "decoder.*"}}}
    both = rules(more=[{**other, "rewrite": {"form": "pivoted"}}])
    with pytest.warns(FxcompressWarning, match="rule 'other' matches nothing"):
        small = fxcompress.compile(net(), both, data())
    assert any("rule 'other' matches nothing" in text for text in plan_of(small).warnings)


def test_expectations_that_are_not_met() -> None:
    wanted = rules(expect={"matches": 7})
    refuse(RuleError, "expects 7 sites, and matches 3", rules=wanted, calibration=data())


# ---- calibration data -----------------------------------------------------------------


@pytest.mark.parametrize("kind", METRICS)
def test_no_data_where_the_metric_needs_some(kind: str) -> None:
    refuse(CalibrationError, kind, "euclidean", rules=rules(metric=kind))
    refuse(CalibrationError, kind, rules=rules(metric=kind), examples=data(1))


def test_no_data_at_all() -> None:
    refuse(CalibrationError, "examples=[batch]", rules=rules(metric="euclidean"))
    fxcompress.compile(net(), rules(metric="euclidean"), examples=data(1))


def _spent() -> Iterator[Tensor]:
    batches = iter(data())
    assert len(list(batches)) == 4
    return batches


@pytest.mark.parametrize("given", [list, tuple, _spent, lambda: DataLoader([])])
def test_data_without_a_batch(given: Callable[[], Any]) -> None:
    refuse(CalibrationError, "empty or exhausted", calibration=given)


@pytest.mark.parametrize("given", [data()[0], {"x": data()[0]}, b"prose", 3, 0.5, net(), nn.ReLU])
def test_data_that_is_no_iterable_of_batches(given: Any) -> None:
    words = ("calibration", "[batch]", type(given).__name__)
    refuse(CalibrationError, *words, calibration=lambda: given)
    words = ("examples", "[batch]", type(given).__name__)
    refuse(CalibrationError, *words, calibration=data(), examples=given)


def test_the_name_of_a_text_file_is_no_data() -> None:
    words = ("not the text 'prose.txt'", "tokenize it", "fxcompress compile --data")
    refuse(CalibrationError, "calibration", *words, calibration=lambda: "prose.txt")
    refuse(CalibrationError, "examples", *words, calibration=data(), examples="prose.txt")


@pytest.mark.parametrize("batch", ["a sentence", None, np.zeros((3, 24)), object(), [1, 2]])
def test_a_batch_of_another_kind(batch: Any) -> None:
    refuse(RecordError, "the example batch", "forward=", calibration=[batch])
    refuse(CalibrationError, "calibration batch 2", calibration=[*data(2), batch])


def test_a_batch_that_the_model_rejects() -> None:
    wrong = torch.randn(3, 5)
    refuse(RecordError, "cannot be multiplied", calibration=[wrong, *data()])
    refuse(
        CalibrationError, "calibration batch 3", "cannot be multiplied",
        calibration=[*data(3), wrong],
    )  # fmt: skip


def test_pairs_of_input_and_label() -> None:
    """As a DataLoader gives them; the error names the argument that solves it."""
    labels = torch.zeros(256, dtype=torch.long)
    loader = DataLoader(TensorDataset(torch.cat(data()), labels), batch_size=64)
    refuse(RecordError, "forward=lambda", calibration=loader)
    fxcompress.compile(net(), _rules, loader, forward=lambda model, batch: model(batch[0]))


@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("kind", METRICS)
def test_values_that_are_not_finite_in_a_batch(kind: str, value: float, place: int) -> None:
    batches = data()
    batches[place][5, 3] = value
    words = (f"calibration batch {place}", "NaN or infinite")
    refuse(CalibrationError, *words, rules=rules(metric=kind), calibration=batches)


@pytest.mark.parametrize("kind", [*METRICS, "euclidean"])
@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_weights_that_are_not_finite(kind: str, value: float) -> None:
    model = net()
    with torch.no_grad():
        model.down.weight[1, 2] = value
    words = ("down.weight", "NaN or infinite")
    refuse(CalibrationError, *words, model=model, rules=rules(metric=kind), calibration=data())


@pytest.mark.parametrize("kind", METRICS)
def test_weights_that_are_not_finite_elsewhere(kind: str) -> None:
    """A norm spoils all that comes after it."""
    model = net()
    with torch.no_grad():
        model.norm.weight[0] = float("inf")
    words = ("calibration batch 0", "NaN or infinite")
    refuse(CalibrationError, *words, model=model, rules=rules(metric=kind), calibration=data())


def test_batches_without_a_prediction() -> None:
    refuse(CalibrationError, "no prediction", calibration=[torch.randn(0, 24)] * 2)

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            return self.fc(x)

    batch = {"x": torch.randn(2, 5, 8), "attention_mask": torch.zeros(2, 5, dtype=torch.long)}
    text = refuse(CalibrationError, model=Masked().eval(), calibration=[batch])
    assert "attention_mask" in text or "no calibration data reached fc" in text


def test_a_layer_that_no_batch_reaches() -> None:
    class Choice(Net):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) if len(x) > 10 else self.head(x)

    few = [x[:8] for x in data()]
    words = ("up", "down", "none of the calibration batches")
    refuse(
        CalibrationError, *words, model=Choice().eval(), calibration=few, examples=data(1)
    )  # fmt: skip


def test_an_interrupted_pass_leaves_no_trace() -> None:
    class Stop(Exception):
        pass

    for kind, error in ((KeyboardInterrupt, KeyboardInterrupt), (Stop, Stop)):

        def batches(kind: type[BaseException] = kind) -> Iterator[Tensor]:
            yield from data(2)
            raise kind

        for metric in METRICS:
            for verb in VERBS:
                model = net().train()
                model.up.requires_grad_(False)
                with unchanged(model), pytest.raises(error):
                    verb(model, rules(metric=metric), batches())


def test_an_interrupted_forward_leaves_no_trace() -> None:
    for after in (0, 2):  # while recording, and while calibrating
        model, calls = net(), []

        def forward(m: nn.Module, x: Tensor, calls: list[int] = calls, after: int = after) -> Any:
            calls.append(1)
            if len(calls) > after:
                raise KeyboardInterrupt
            return m(x)

        with unchanged(model), pytest.raises(KeyboardInterrupt):
            fxcompress.compile(model, _rules, data(), forward=forward)


# ---- iterables that only look like lists ----------------------------------------------


class _Once:
    """Iterates over one hidden generator, as wrappers of streams do."""

    def __init__(self) -> None:
        self.batches = iter(data())

    def __iter__(self) -> Iterator[Tensor]:
        return self.batches


class _Stream(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.cat(data()))


@pytest.mark.parametrize("given", [_Once, lambda: DataLoader(_Stream(), batch_size=64)])
def test_no_batch_is_lost(given: Callable[[], Any]) -> None:
    planned = fxcompress.plan(net(), _rules, given())
    assert planned.calibration["batches"] == 4
    assert planned.sites == fxcompress.plan(net(), _rules, data()).sites


def test_data_is_gone_through_once() -> None:
    class Counted(list):  # type: ignore[type-arg]
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            return super().__iter__()

    batches = Counted(data())
    fxcompress.compile(net(), _rules, batches)
    assert batches.passes == 1


# ---- outputs and losses ---------------------------------------------------------------

LABELS = torch.arange(64) % 10
PAIRS = [(x, LABELS) for x in data()]


def _first(model: nn.Module, batch: Any) -> Any:
    return model(batch[0])


def _mean(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1])


def _each(output: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(output, batch[1], reduction="none")


@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (_mean, ("one value per prediction", "reduction='none'")),
        (lambda output, batch: None, ("one value per prediction",)),
        (lambda output, batch: 0.5, ("one value per prediction",)),
        (lambda output, batch: _each(output.detach(), batch), ("without a gradient",)),
        (lambda output, batch: batch[1], ("without a gradient",)),
        (lambda output, batch: _each(output, batch) / 0, ("NaN or infinite",)),
        (lambda output, batch: _each(output, batch)[:0], ("no prediction",)),
        (lambda output, batch: _each(output, batch["labels"]), ("TypeError", "tuple")),
        (lambda output, batch: _each(output.logits, batch), ("AttributeError", "logits")),
        (lambda output, batch: _each(output, (0, LABELS + 9)), ("out of bounds",)),
        (lambda output: output, ("TypeError",)),
        ("cross_entropy", ("TypeError", "not callable")),
    ],
)
def test_losses_that_are_none(loss: Any, words: tuple[str, ...]) -> None:
    text = refuse(CalibrationError, *words, calibration=PAIRS, forward=_first, loss=loss)
    assert "no prediction" in words or "calibration batch 0" in text


def test_a_loss_that_the_metric_does_not_use_is_a_warning() -> None:
    by_input = rules(metric="activation")
    with pytest.warns(FxcompressWarning, match="metric activation makes no use of it"):
        fxcompress.compile(net(), by_input, PAIRS, forward=_first, loss=_each)


@pytest.mark.parametrize("shape", [(64, 1), (64,), ()])
def test_outputs_that_are_no_logits(shape: tuple[int, ...]) -> None:
    """Taken for logits they would have no gradient, and every rank would seem free."""

    def forward(model: nn.Module, x: Tensor) -> Tensor:
        out: Tensor = model(x)
        return out.reshape(shape) if shape else out.sum()

    model = net(classes=1)
    words = (str(shape), "gaussian", "bernoulli") if shape else ("a single number",)
    refuse(CalibrationError, *words, model=model, calibration=data(), forward=forward)
    for output in ("gaussian", "bernoulli"):
        declared = rules(metric={"kind": "kfac", "output": output})
        if shape:
            planned = fxcompress.plan(model, declared, data(), forward=forward)
            assert planned.calibration["predictions"] == 256
            assert planned.budget.predicted > 0
        else:
            refuse(
                CalibrationError, *words,
                model=model, rules=declared, calibration=data(), forward=forward,
            )  # fmt: skip


@pytest.mark.parametrize("result", ["text", None, {"a": 1}, torch.arange(3)])
def test_outputs_without_predictions(result: Any) -> None:
    def forward(model: nn.Module, x: Tensor) -> Any:
        model(x)
        return result

    refuse(CalibrationError, "no predictions found", calibration=data(), forward=forward)


@pytest.mark.parametrize("kind", ["kfac", "diagonal"])
@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients(context: Any, kind: str) -> None:
    class Closed(Net):
        @context()  # type: ignore[untyped-decorator]
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x)

    model = Closed().eval()
    words = ("no_grad", "activation", "calibration batch 0")
    refuse(CalibrationError, *words, model=model, rules=rules(metric=kind), calibration=data())
    fxcompress.compile(model, rules(metric="activation"), data())


def test_a_backward_pass_that_fails() -> None:
    class Torn(Net):
        def forward(self, x: Tensor) -> Tensor:
            h = self.up(x)
            out = self.head(self.down(h.exp().mul_(1)))
            h2 = (out.exp(), out)
            h2[0].add_(1)  # exp() keeps its result for the backward pass
            return h2[0]

    words = ("the backward pass failed", "calibration batch 0", "modified by an inplace")
    refuse(CalibrationError, *words, model=Torn().eval(), calibration=data())


# ---- budgets --------------------------------------------------------------------------


@pytest.mark.parametrize("keep", [0, -0.5, 1.01, 80, float("nan"), float("inf"), "0.5", [0.5]])
def test_keep_out_of_range(keep: Any) -> None:
    refuse(BudgetError, "keep must be a number", repr(keep), calibration=data(), keep=keep)


@pytest.mark.parametrize("allocation", ["global", "uniform"])
@pytest.mark.parametrize("of", ["matched", "model"])
@pytest.mark.parametrize("unit", COUNTED_WORDS)
def test_a_budget_that_cannot_be_met_names_the_least_that_can(
    unit: str, of: str, allocation: str
) -> None:
    floor = {"form": "low_rank", "min_rank": 6}
    wanted = {"of": of, "unit": unit, "allocation": allocation, "rewrite": floor}
    text = refuse(BudgetError, UNITS[unit].text, rules=rules(0.05, **wanted), calibration=data())
    found = re.search(r"need at least ([\d,]+) \(keep: ([\d.]+)\)", text)
    assert found, text
    needed, keep = int(found[1].replace(",", "")), float(found[2])

    small = fxcompress.compile(net(), rules(keep, **wanted), data())
    planned = plan_of(small)
    size = planned.model_after[unit] if of == "model" else planned.budget.cost
    assert size == needed
    refuse(BudgetError, rules=rules(keep - 1e-4, **wanted), calibration=data())


def test_a_budget_below_what_is_left_alone() -> None:
    """Nearly all of the model is out of reach of the rule."""
    only_head = rules(0.5, of="model", name="head")
    refuse(BudgetError, "of the model", "need at least", rules=only_head, calibration=data())


def test_groups_without_a_common_rank() -> None:
    grouped = rules(rewrite={"form": "low_rank", "min_rank": 12, "group": "all"})
    refuse(BudgetError, "group 'all'", rules=grouped, calibration=data())


# ---- models ---------------------------------------------------------------------------


@pytest.mark.parametrize("model", [lambda x: x, {"weight": torch.zeros(2)}, nn.Linear, None, "net"])
def test_models_that_are_none(model: Any) -> None:
    for verb in VERBS:
        with pytest.raises(RecordError, match=r"must be a torch\.nn\.Module"):
            verb(model, _rules, data())
    with pytest.raises(RecordError, match=r"must be a torch\.nn\.Module"):
        fxcompress.explain(model, _rules, data()[0])


def test_a_model_that_cannot_be_copied() -> None:
    model = net()
    model.lock = threading.Lock()  # type: ignore[assignment]
    refuse(RecordError, "Net", "deepcopy", "lock", model=model, calibration=data())


def test_a_model_without_linears() -> None:
    text = refuse(
        RuleError, "0 linear", model=nn.Sequential(nn.Conv1d(3, 4, 3)),
        calibration=[torch.randn(2, 3, 9)],
    )  # fmt: skip
    assert "nothing to compress" in text
    refuse(RuleError, model=nn.Sequential(nn.ReLU()), calibration=[torch.randn(2, 3)])


def test_a_model_that_is_a_linear_layer() -> None:
    words = ("it is the model itself", "nn.Sequential")
    refuse(RuleError, *words, model=nn.Linear(8, 8), calibration=[torch.randn(2, 8)])


def test_a_model_without_values() -> None:
    for kind in ("kfac", "euclidean"):
        refuse(
            CalibrationError, "up.weight", "meta device", "load",
            model=Net().to("meta").eval(), rules=rules(metric=kind), calibration=data(),
        )  # fmt: skip


def test_batches_are_moved_to_the_model() -> None:
    """There is one device only here; meta stands for another one, and cannot be moved from."""
    refuse(
        CalibrationError,
        "calibration batch 2",
        "meta",
        calibration=[*data(2), data()[0].to("meta")],
    )


def test_explain_works_without_values() -> None:
    explained = str(fxcompress.explain(Net().to("meta").eval(), _rules, data()[0]))
    assert "3 linear → 3 name" in explained


class _Integers(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(24, 24)
        self.head = nn.Linear(24, 10)
        self.head.weight = nn.Parameter(
            torch.randint(-3, 4, (10, 24), dtype=torch.int8), requires_grad=False
        )

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.fc(x), self.head.weight.float(), self.head.bias)


def test_integer_weights_stay() -> None:
    model = _Integers().eval()
    with unchanged(model):
        small = fxcompress.compile(model, _rules, data())
    assert isinstance(small.fc, Factorized)
    assert type(small.head) is nn.Linear
    assert torch.equal(small.head.weight, model.head.weight)


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
def test_quantized_layers_stay() -> None:
    quantized = torch.ao.quantization.quantize_dynamic(net(), {nn.Linear}, dtype=torch.qint8)
    for verb in VERBS:
        with pytest.raises(RuleError, match="nothing to compress"):
            verb(quantized, _rules, data())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", [*METRICS, "euclidean"])
def test_other_floating_types(kind: str, dtype: torch.dtype) -> None:
    model, batches = net().to(dtype), [x.to(dtype) for x in data()]
    with unchanged(model):
        small = fxcompress.compile(model, rules(0.7, metric=kind), batches)
    planned = plan_of(small)
    assert {p.dtype for p in small.parameters()} == {dtype}
    assert planned.rewritten
    with torch.no_grad():
        out, dense = small(batches[0]), model(batches[0])
        exact = net().double()(data()[0].double())
    assert out.dtype == dtype
    assert bool(out.isfinite().all())
    assert sum(p.numel() for p in small.parameters()) == planned.model_after.parameters
    tensors = [*small.parameters(), *small.buffers()]
    assert sum(t.numel() * t.element_size() for t in tensors) == planned.model_after.bytes
    # Rounding to the type costs the dense model less than a percent of KL; keeping 70 % of a
    # random (incompressible) network must not cost more than half of what a constant would.
    assert _kl(exact, dense) < 0.01
    constant = torch.zeros_like(dense)
    assert _kl(dense, out) < 0.5 * _kl(dense, constant)


def _kl(p: Tensor, q: Tensor) -> float:
    p, q = p.double().log_softmax(-1), q.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def test_half_precision_agrees_with_single() -> None:
    """The metric is summed in float64 whatever the type, so ranks hardly move."""
    wanted = {s.name: s.rank or 0 for s in fxcompress.plan(net(), rules(0.7), data()).sites}
    for dtype in (torch.bfloat16, torch.float16):
        batches = [x.to(dtype) for x in data()]
        planned = fxcompress.plan(net().to(dtype), rules(0.7), batches)
        assert all(abs((s.rank or 0) - wanted[s.name]) <= 2 for s in planned.sites)


def test_a_model_that_is_compressed_already() -> None:
    small = fxcompress.compile(net(), rules(0.5, name=["up", "down"]), data())
    assert isinstance(small.up, Factorized)
    with unchanged(small):
        again = fxcompress.compile(small, rules(0.6), data())
    assert isinstance(again.head, Factorized)  # it was dense before
    for key, value in small.state_dict().items():
        if not key.startswith("head"):
            assert torch.equal(again.state_dict()[key], value), key
    reasons = {entry.name: entry.reason for entry in plan_of(again).unmatched}
    assert reasons["up.body.pivot"] == "it is part of a layer that was factorized before"
    refuse(RuleError, "it is part of a layer that was factorized before", model=again,
           calibration=data())  # fmt: skip


def test_a_graph_module_that_is_compressed_already() -> None:
    model = nn.Sequential(nn.Linear(24, 48), nn.ReLU(), nn.Linear(48, 10)).eval()
    small = fxcompress.compile(torch.fx.symbolic_trace(model), rules(name="0"), data())
    again = fxcompress.compile(small, _rules, data())
    assert [site.name for site in plan_of(again).sites] == ["2"]
    for key, value in small.state_dict().items():
        if key.startswith("0"):
            assert torch.equal(again.state_dict()[key], value), key
    refuse(RuleError, "factorized before", model=again, calibration=data())


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("verb", VERBS)
def test_modes_and_frozen_parts_are_kept(verb: Callable[..., Any], training: bool) -> None:
    model = net().train(training)
    model.norm.train(not training)
    model.up.requires_grad_(False)
    model.head.bias.requires_grad_(False)
    with unchanged(model):
        small = verb(model, rules(0.6), data())
    if verb is fxcompress.compile:
        assert small.training is training
        assert small.norm.training is not training
        assert {module.training for module in small.up.modules()} == {training}
        assert isinstance(small.up, Factorized)
        assert isinstance(small.down, Factorized)
        assert not any(p.requires_grad for p in small.up.parameters())
        assert all(p.requires_grad for p in small.down.parameters())
        assert all(p.requires_grad for p in small.norm.parameters())


def test_a_frozen_model_is_no_obstacle() -> None:
    model = net().requires_grad_(False)
    with unchanged(model):
        small = fxcompress.compile(model, _rules, data())
    assert not any(p.requires_grad for p in small.parameters())
    wanted = plan_of(fxcompress.compile(net(), _rules, data())).sites
    assert plan_of(small).sites == wanted


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_gradients_switched_off_outside(context: Callable[[], Any]) -> None:
    model, wanted = net(), fxcompress.compile(net(), _rules, data())
    with unchanged(model), context():
        small = fxcompress.compile(model, _rules, data())
    got = small.state_dict()
    assert all(torch.equal(got[key], value) for key, value in wanted.state_dict().items())
    small.train()(data()[0]).sum().backward()
    torch.optim.SGD(small.parameters(), 0.1).step()


def test_gradients_of_the_model_are_not_lost() -> None:
    model = net()
    model(data()[0]).sum().backward()
    before = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    small = fxcompress.compile(model, _rules, data())
    assert all(
        p.grad is not None and torch.equal(p.grad, before[n]) for n, p in model.named_parameters()
    )
    assert all(p.grad is None for p in small.up.parameters())


def test_hooks_of_the_model_stay() -> None:
    model, seen = net(), []
    model.norm.register_forward_hook(lambda module, args, out: seen.append(module))
    with unchanged(model):
        fxcompress.compile(model, _rules, data())
    seen.clear()
    model(data()[0])
    assert seen == [model.norm]


def test_a_layer_without_influence_is_a_warning() -> None:
    class Idle(Net):
        def __init__(self) -> None:
            super().__init__()
            self.idle = nn.Linear(24, 24)

        def forward(self, x: Tensor) -> Tensor:
            self.idle(x)
            return super().forward(x)

    with pytest.warns(FxcompressWarning, match="^idle: .* no influence"):
        fxcompress.compile(Idle().eval(), _rules, data())


def test_nothing_is_warned_of_without_a_reason() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fxcompress.compile(net(), _rules, data())
