"""A picture of a graph, or of what a plan changes in one."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxcompress.picture.boxes import Tree
from fxcompress.picture.build import build, tree_of_plan
from fxcompress.picture.data import tree_data
from fxcompress.picture.dot import to_dot
from fxcompress.picture.explorer import to_graphs, to_node_data
from fxcompress.picture.nodes import Node
from fxcompress.picture.text import near_text, tree_text
from fxcompress.plans.plan import Plan


@dataclass(frozen=True, eq=False)
class Picture:
    """A graph that can be looked at, alike blocks as one.

    ``print(picture)`` shows it as a tree of modules.

    Attributes:
        title: name of the model.
        tree: its modules and operators.
        unit: of predicted losses; empty if there are none.
    """

    title: str
    tree: Tree
    unit: str = ""

    @classmethod
    def of_graph(cls, title: str, nodes: tuple[Node, ...]) -> Picture:
        """The picture of one graph."""
        return cls(title, build(nodes))

    @classmethod
    def of_plan(cls, plan: Plan) -> Picture:
        """The picture of what a plan changes, from the graphs that it holds."""
        return cls(plan.model_class.rpartition(".")[2], tree_of_plan(plan), plan.loss_unit)

    def __str__(self) -> str:
        return self.text()

    def text(self, depth: int | None = None, width: int | None = None) -> str:
        """The tree of modules as text.

        Args:
            depth: modules deeper than this are one line.
            width: columns; longer lines are cut.
        """
        nodes = f"{len(self.tree.before):,} nodes"
        if not self.tree.single and not self.tree.planned:
            nodes += f" → {len(self.tree.after):,}"
        losses = f"; predicted losses in {self.unit}" if self.unit else ""
        return f"{self.title}: {nodes}{losses}\n{tree_text(self.tree, depth, width)}"

    def near(self, glob: str, width: int | None = None) -> str:
        """Operators by a glob on their path, with what they read and what reads them.

        Args:
            glob: as rules have it; functions are found by their module and name, ``"*.mlp.mul"``.
            width: columns; longer lines are cut.

        Returns:
            A paragraph for each; empty if there is none.
        """
        return near_text(self.tree, glob, width)

    def to_json(self) -> dict[str, Any]:
        """What a page draws it from: see :func:`fxcompress.picture.data.graph_data`."""
        return tree_data(self.tree, self.title, self.unit)

    def to_dot(self) -> str:
        """A digraph for Graphviz."""
        return to_dot(self.tree, self.title)

    def to_model_explorer(self, directory: str | Path) -> tuple[Path, ...]:
        """Write files for Google's Model Explorer.

        Args:
            directory: made if it is not there.

        Returns:
            ``graphs.json``, to be opened, and ``losses.json``, to be added as node data, if there
            are predicted losses.
        """
        folder = Path(directory)
        folder.mkdir(parents=True, exist_ok=True)
        files = {"graphs.json": to_graphs(self.tree, self.title)}
        if not self.tree.single:
            files["losses.json"] = to_node_data(self.tree)
        for name, value in files.items():
            text = json.dumps(value, ensure_ascii=False, indent=1)
            (folder / name).write_text(text, encoding="utf-8")
        return tuple(folder / name for name in files)
