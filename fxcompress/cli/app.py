"""The command ``fxcompress`` itself: version, and modules to import first."""

from __future__ import annotations

from typing import Annotated, Any

import typer
import typer.core

import fxcompress
from fxcompress.cli.code import import_code
from fxcompress.cli.run import RUN, restart


class Interruptible(typer.core.TyperGroup):
    """Commands that an interruption ends with one line, which says what was kept."""

    def invoke(self, ctx: Any) -> Any:
        """Run the command that was asked for."""
        restart()
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            typer.secho(f"interrupted; {RUN.kept or 'nothing was written'}", err=True)
            raise typer.Exit(130) from None


app = typer.Typer(
    name="fxcompress",
    cls=Interruptible,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _show_version(asked: bool) -> None:
    if asked:
        typer.echo(f"fxcompress {fxcompress.__version__}")
        raise typer.Exit


Modules = Annotated[
    list[str] | None,
    typer.Option("--import", help="module or file.py to import first: it registers forms, metrics"),
]


@app.callback(
    epilog="Example: fxcompress compile decoder --model my-llama --data text.txt --out out/small"
)
def before(
    modules: Modules = None,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="show it and exit"),
    ] = False,
) -> None:
    """Low-rank compression of PyTorch models by declarative graph rewriting."""
    for place in modules or ():
        try:
            import_code(place)
        except Exception as error:  # whatever the user's file does
            raise typer.BadParameter(
                f"--import {place}: {type(error).__name__}: {error}"
            ) from error
