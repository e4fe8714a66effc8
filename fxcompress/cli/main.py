"""The entry point: errors and warnings in one clean line each."""

from __future__ import annotations

import sys
import warnings
from typing import Any

import typer

from fxcompress.cli.app import app
from fxcompress.errors import FxcompressError, FxcompressWarning


def main() -> None:
    """Entry point: errors of ours are printed without a traceback, with exit status 1."""
    warnings.showwarning = _show_warning  # type: ignore[assignment]
    try:
        app()
    except (FxcompressError, OSError) as error:
        typer.secho(f"error: {error}", err=True, fg="red")
        sys.exit(1)


def _show_warning(message: Warning | str, category: type[Warning], *rest: Any) -> None:
    if issubclass(category, FxcompressWarning):
        typer.secho(f"warning: {message}", err=True, fg="yellow")
