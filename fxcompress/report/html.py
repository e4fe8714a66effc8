"""One HTML page that needs no network, no server and no other file.

Data goes in as JSON, and only the script of the page makes elements of it, from text: nothing that
came from a model or a rule file is ever markup.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined, Template

SCRIPTS = (
    *("elements.js", "draw.js", "table.js", "sites.js"),
    *("graph-boxes.js", "graph.js", "page.js"),
)
"""In their order."""

STYLES = ("style.css", "graph.css")


def render(data: Mapping[str, Any], totals: list[str]) -> str:
    """The page.

    Args:
        data: of :func:`fxcompress.report.page_data.page_data`, or of a sweep.
        totals: lines for readers without JavaScript.
    """
    folder = files("fxcompress.report").joinpath("page")
    page: str = _template().render(
        title=data["title"],
        kind={"diff": "graph diff", "sweep": "sweep over budgets"}[data["kind"]],
        style="\n".join(folder.joinpath(name).read_text("utf-8") for name in STYLES),
        scripts=[folder.joinpath(name).read_text("utf-8") for name in SCRIPTS],
        data=embedded(data),
        totals=totals,
    )
    return page


def embedded(data: Mapping[str, Any]) -> str:
    """JSON that can stand in a ``<script>``: no character of it can end that or open a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


@cache
def _template() -> Template:
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    source = files("fxcompress.report").joinpath("page", "page.html.j2").read_text("utf-8")
    return environment.from_string(source)
