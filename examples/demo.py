"""Compress SmolLM2-135M to 80 % of its decoder parameters, and say what it cost.

    python examples/demo.py            # what `make demo` runs
    python examples/demo.py --keep 0.6

Calibrated on one book, measured on another.
"""

from __future__ import annotations

import argparse
import resource
import time
import warnings
from pathlib import Path

import torch
from smollm2 import CALIBRATION, HELD_OUT, LENGTH, Reference, batches, load_model, sequences

import fxcompress


def main() -> None:
    """Run the demo."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--keep", type=float, default=0.8, help="fraction of the parameters")
    arguments.add_argument("--rules", default="decoder", help="rule file or preset")
    arguments.add_argument("--calibrate", type=int, default=64, help="sequences of 512 tokens")
    arguments.add_argument("--evaluate", type=int, default=16, help="sequences of 512 tokens")
    arguments.add_argument("--out", type=Path, default=Path("out/smollm2"))
    options = arguments.parse_args()
    start = time.perf_counter()
    torch.manual_seed(0)

    print("loading SmolLM2-135M ...", flush=True)
    model, tokenizer = load_model()
    calibration = batches(sequences(tokenizer, CALIBRATION, options.calibrate))
    held_out = sequences(tokenizer, HELD_OUT, options.evaluate)

    with warnings.catch_warnings():
        warnings.simplefilter("default")
        small = fxcompress.compile(
            model, options.rules, calibration, keep=options.keep, progress=True
        )
    plan = fxcompress.plan_of(small)

    print("\n" + str(fxcompress.diff(model, small)))

    print("measuring on held-out text ...", flush=True)
    reference = Reference(model, held_out)
    dense, compressed = reference.dense, reference.compare(small)
    prompt = tokenizer("Alice was beginning to get very tired of", return_tensors="pt")
    generated = [
        tokenizer.decode(m.generate(**prompt, max_new_tokens=24, do_sample=False)[0])
        for m in (model, small)
    ]

    fxcompress.save(small, options.out)
    tokenizer.save_pretrained(options.out)
    html = options.out / "diff.html"
    html.write_text(fxcompress.diff(model, small).to_html(), encoding="utf-8")
    loaded = fxcompress.load(options.out)
    with torch.no_grad():
        same = torch.equal(
            small(held_out[:1]).logits.argmax(-1), loaded(held_out[:1]).logits.argmax(-1)
        )

    predicted, held_back = plan.budget.predicted, plan.held_back
    speed, samples = plan.speed, plan.batch.samples
    assert held_back is not None
    assert speed is not None
    assert samples is not None
    print(f"""
SmolLM2-135M, {plan.rules}, keep {options.keep:g} of the matched parameters
calibrated on {options.calibrate} x {LENGTH} tokens of {CALIBRATION.stem}, \
measured on {options.evaluate} x {LENGTH} tokens of {HELD_OUT.stem}

                                  before        after
held-out perplexity         {dense.perplexity:12.2f} {compressed.perplexity:12.2f}
KL to the dense model       {dense.kl:12.4f} {compressed.kl:12.4f}   nats per token
top-1 agreement             {dense.agreement:12.1%} {compressed.agreement:12.1%}
parameters, whole model     {plan.model_before.parameters:12,} {plan.model_after.parameters:12,}
MACs per {LENGTH} tokens         {plan.model_before.macs / samples:12.3e} \
{plan.model_after.macs / samples:12.3e}
forward pass, {samples} x {LENGTH} tokens  {1:12.2f} {speed.ratio:12.2f}   times as fast (\
{speed.machine})

KL on {held_back.batches} calibration batches held back  {held_back.measured:.4f}, \
predicted {predicted:.4f} (ratio {held_back.measured / max(predicted, 1e-12):.2f})

dense      {generated[0]!r}
compressed {generated[1]!r}
""")
    for file in sorted(options.out.iterdir()):
        print(f"{file.stat().st_size:12,}  {file}")
    print(f"saved and loaded again: {'same predictions' if same else 'DIFFERENT PREDICTIONS'}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(f"{time.perf_counter() - start:.0f} s in all, peak memory {peak:.1f} GiB")
    if not same:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
