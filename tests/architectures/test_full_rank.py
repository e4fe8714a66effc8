"""All linear layers of many models at full rank, in float64: nothing may change.

Bounds.  Whitening with condition numbers of 100 on both sides loses four of float64's sixteen
digits, depth and width another two; hence 1e-10, relative to the largest value.  Models that
compute norms or rotary angles in float32 whatever their type round values that differ by
1e-14 to float32 neighbours, 1e-7 apart, and later layers amplify that; hence 1e-5.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import fxcompress
from fxcompress.operators.applied import operator_path
from fxcompress.operators.stacked import Stack, parameter_of
from fxcompress.rewrite import own_parameters, planned_weight, prepared
from tests.full_rank import Rewritten, counted_calls, factorized, rewrite
from tests.zoo import ZOO, Batch, Case, tensors

FORMS = ("low_rank", "pivoted", "joint")
REWRITABLE = [name for name, case in ZOO.items() if case.sites]
HUGGING_FACE = [n for n in REWRITABLE if isinstance(ZOO[n].build(), transformers.PreTrainedModel)]


@cache
def rewritten(name: str, form: str = "pivoted") -> Rewritten:
    case = ZOO[name]
    torch.manual_seed(0)
    return rewrite(case.build().double(), case.batch(torch.float64), form)


def tolerance(case: Case) -> float:
    return 1e-5 if case.single else 1e-10


def assert_same(got: Any, wanted: Any, bound: float, *, only: Tensor | None = None) -> None:
    """All tensors of two outputs agree, to a bound relative to the largest entry."""
    assert type(got) is type(wanted)
    pairs = list(zip(tensors(got), tensors(wanted), strict=True))
    assert pairs
    for a, b in pairs:
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        assert bool(b.isfinite().all())
        if only is not None:
            a, b = a[only], b[only]
        torch.testing.assert_close(a, b, rtol=0, atol=bound * float(b.abs().max()))


def real_tokens(batch: Batch) -> Tensor | None:
    """Where outputs count: torch's fused encoder puts zeros where the padding is."""
    padding = batch.get("src_key_padding_mask")
    return None if padding is None else ~padding


def compare(name: str, form: str, batch: Batch) -> None:
    pair = rewritten(name, form)
    with torch.no_grad():
        wanted, got = pair.original(**batch), pair.model(**batch)
    assert_same(got, wanted, tolerance(ZOO[name]), only=real_tokens(batch))


def double(name: str) -> Batch:
    return ZOO[name].batch(torch.float64)


# ---- outputs --------------------------------------------------------------------------


@pytest.mark.parametrize("name", REWRITABLE)
def test_every_linear_layer_is_a_site(name: str) -> None:
    pair = rewritten(name)
    assert len(pair.sites) == ZOO[name].sites
    assert set(factorized(pair.model)) == {site.name for site in pair.sites}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", REWRITABLE)
def test_outputs_are_unchanged(name: str, form: str) -> None:
    compare(name, form, double(name))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", REWRITABLE)
def test_outputs_are_unchanged_at_other_sizes(name: str, form: str) -> None:
    compare(name, form, ZOO[name].other_batch(torch.float64))


@pytest.mark.parametrize("name", [n for n in REWRITABLE if "attention_mask" in ZOO[n].batch()])
def test_outputs_are_unchanged_on_padded_batches(name: str) -> None:
    for real in (slice(None, 3), slice(-3, None)):  # padded on the left, and on the right
        batch = double(name)
        batch["attention_mask"][0, real] = 0
        compare(name, "pivoted", batch)


@pytest.mark.parametrize("form", ["pivoted", "joint"])
@pytest.mark.parametrize("name", [n for n in REWRITABLE if ZOO[n].generates])
def test_generate_gives_the_same_tokens(name: str, form: str) -> None:
    pair = rewritten(name, form)
    prompt = {k: v for k, v in double(name).items() if not k.startswith("decoder_")}
    if "attention_mask" in prompt:
        prompt["attention_mask"][0, :3] = 0
    options = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False}
    tokens = pair.original.generate(**prompt, **options)
    assert tokens.shape[1] >= 5
    assert torch.equal(pair.model.generate(**prompt, **options), tokens)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", REWRITABLE)
