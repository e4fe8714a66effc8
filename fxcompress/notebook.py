"""How results show themselves: one line as ``repr``, and a small piece of HTML in notebooks."""

from __future__ import annotations

import html
import sys

_MOST_LINES = 200
"""Of a text in a notebook; the rest is left to ``print``."""

_COLOURS = {"- ": "#b35900", "+ ": "#1a7f37"}


def in_notebook() -> bool:
    """Whether this runs in the kernel of a notebook (Jupyter, Colab), which has no terminal."""
    if "IPython" not in sys.modules:
        return False
    shell = getattr(sys.modules["IPython"], "get_ipython", lambda: None)()
    return type(shell).__name__ in ("ZMQInteractiveShell", "Shell")


class Shown:
    """A result whose ``str`` is a text of many lines.

    >>> class Two(Shown):
    ...     headline = "2 < 3"
    ...     def __str__(self):
    ...         return "two"
    >>> Two(), Two()._repr_html_()[:31]
    (<Two: 2 < 3>, '<details open><summary>Two: 2 &')
    """

    @property
    def headline(self) -> str:
        """The result in one line."""
        raise NotImplementedError

    def __repr__(self) -> str:
        return f"<{type(self).__name__}: {self.headline}>"

    def _repr_html_(self) -> str:
        lines = str(self).split("\n")
        shown = [_line(line) for line in lines[:_MOST_LINES]]
        if len(lines) > _MOST_LINES:
            shown.append(f"... and {len(lines) - _MOST_LINES} more lines: print it")
        head = html.escape(f"{type(self).__name__}: {self.headline}")
        return (
            f"<details open><summary>{head}</summary>"
            f'<pre style="line-height: 1.2">{"&#10;".join(shown)}</pre></details>'
        )


def _line(line: str) -> str:
    colour = _COLOURS.get(line[:2])
    text = html.escape(line)
    return f'<span style="color: {colour}">{text}</span>' if colour else text
