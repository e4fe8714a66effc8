"""``sweep``: many budgets from one calibration."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

import fxcompress
from fxcompress.cli import options
from fxcompress.cli.app import app
from fxcompress.cli.code import function, is_code
from fxcompress.cli.compressing import loaded
from fxcompress.cli.data import Cut, load_data
from fxcompress.cli.evaluating import evaluate as evaluated
from fxcompress.cli.run import RUN
from fxcompress.cli.terminal import show

MOST_KEEPS = 1000
"""Budgets in one sweep; more come from a mistyped step."""


@app.command(
    epilog="Example: fxcompress sweep decoder -m my-llama -d text.txt --keeps 0.9:0.5:0.1 "
    "--evaluate other.txt --html sweep.html"
)
def sweep(
    rules: options.Rules,
    model: options.Model,
    data: options.Data = None,
    keeps: Annotated[
        str, typer.Option(help="what to keep: 0.9,0.7,0.5, or first:last:step")
    ] = "0.9:0.3:0.1",
    unit: options.Unit = None,
    exclude: options.Exclude = None,
    metric: options.Metric = None,
    seed: options.Seed = None,
    memory: options.Memory = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    evaluate: Annotated[
        str | None,
        typer.Option(
            help="data for perplexity or accuracy, or file.py:function from a model to a number, "
            "or several by name"
        ),
    ] = None,
    html: Annotated[Path | None, typer.Option(help="write a page with a plot to this file")] = None,
    sequences: options.Sequences = 64,
    length: options.Length = 512,
    batch_size: options.Batch = None,
    as_json: options.Json = False,
) -> None:
    """Show what many budgets come to, from one calibration."""
    fractions, cut = parse_keeps(keeps), Cut(sequences, length, batch_size)
    measure = None
    if evaluate is not None and (is_code(evaluate) or not Path(evaluate).exists()):
        measure = function(evaluate, "--evaluate")
    elif evaluate is not None:
        trial = [*(load_data(evaluate, model, cut) or ())]
        measure = lambda network: evaluated(network, trial)  # noqa: E731
    if html is not None and not html.absolute().parent.is_dir():
        raise typer.BadParameter(f"--html {html}: {html.parent} is not a directory")
    given = options.overrides(None, unit, memory, exclude, metric, seed)
    del given["keep"]
    network, batches = loaded(model, data, cut, device, dtype)
    made = fxcompress.sweep(network, rules, batches, keeps=fractions, evaluate=measure, **given)
    if html is not None:
        html.write_text(made.to_html(), encoding="utf-8")
    if as_json:
        typer.echo(json.dumps(made.to_json(), indent=1))
    else:
        show(str(made))
        if html is not None:
            typer.echo(f"\nwritten to {html} in {RUN.took}")
    if not made.complete:
        raise typer.Exit(130)


def parse_keeps(text: str) -> list[float]:
    """``0.9,0.7`` or ``0.9:0.3:0.1``, both ends included if the steps meet the second."""
    try:
        if ":" not in text:
            return [float(part) for part in text.split(",")]
        first, last, step = (float(part) for part in text.split(":"))
        steps = abs(last - first) / abs(step)
        if steps >= MOST_KEEPS:
            raise typer.BadParameter(
                f"--keeps {text!r} is more than {MOST_KEEPS} budgets: take larger steps"
            )
        signed = math.copysign(step, last - first)
        # A step that misses the end by a rounding error only does not miss it.
        return [round(first + signed * at, 9) for at in range(math.floor(steps + 1e-6) + 1)]
    except (ValueError, ZeroDivisionError) as error:
        raise typer.BadParameter(
            f"--keeps {text!r} is neither numbers (0.9,0.7,0.5) nor first:last:step (0.9:0.3:0.1)"
        ) from error