def test_every_body_really_runs(name: str, form: str) -> None:
    pair = rewritten(name, form)
    with counted_calls(pair.model) as calls, torch.no_grad():
        pair.model(**double(name))
    assert calls == {site.name: site.calls for site in pair.sites}
    assert min(calls.values()) >= 1


# ---- parameters -----------------------------------------------------------------------


def places(pair: Rewritten) -> tuple[list[str], set[str]]:
    """Where the rewritten operators are, and the names of the parameters that they stand for."""
    work = pair.model
    paths = [operator_path(work, site.name) for site in pair.sites]
    parts = [f"{path}.{part}" for path in paths for part in ("weight", "bias")]
    names = {planned_weight(work, part)[0] for part in parts}
    return paths, names | {parameter_of(work, name) for name in names}


@pytest.mark.parametrize("name", REWRITABLE)
def test_state_of_untouched_parts_is_identical(name: str) -> None:
    pair = rewritten(name)
    reference = prepared(pair.original).state_dict()
    state = pair.model.state_dict()
    paths, replaced = places(pair)
    untouched = reference.keys() - replaced
    assert all(torch.equal(state[key], reference[key]) for key in untouched)
    bodies = tuple(f"{path}.{part}." for path in paths for part in ("body", "shared"))
    assert all(key.startswith(bodies) for key in state.keys() - untouched)


@pytest.mark.parametrize("name", REWRITABLE)
def test_no_memory_is_shared_with_the_original(name: str) -> None:
    pair = rewritten(name)
    theirs = {t.data_ptr() for t in [*pair.original.parameters(), *pair.original.buffers()]}
    ours = {t.data_ptr() for t in [*pair.model.parameters(), *pair.model.buffers()]}
    assert not (theirs & ours) - {0}


