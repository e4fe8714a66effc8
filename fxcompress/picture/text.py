"""The graph as text: a tree of modules, alike blocks as one; and one operator's neighbours."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fxcompress.picture.boxes import AFTER, BEFORE, UNCHANGED, Box, Tree
from fxcompress.picture.folded import Entry, Folded, fold_tree, run_label
from fxcompress.picture.nodes import Node, shape_text
from fxcompress.picture.told import status_text
from fxcompress.rules import compile_globs

WIDEST_NAME = 44
"""Columns of names; a longer one moves its own line only."""


@dataclass(frozen=True)
class _Line:
    name: str
    what: str = ""
    shape: str = ""
    after: str = ""


def tree_text(tree: Tree, depth: int | None = None, width: int | None = None) -> str:
    """Modules and their operators, one a line, in the order in which they run.

    ::

        model
          layers.0 … 29             30 alike
            mlp
              gate_proj             linear 576→1536   2×50×1536   → narrow, k 896..1,200 of 1,536
              act_fn                silu              2×50×1536   → 2×50×k
              ...

    Args:
        tree: the graph.
        depth: modules deeper than this are one line.
        width: columns; longer lines are cut.
    """
    folded = fold_tree(tree)
    lines = [*_lines(tree, folded, folded.root, [tree.root], 0, depth)]
    names = max((min(len(line.name), WIDEST_NAME) for line in lines), default=0)
    what = max((min(len(line.what), 40) for line in lines if line.shape), default=0)
    shapes = max((len(line.shape) for line in lines), default=0)
    texts = (
        f"{line.name:{names}}  {line.what:{what}}  {line.shape:{shapes}}  {line.after}".rstrip()
        for line in lines
    )
    return "\n".join(text if width is None else _cut(text, width) for text in texts)


def _lines(
    tree: Tree,
    folded: Folded,
    kind: int,
    boxes: Sequence[Box],
    level: int,
    depth: int | None,
) -> Iterator[_Line]:
    """Lines of what is inside of alike boxes."""
    for entry in folded.kinds[kind].entries:
        those = [box.inside[place] for box in boxes for place in entry.places]
        name = "  " * level + run_label(entry.labels)
        if not entry.is_module:
            yield _operator_line(tree, entry, those, name)
            continue
        alike = f"{len(entry.labels)} alike" if len(entry.labels) > 1 else ""
        if depth is not None and level + 1 >= depth:
            yield _Line(name, ", ".join(filter(None, (alike, _summary(those[0])))))
            continue
        yield _Line(name, alike)
        if entry.kinds:
            yield from _lines(tree, folded, entry.kinds[0], those, level + 1, depth)


def _operator_line(tree: Tree, entry: Entry, boxes: Sequence[Box], name: str) -> _Line:
    box = boxes[0]
    if entry.call and not entry.function:
        name += f" (call {entry.call + 1})"
    what = entry.before or entry.after
    what = "" if entry.function and what == entry.labels[0] else what
    shape = entry.shape or entry.shape_after
    if tree.single:
        return _Line(name, what, shape)
    sites = [each.site for each in boxes if each.site is not None and each.site.form is not None]
    after = status_text(box, sites)
    if not after and box.status != UNCHANGED:
        after = entry.shape_after
    return _Line(name, what, shape, f"→ {after}" if after else "")


def _summary(box: Box) -> str:
    """``"31 operators: 4 linear, 5 transpose, ..."``."""
    ops = Counter(each.before.op for each in box.walk() if each.before is not None)
    total = sum(ops.values())
    most = ", ".join(f"{number} {op}" for op, number in ops.most_common(3))
    return f"{total} operator{'s' * (total != 1)}: {most}{', ...' * (len(ops) > 3)}"


def near_text(tree: Tree, glob: str, width: int | None = None) -> str:
    """Operators by a glob on their path, with what each reads and what reads it.

    A function is found by the path of its module and its own name: ``"*.mlp.mul"``.

    Args:
        tree: the graph.
        glob: as rules have it.
        width: columns; longer lines are cut.

    Returns:
        One paragraph for each; empty if none has such a name.

    Raises:
        GlobError: the glob cannot be read.
    """
    wanted = compile_globs([glob])
    near = {BEFORE: _neighbours(tree, BEFORE), AFTER: _neighbours(tree, AFTER)}
    found = []
    for box in tree.root.walk():
        if box.is_module or not wanted.match(name_of(box)):
            continue
        node = box.before or box.after
        lines = [f"{name_of(box)}  {_words(node)}".rstrip()]
        side = BEFORE if box.before is not None else AFTER
        reads, readers = near[side]
        name = "" if node is None else node.name
        lines += [f"  reads    {text}" for text in reads.get(name, ())]
        lines += [f"  read by  {text}" for text in readers.get(name, ())]
        sites = [box.site] if box.site is not None and box.site.form is not None else []
        after = "" if tree.single else status_text(box, sites)
        if not after and box.status != UNCHANGED:
            after = _words(box.after)
        if after:
            lines.append(f"  after    {after}")
        lines += [f"           {each.label}  {_words(each.after)}" for each in box.inside]
        found.append("\n".join(line if width is None else _cut(line, width) for line in lines))
    return "\n\n".join(found)


def name_of(box: Box) -> str:
    """Path of an operator; of a function, that of its module and its name."""
    return f"{box.path}.{box.label}".lstrip(".") if box.function else box.path


def _neighbours(tree: Tree, side: int) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """What every node reads, and what reads it, in words."""
    ways = tree.before if side == BEFORE else tree.after
    nodes: dict[str, Node] = {}
    texts: dict[str, str] = {}
    for name, way in ways.items():
        box = tree.box(way)
        node = box.before if side == BEFORE else box.after
        if node is not None:
            nodes[name] = node
            texts[name] = f"{name_of(box)}  {_words(node)}".rstrip()
    reads: dict[str, list[str]] = {}
    readers: dict[str, list[str]] = {}
    for name, node in nodes.items():
        for source in dict.fromkeys(node.inputs):
            if source in texts:
                reads.setdefault(name, []).append(texts[source])
                readers.setdefault(source, []).append(texts[name])
    return reads, readers


def _words(node: Node | None) -> str:
    return "" if node is None else f"{node.text}  {shape_text(node.shape)}".rstrip()


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else f"{text[: max(width - 1, 0)]}…"
