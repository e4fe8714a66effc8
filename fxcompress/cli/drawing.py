"""``graph``: a model as rules see it, or before and after."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import fxcompress
from fxcompress.cli import options
from fxcompress.cli.app import app
from fxcompress.cli.compressing import loaded
from fxcompress.cli.data import Cut, first_batch
from fxcompress.cli.run import RUN
from fxcompress.cli.terminal import show
from fxcompress.rules.language.globs import GlobError

if TYPE_CHECKING:
    from fxcompress.picture import Picture


@app.command(epilog="Example: fxcompress graph file.py:model -d file.py:batches --depth 2")
def graph(
    source: Annotated[
        str,
        typer.Argument(
            help="a model, as --model takes it elsewhere; or a directory written by save or "
            "compile, or a plan.json: before and after"
        ),
    ],
    data: options.Data = None,
    depth: Annotated[
        int | None, typer.Option(min=1, help="modules deeper than this are one line")
    ] = None,
    node: Annotated[
        str | None, typer.Option(help="only operators of this path, a glob, and their neighbours")
    ] = None,
    dot: Annotated[Path | None, typer.Option(help="write it for Graphviz to this file")] = None,
    model_explorer: Annotated[
        Path | None, typer.Option(help="write it for Google's Model Explorer to this directory")
    ] = None,
    as_json: options.Json = False,
) -> None:
    """Show the graph of a model as rules see it, or what was changed in it."""
    drawn = _picture(source, data)
    if dot is not None:
        dot.write_text(drawn.to_dot(), encoding="utf-8")
        typer.echo(f"written to {dot} in {RUN.took}")
    if model_explorer is not None:
        for path in drawn.to_model_explorer(model_explorer):
            typer.echo(f"written to {path} in {RUN.took}")
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if node is not None:
        try:
            found = drawn.near(node, width)
        except GlobError as error:
            raise typer.BadParameter(f"--node {node}: {error}") from error
        if not found:
            raise typer.BadParameter(f"--node {node}: no operator has such a path")
        show(found)
    elif as_json:
        typer.echo(json.dumps(drawn.to_json(), ensure_ascii=False))
    elif dot is None and model_explorer is None:
        show(drawn.text(depth, width))


def _picture(source: str, data: str | None) -> Picture:
    """The graph of a model, or that of a plan before and after."""
    from fxcompress.saved.load import PLAN, read_plan

    path = Path(source)
    if path.name == PLAN and path.is_file():
        path = path.parent
    if (path / PLAN).is_file():
        return fxcompress.draw(read_plan(path))
    network, batches = loaded(source, data, Cut(1, 16, None), None, None)
    example = getattr(network, "dummy_inputs", None) if batches is None else first_batch(batches)
    if example is None:
        raise typer.BadParameter("graph runs the model once: give --data")
    return fxcompress.draw(network, example)