@pytest.mark.parametrize("name", REWRITABLE)
def test_the_original_is_left_as_it_was(name: str) -> None:
    pair = rewritten(name)
    fresh = ZOO[name].build().double()
    assert not factorized(pair.original)
    assert [n for n, _ in pair.original.named_modules()] == [n for n, _ in fresh.named_modules()]
    state, wanted = pair.original.state_dict(), fresh.state_dict()
    assert state.keys() == wanted.keys()
    assert all(torch.equal(state[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", REWRITABLE)
def test_gradients_are_those_of_the_dense_model(name: str, form: str) -> None:
    """Of untouched parameters they are equal; of factors they follow by the chain rule."""
    pair = rewritten(name, form)
    dense = own_parameters(prepared(pair.original), pair.original)
    wanted = gradients(dense, double(name))
    for stack in [path for path, each in pair.model.named_modules() if isinstance(each, Stack)]:
        wanted |= {f"{stack}.{number}": part for number, part in enumerate(wanted.pop(stack))}
    got = gradients(pair.model, double(name))
    # A gradient sums over positions and layers, which costs another digit or two.
    largest = max(float(g.abs().max()) for g in wanted.values())
    bound = 100 * tolerance(ZOO[name]) * largest
    untouched = wanted.keys() & got.keys()
    for key in untouched:
        torch.testing.assert_close(got[key], wanted[key], rtol=0, atol=bound)
    layers = [(operator_path(pair.model, n), each) for n, each in factorized(pair.model).items()]
    dense_parts = {
        name: value
        for path, layer in layers
        for key, value in (("weight", layer.weight), ("bias", layer.bias))
        if value is not None and (name := planned_weight(pair.model, f"{path}.{key}")[0]) in wanted
    }
    factors = {f"{path}.{k}": p for path, layer in layers for k, p in layer.named_parameters()}
    chained = torch.autograd.grad(
        list(dense_parts.values()), list(factors.values()), [wanted[key] for key in dense_parts]
    )
    for key, gradient in zip(factors, chained, strict=True):
        assert bool(got[key].isfinite().all())
        torch.testing.assert_close(got[key], gradient, rtol=0, atol=bound)
    assert wanted.keys() - untouched <= places(pair)[1]


def gradients(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    model.zero_grad()
    only = real_tokens(batch)
    outputs = [t for t in tensors(model(**batch)) if t.requires_grad]
    sum((t if only is None else t[only]).square().sum() for t in outputs).backward()
    found = {k: p.grad for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


# nn.MultiheadAttention returns a transposed tensor, on which dropout draws its numbers in
# another order than on the contiguous one of the expanded attention.
OTHER_LAYOUT = {"transformer_encoder", "transformer_encoder_padded"}


@pytest.mark.parametrize("name", REWRITABLE)
def test_training_mode_draws_the_same_noise(name: str) -> None:
    """A rewritten layer uses no random numbers, so dropout falls on the same entries."""
    pair = rewritten(name)
    original, model = copy.deepcopy(pair.original).train(), copy.deepcopy(pair.model).train()
    assert all(module.training for module in model.modules())
    batch = double(name)

    def run(module: nn.Module, seed: int) -> Any:
        transformers.set_seed(seed)
        with torch.no_grad():
            return module(**batch)

    first = run(original, 1)
    if name not in OTHER_LAYOUT:
        assert_same(run(model, 1), first, tolerance(ZOO[name]))
    noisy = not _equal(run(original, 2), first)
    assert noisy == (not _equal(run(model, 2), run(model, 1)))
    assert not any(module.training for module in model.eval().modules())


def _equal(a: Any, b: Any) -> bool:
    return all(torch.equal(x, y) for x, y in zip(tensors(a), tensors(b), strict=True))


# ---- what else one does with a model --------------------------------------------------


def _pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def _compiled(model: nn.Module) -> Any:
    torch.compiler.reset()
    return torch.compile(model, backend="eager")


UNPICKLABLE = {
    "segformer": "transformers leaves hooks on it that are local functions",
    "wav2vec2": "torch.nn.utils.parametrize refuses",
}


@pytest.mark.parametrize("treat", [copy.deepcopy, _pickled, _compiled])
@pytest.mark.parametrize("form", ["pivoted", "joint"])
@pytest.mark.parametrize("name", REWRITABLE)
def test_copies_give_the_same_outputs(
    name: str, form: str, treat: Callable[[nn.Module], Any]
) -> None:
    pair = rewritten(name, form)
    batch = double(name)
    if treat is _pickled and name in UNPICKLABLE:
        pair.original(**batch)
        with pytest.raises((AttributeError, RuntimeError)):
            pickle.dumps(pair.original)
        return
    with torch.no_grad():
        # Two modes of one kernel may sum in another order, so not bit for bit.
        assert_same(treat(pair.model)(**batch), pair.model(**batch), tolerance(ZOO[name]))


@pytest.mark.parametrize("form", ["pivoted", "joint"])
@pytest.mark.parametrize("name", HUGGING_FACE)
def test_hugging_face_models_stay_what_they_are(name: str, form: str, tmp_path: Path) -> None:
    pair = rewritten(name, form)
    assert type(pair.model) is type(pair.original)
    assert pair.model.config.to_dict() == pair.original.config.to_dict()
    assert pair.model.config is not pair.original.config
    pair.model.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").exists()
    assert list(tmp_path.glob("*.safetensors"))


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "transformer_encoder", "resnet"])
def test_float32_is_as_accurate_as_the_dense_model(name: str) -> None:
    """The dense model's own error in float32 is the yardstick, and not more than 50 of it."""
    case = ZOO[name]
    pair = rewrite(case.build(), case.batch(), "pivoted")
    exact = copy.deepcopy(pair.original).double()
    with torch.no_grad():
        wanted = tensors(exact(**double(name)))
        dense, got = (tensors(model(**case.batch())) for model in (pair.original, pair.model))
    for a, b, c in zip(wanted, dense, got, strict=True):
        assert float((c - a).abs().max()) <= 50 * float((b - a).abs().max())


def test_nothing_linear_is_a_clear_error() -> None:
    case = ZOO["unet"]
    with pytest.raises(fxcompress.RuleError, match="nothing"):
        fxcompress.compile(case.build(), "every-linear", [case.batch()], progress=False)
