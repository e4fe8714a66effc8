"""Text for people: within the width of the terminal, what was removed red, what was added green.

Where the output is no terminal it is the plain text, whatever its width.  ``NO_COLOR`` is respected
(rich does that).
"""

from __future__ import annotations

import sys
import textwrap

import typer

_STYLES = {"- ": "red", "+ ": "green"}


def show(text: str) -> None:
    """Print a report."""
    if not sys.stdout.isatty():
        typer.echo(text)
        return
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False, markup=False, emoji=False)
    for line in text.split("\n"):
        style = _STYLES.get(line[:2], "")
        for piece in within(line, console.width):
            console.print(Text(piece, style), overflow="ignore", no_wrap=True, crop=False)


def within(line: str, width: int) -> list[str]:
    """A line in pieces that fit; those behind the first are indented below it.

    >>> within("- up_proj  linear 576→1536  884,736", 20)
    ['- up_proj  linear', '      576→1536', '      884,736']
    """
    if len(line) <= width or width < 20:
        return [line]
    indent = " " * (len(line) - len(line.lstrip(" +-")) + 4)
    return textwrap.wrap(
        line, width, subsequent_indent=indent, break_on_hyphens=False, drop_whitespace=True,
        replace_whitespace=False,
    )  # fmt: skip
