"""``compile`` and ``plan``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fxcompress
from fxcompress.cli import options
from fxcompress.cli.app import app
from fxcompress.cli.data import Cut, load_data, without_labels
from fxcompress.cli.evaluating import evaluate as evaluated
from fxcompress.cli.models import copy_tokenizer, load_model
from fxcompress.cli.run import RUN
from fxcompress.cli.terminal import show
from fxcompress.errors import SaveError
from fxcompress.files import try_directory
from fxcompress.progress import stages

if TYPE_CHECKING:
    from torch import nn

EVALUATION = "evaluation.json"
"""What ``--evaluate`` found, beside the model."""


@app.command(
    epilog="Example: fxcompress compile decoder -m my-llama -d text.txt --evaluate other.txt "
    "--exclude '*.layers.0.*' -o out/small"
)
def compile(
    rules: options.Rules,
    model: options.Model,
    out: Annotated[Path, typer.Option("--out", "-o", help="directory to save to")],
    data: options.Data = None,
    keep: options.Keep = None,
    unit: options.Unit = None,
    exclude: options.Exclude = None,
    metric: options.Metric = None,
    seed: options.Seed = None,
    memory: options.Memory = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    held_out: Annotated[
        str | None,
        typer.Option("--measure", help="other data, to measure what every site loses"),
    ] = None,
    evaluate: Annotated[
        str | None,
        typer.Option(help="other data, for perplexity or accuracy before and after"),
    ] = None,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="directory for what was measured: a run that was cut off goes on"),
    ] = None,
    plain: Annotated[
        bool,
        typer.Option("--plain", help="save it as an ordinary Hugging Face model, without a plan"),
    ] = False,
    sequences: options.Sequences = 64,
    length: options.Length = 512,
    batch_size: options.Batch = None,
    as_json: options.Json = False,
) -> None:
    """Compress a model and save it: weights, plan.json, diff.txt and diff.html."""
    standing = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not standing.is_dir():
        raise typer.BadParameter(f"--out {out}: {standing} is a file, not a directory")
    given = options.overrides(keep, unit, memory, exclude, metric, seed)
    cut = Cut(sequences, length, batch_size)
    with stages() as progress:
        progress.stage("load")
        from fxcompress.saved.plain import check_plain_directory
        from fxcompress.saved.save import check_directory

        (check_plain_directory if plain else check_directory)(out)  # not after hours of work
        if checkpoint is not None:
            try_directory(checkpoint)
            RUN.kept = f"what was measured until then is in {checkpoint}: run it again to go on"
        dense = load_model(model, device, dtype)
        batches = without_labels(load_data(data, model, cut), dense)
        others = None if held_out is None else load_data(held_out, model, cut)
        trial = None if evaluate is None else [*(load_data(evaluate, model, cut) or ())]
    figures = {} if trial is None else {"before": evaluated(dense, trial)}
    small = fxcompress.compile(dense, rules, batches, progress=True, checkpoint=checkpoint, **given)
    _save(small, out, plain=plain)
    RUN.kept = f"the compressed model is in {out}, without what was still to be measured"
    if others is not None:
        fxcompress.measure(dense, small, without_labels(others, dense), progress=True)
        _save(small, out, plain=plain)  # again, with what was measured
    if trial is not None:
        figures["after"] = evaluated(small, trial)
        (out / EVALUATION).write_text(json.dumps(figures, indent=1), encoding="utf-8")
    difference = fxcompress.diff(dense, small)
    (out / "diff.txt").write_text(f"{difference}\n", encoding="utf-8")
    (out / "diff.html").write_text(difference.to_html(), encoding="utf-8")
    copy_tokenizer(model, out)
    if as_json:
        found = {**difference.to_json(), "evaluation": figures, "saved": str(out)}
        typer.echo(json.dumps(found, indent=1))
        return
    show_report(difference, figures)
    loader = f"{type(small).__name__}.from_pretrained" if plain else "fxcompress.load"
    typer.echo(f"saved to {out} in {RUN.took}; load it with {loader}({str(out)!r})")


def show_report(difference: Any, figures: dict[str, dict[str, float]]) -> None:
    """What was changed, and behind it, where the reader looks first, what that cost."""
    from fxcompress.report.summary import held_back_line, speed_line

    lines = [str(difference), "", held_back_line(difference.plan), speed_line(difference.plan)]
    before, after = figures.get("before", {}), figures.get("after", {})
    lines += [f"{name} {before[name]:.4g} → {after[name]:.4g}" for name in before if name in after]
    show("\n".join(lines))


def _save(model: nn.Module, out: Path, *, plain: bool) -> None:
    """Save a model; one that cannot be a plain checkpoint is not lost."""
    try:
        fxcompress.save(model, out, plain=plain)
    except SaveError as error:
        if not plain:
            raise
        instead = fxcompress.save(model, out / "with-plan")
        raise SaveError(f"{error}. It was saved to {instead}, with its plan") from error


@app.command(epilog="Example: fxcompress plan decoder -m my-llama -d text.txt --keep 0.7")
def plan(
    rules: options.Rules,
    model: options.Model,
    data: options.Data = None,
    keep: options.Keep = None,
    unit: options.Unit = None,
    exclude: options.Exclude = None,
    metric: options.Metric = None,
    seed: options.Seed = None,
    memory: options.Memory = None,
    device: options.Device = None,
    dtype: options.Dtype = None,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="only say what memory and time it will take at least"),
    ] = False,
    sequences: options.Sequences = 64,
    length: options.Length = 512,
    batch_size: options.Batch = None,
    as_json: options.Json = False,
) -> None:
    """Show the ranks that compile would choose, without rewriting anything."""
    given = options.overrides(keep, unit, memory, exclude, metric, seed)
    network, batches = loaded(model, data, Cut(sequences, length, batch_size), device, dtype)
    if dry_run:
        from fxcompress.rules import read_rules

        told = fxcompress.forecast(network, read_rules(rules, **given), batches or ())
        typer.echo(json.dumps(asdict(told), indent=1) if as_json else str(told))
        return
    made = fxcompress.plan(network, rules, batches, **given)
    if as_json:
        typer.echo(made.model_dump_json(indent=1))
    else:
        show(str(made))


def loaded(
    model: str, data: str | None, cut: Cut, device: str | None, dtype: str | None
) -> tuple[nn.Module, Any]:
    """A model, and batches as it takes them; where that is a terminal, progress is shown."""
    with stages() as progress:
        progress.stage("load")
        network = load_model(model, device, dtype)
        return network, without_labels(load_data(data, model, cut), network)
