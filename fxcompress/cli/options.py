"""Arguments that several commands have, and what is made of them."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from fxcompress.metric.words import BUILT_IN as METRICS
from fxcompress.plans.units import UNITS
from fxcompress.rules.language.diagnostics import as_fraction
from fxcompress.rules.language.presets import preset_names


def _fraction(text: str | float) -> float:
    try:
        return float(text)
    except ValueError:
        hint = as_fraction(text) or "for example 0.8"
        raise typer.BadParameter(f"{text!r} is no fraction: {hint}") from None


Rules = Annotated[str, typer.Argument(help="rule file, or a preset: " + ", ".join(preset_names()))]
Model = Annotated[
    str, typer.Option("--model", "-m", help="Hugging Face directory, or file.py:function")
]
Data = Annotated[
    str | None,
    typer.Option(
        "--data",
        "-d",
        help="text, .jsonl, .npy, .npz, .pt or .safetensors file, folder of images, or "
        "file.py:function giving batches",
    ),
]
Keep = Annotated[
    float | None,
    typer.Option(parser=_fraction, metavar="FRACTION", help="overrides budget.keep of the rules"),
]
Unit = Annotated[
    str | None, typer.Option(help=f"overrides budget.unit of the rules: {', '.join(UNITS)}")
]
Memory = Annotated[
    str | None,
    typer.Option(help="what the work may take beside the model, as in 8GiB; else most of it"),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option(help="glob on module paths: what it matches stays dense; may be repeated"),
]
Metric = Annotated[
    str | None, typer.Option(help=f"overrides metric.kind of the rules: {', '.join(METRICS)}")
]
Seed = Annotated[int | None, typer.Option(help="overrides metric.seed of the rules")]
Device = Annotated[str | None, typer.Option(help="where the model runs: cpu, cuda, cuda:1, mps")]
Dtype = Annotated[
    str | None, typer.Option(help="type of its weights: float32, bfloat16 or float16")
]
Sequences = Annotated[int, typer.Option(min=1, help="how many sequences to cut from a text")]
Length = Annotated[int, typer.Option(min=1, help="tokens in each of them")]
Batch = Annotated[
    int | None, typer.Option(min=1, help="rows of a batch from a file: 2 sequences, else 32")
]
Json = Annotated[bool, typer.Option("--json", help="print JSON, for other programs")]


def overrides(
    keep: float | None,
    unit: str | None,
    memory: str | None,
    exclude: list[str] | None,
    metric: str | None,
    seed: int | None,
) -> dict[str, Any]:
    """What the functions of the API are given instead of what the rules say."""
    return {
        "keep": keep,
        "unit": unit,
        "memory": memory,
        "exclude": exclude or None,
        "metric": metric,
        "seed": seed,
    }
