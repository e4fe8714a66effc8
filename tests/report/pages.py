"""Pages as tests read them: elements, and the data that the script draws."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

VOID = {"meta", "link", "br", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements and data of a page; fails where tags do not nest."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(source)
        self.close()
        assert not self.open
        found = re.findall(
            r'<script type="application/json" id="data">(.*?)</script>', source, re.S
        )
        assert len(found) == 1
        self.data: dict[str, Any] = json.loads(found[0])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "script" not in self.open and "style" not in self.open:
            self.text += data

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]

    def column(self, head: str, group: str = "") -> list[Any]:
        """Values of a column of the table of sites."""
        (found,) = [
            one
            for one in self.data["sites"]["columns"]
            if (one["head"], one["group"]) == (head, group)
        ]
        values: list[Any] = found["values"]
        return values

    def words(self, key: str) -> list[Any]:
        """Values of sites that are kept as places in a list."""
        held = self.data["sites"][key]
        return [held["words"][at] for at in held["at"]]
