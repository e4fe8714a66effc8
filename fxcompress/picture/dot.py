"""The graph for Graphviz, before and after, alike blocks as one."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fxcompress.picture.boxes import AFTER, BEFORE, OUTSIDE, STATUSES, Tree
from fxcompress.picture.colours import COLOURS
from fxcompress.picture.folded import Entry, Folded, fold_tree, run_label


def to_dot(tree: Tree, title: str) -> str:
    """A digraph with a cluster for every module, the values that enter and leave it at points.

    Args:
        tree: the graph.
        title: name of the digraph.
    """
    folded = fold_tree(tree)
    lines = [
        f"digraph {quoted(title)} {{",
        '  graph [compound=true, fontname="Helvetica", fontsize=11];',
        '  node [shape=box, style="filled,rounded", fillcolor=white, fontname="Helvetica",'
        " fontsize=10];",
    ]
    for side, name in ((BEFORE, "before"), (AFTER, "after")):
        if tree.single and side == AFTER:
            continue
        lines.append(f"  subgraph {quoted(f'cluster_{name}')} {{")
        label = (
            title
            if tree.single
            else f"{name}, as planned"
            if tree.planned and side == AFTER
            else name
        )
        lines.append(f"    label={quoted(label)};")
        lines += _inside(folded, folded.root, side, name, "    ")
        lines.append("  }")
    return "\n".join([*lines, "}", ""])


def quoted(text: str) -> str:
    """A text as an identifier or a label, with no escape of Graphviz in it.

    >>> print(quoted('a "b" \\\\N'))
    "a \\"b\\" \\\\\\\\N"
    """
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ") + '"'


def _inside(folded: Folded, kind: int, side: int, way: str, indent: str) -> Iterator[str]:
    found = folded.kinds[kind]
    entries = found.entries
    for place, entry in enumerate(entries):
        if not entry.sides & side:
            continue
        at = f"{way}/{place}"
        if not _opens(entry, side):
            yield f"{indent}{quoted(at)} [{_look(entry, side)}];"
            continue
        yield f"{indent}subgraph {quoted(f'cluster_{at}')} {{"
        yield f"{indent}  label={quoted(_title(entry, side))};"
        if entry.is_module:
            yield f"{indent}  style=rounded; color=gray50;"
        else:
            yield f'{indent}  style="rounded,filled"; fillcolor={quoted(COLOURS[entry.status])};'
        inner = folded.kinds[entry.kinds[0]].edges
        for port, used in (
            ("in", any(edge.source == OUTSIDE and edge.sides & side for edge in inner)),
            ("out", any(edge.target == OUTSIDE and edge.sides & side for edge in inner)),
        ):
            if used:
                yield f'{indent}  {quoted(f"{at}/{port}")} [shape=point, label="", width=0.06];'
        yield from _inside(folded, entry.kinds[0], side, at, f"{indent}  ")
        yield f"{indent}}}"
    for edge in found.edges:
        if edge.sides & side:
            ends = (
                _end(way, edge.source, entries, side, "out"),
                _end(way, edge.target, entries, side, "in"),
            )
            yield f"{indent}{quoted(ends[0])} -> {quoted(ends[1])};"


def _end(way: str, place: int, entries: Sequence[Entry], side: int, port: str) -> str:
    """Where an edge begins or ends: at a node, or at the point of a module."""
    if place == OUTSIDE:
        return f"{way}/{'in' if port == 'out' else 'out'}"
    opens = _opens(entries[place], side)
    return f"{way}/{place}/{port}" if opens else f"{way}/{place}"


def _opens(entry: Entry, side: int) -> bool:
    return bool(entry.kinds) and (entry.is_module or side == AFTER)


def _title(entry: Entry, side: int) -> str:
    alike = f" ({len(entry.labels)} alike)" if len(entry.labels) > 1 else ""
    text = "" if entry.is_module else f": {entry.after}"
    return run_label(entry.labels) + alike + text


def _look(entry: Entry, side: int) -> str:
    text, shape = (
        (entry.before, entry.shape) if side == BEFORE else (entry.after, entry.shape_after)
    )
    lines = [run_label(entry.labels)]
    if text and text != lines[0]:
        lines.append(text)
    if shape:
        lines.append(shape)
    label = "\\n".join(quoted(line)[1:-1] for line in lines)
    return (
        f'label="{label}", fillcolor={quoted(COLOURS[entry.status])}, '
        f"tooltip={quoted(STATUSES[entry.status])}"
    )
