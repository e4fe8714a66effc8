"""The graph for Google's Model Explorer: a collection of graphs, and values of their nodes.

The format is that of ``ai-edge-model-explorer`` (``graph_builder.py``, ``node_data_builder.py``).
Every node is there; modules are layers that open and close.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fxcompress.picture.boxes import AFTER, BEFORE, STATUSES, UNCHANGED, Box, Tree
from fxcompress.picture.colours import COLOURS
from fxcompress.picture.nodes import Node, shape_text
from fxcompress.picture.told import status_text


def to_graphs(tree: Tree, title: str) -> dict[str, Any]:
    """A collection of the graph before and after, or of the one that there is."""
    sides = [("before", BEFORE), ("after", AFTER)]
    if tree.single:
        sides = [(title, BEFORE)]
    graphs = [{"id": name, "nodes": [*_nodes(tree, side)]} for name, side in sides]
    return {"label": title, "graphs": graphs}


def to_node_data(tree: Tree) -> dict[str, Any]:
    """Predicted losses of operators, by graph and node; that of several together is told once."""
    found: dict[str, Any] = {}
    for name, side in (("before", BEFORE), ("after", AFTER)):
        results = {}
        for node, box in _walk(tree, side):
            site = box.site
            if site is not None and site.form is not None and site.reader in ("", site.name):
                results[node.name] = {"value": site.predicted}
        found[name] = {
            "results": results,
            "gradient": [
                {"stop": 0, "bgColor": "#ffffff"},
                {"stop": 1, "bgColor": "#f08c4a"},
            ],
        }
    return found


def _walk(tree: Tree, side: int) -> Iterator[tuple[Node, Box]]:
    """Nodes of a side; of what took an operator's place, its last one stands for it."""
    for box in tree.root.walk():
        node = box.before if side == BEFORE else box.after
        if node is not None:
            yield node, box
        elif box.site is not None and side == AFTER:
            last = [each.after for each in box.inside if each.after is not None][-1:]
            yield from ((each, box) for each in last)


def _nodes(tree: Tree, side: int) -> Iterator[dict[str, Any]]:
    ways = tree.before if side == BEFORE else tree.after
    for name, way in ways.items():
        boxes = [tree.root]
        for place in way:
            boxes.append(boxes[-1].inside[place])
        box = boxes[-1]
        node = box.before if side == BEFORE else box.after
        if node is None:
            continue
        # A site is inside of its own layer where other operators took its place.
        around = [each.label.replace("/", "∕") for each in boxes[1:-1]]
        outer = next((each for each in reversed(boxes) if each.site is not None), box)
        attributes = {
            "op": node.text,
            "path": node.path,
            "shape": shape_text(node.shape),
            **({} if tree.single else {"what happened": STATUSES[outer.status]}),
        }
        if outer.site is not None:
            site = outer.site
            rewritten = [site] if site.form is not None else []
            attributes |= {
                "site": site.name,
                "rewritten to": status_text(outer, rewritten),
                "parameters": f"{site.before.parameters:,} → {site.after.parameters:,}",
                "rule": f"{site.rule} ({site.location})",
                "stays dense": site.reason,
            }
        made: dict[str, Any] = {
            "id": name,
            "label": box.label
            if box.function or box.label == node.op
            else f"{box.label}: {node.op}",
            "namespace": "/".join(around),
            "attrs": [{"key": key, "value": value} for key, value in attributes.items() if value],
            "incomingEdges": [
                {
                    "sourceNodeId": source,
                    "sourceNodeOutputId": "0",
                    "targetNodeInputId": str(at),
                }
                for at, source in enumerate(node.inputs)
                if source in ways
            ],
            "outputsMetadata": [
                {"id": "0", "attrs": [{"key": "tensor_shape", "value": shape_text(node.shape)}]}
            ],
        }
        if outer.status != UNCHANGED:
            made["style"] = {"backgroundColor": COLOURS[outer.status]}
        yield made
