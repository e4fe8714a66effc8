"""``explain``, ``diff``, ``report`` and ``load``: what would be changed, and what was."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

import fxcompress
from fxcompress.cli import options
from fxcompress.cli.app import app
from fxcompress.cli.compressing import EVALUATION, loaded, show_report
from fxcompress.cli.data import Cut, first_batch
from fxcompress.cli.models import load_model
from fxcompress.cli.run import RUN
from fxcompress.cli.terminal import show
from fxcompress.errors import LoadError

Directory = Annotated[Path, typer.Argument(help="a directory written by save or compile")]


@app.command(epilog="Example: fxcompress explain mine.yaml -m file.py:model -d file.py:batches")
def explain(
    rules: options.Rules,
    model: options.Model,
    data: options.Data = None,
    rule: Annotated[str | None, typer.Option("--rule", "-r", help="explain this rule only")] = None,
    budget: Annotated[
        bool, typer.Option("--budget", help="calibrate and solve the budget too: what stays dense")
    ] = False,
    keep: options.Keep = None,
    unit: options.Unit = None,
    exclude: options.Exclude = None,
    metric: options.Metric = None,
    seed: options.Seed = None,
    memory: options.Memory = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    sequences: options.Sequences = 64,
    length: options.Length = 512,
    batch_size: options.Batch = None,
    as_json: options.Json = False,
) -> None:
    """Which operators each rule matches, and why the others not."""
    given = options.overrides(keep, unit, memory, exclude, metric, seed)
    cut = Cut(sequences, length, batch_size) if budget else Cut(1, 16, batch_size)
    network, batches = loaded(model, data, cut, device, dtype)
    # Hugging Face models bring inputs to try them on.
    example = getattr(network, "dummy_inputs", None) if batches is None else None
    if budget:
        given["calibration"] = () if batches is None else batches
    else:
        example = example if batches is None else first_batch(batches)
        if example is None:
            raise typer.BadParameter("explain runs the model once: give --data")
    explanation = fxcompress.explain(network, rules, example, rule=rule, **given)
    if as_json:
        typer.echo(json.dumps(explanation.to_json(), ensure_ascii=False, indent=2))
    else:
        show(str(explanation))


@app.command(epilog="Example: fxcompress diff out/small --html diff.html")
def diff(
    directory: Directory,
    other: Annotated[
        Path | None, typer.Argument(help="another such directory, to compare with")
    ] = None,
    html: Annotated[Path | None, typer.Option(help="write the page to this file")] = None,
    as_json: options.Json = False,
) -> None:
    """Show what was changed in a saved model, or how two of them differ."""
    from fxcompress.report.comparison import comparison_text
    from fxcompress.saved.load import read_plan

    difference = _saved_diff(directory)
    beside = None if other is None else read_plan(other)
    if html is not None:
        html.write_text(difference.to_html(beside), encoding="utf-8")
        typer.echo(f"written to {html} in {RUN.took}")
    elif beside is not None and not as_json:
        show(comparison_text(difference.plan, beside))
    elif as_json:
        typer.echo(json.dumps(difference.to_json(), indent=1))
    else:
        show(str(difference))


@app.command(epilog="Example: fxcompress report out/small")
def report(directory: Directory, as_json: options.Json = False) -> None:
    """Show again what compile printed of a saved run, from its files."""
    difference, figures = _saved_diff(directory), {}
    path = directory / EVALUATION
    if path.is_file():
        figures = _figures(path)
    if as_json:
        typer.echo(json.dumps({**difference.to_json(), "evaluation": figures}, indent=1))
    else:
        show_report(difference, figures)


def _saved_diff(directory: Path) -> Any:
    from fxcompress.report import diff_plan
    from fxcompress.saved.load import read_plan

    return diff_plan(read_plan(directory))


def _figures(path: Path) -> dict[str, dict[str, float]]:
    """What ``--evaluate`` found; such a file may come from anybody."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        return {
            when: {str(name): float(value) for name, value in found[when].items()}
            for when in ("before", "after")
        }
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise LoadError(
            f"{path} does not hold what --evaluate writes ({type(error).__name__}): remove it"
        ) from error


@app.command(epilog="Example: fxcompress load out/small")
def load(
    directory: Directory,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="file.py:function; not for Hugging Face")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Load a saved model strictly, to check that the files are whole, and print it."""
    found = fxcompress.load(directory, None if model is None else load_model(model))
    record = fxcompress.plan_of(found)
    if as_json:
        typer.echo(record.model_dump_json(indent=1))
    else:
        show(str(record))
