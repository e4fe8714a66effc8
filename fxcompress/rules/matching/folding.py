"""Many module paths as few: ``model.layers.{0..29}.mlp.{up_proj,down_proj}``."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Sequence

# A padded number ("01") is a name, not an index: folding must be reversible.
_INDEX = re.compile(r"(?<![0-9])(?:0|[1-9][0-9]{0,8})(?![0-9])")

Literals = tuple[str, ...]
Indices = tuple[int, ...]
Box = tuple[frozenset[int], ...]


def fold_paths(paths: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Fold paths to as few patterns as their index sets need, with their counts.

    Patterns of the same index sets that differ in one word are one.  They come in order of
    appearance; a path that is given twice counts twice.

    >>> fold_paths(["h.0.q", "h.0.k", "h.1.q", "h.1.k", "h.3.q", "h.3.k", "head"])
    (('h.{0..1,3}.{q,k}', 6), ('head', 1))
    >>> fold_paths(["layers.0.blocks.0", "layers.0.blocks.1", "layers.1.blocks.0"])
    (('layers.0.blocks.{0..1}', 2), ('layers.1.blocks.0', 1))
    """
    found: dict[tuple[Literals, int], set[Indices]] = {}
    for path, times in Counter(paths).items():
        literals, indices = split_indices(path)
        found.setdefault((literals, times), set()).add(indices)
    groups: dict[tuple[tuple[str, ...], ...], int] = {}
    for (literals, times), points in found.items():
        for box in _boxes(points):
            key = tuple((part,) for part in _parts(_pattern(literals, box)))
            size = times * math.prod(map(len, box))
            groups[key] = groups.get(key, 0) + size
    for place in range(max(map(len, groups), default=0)):
        groups = _merge(groups, place)
    return tuple((".".join(map(_word, key)), count) for key, count in groups.items())


def fold(paths: Iterable[str]) -> tuple[str, ...]:
    """The patterns of :func:`fold_paths` alone."""
    return tuple(pattern for pattern, _ in fold_paths(paths))


def split_indices(path: str) -> tuple[Literals, Indices]:
    """Take the indices out of a path.

    >>> split_indices("layers.1.blocks.12.mlp")
    (('layers.', '.blocks.', '.mlp'), (1, 12))
    """
    literals = tuple(_INDEX.split(path))
    return literals, tuple(int(match.group()) for match in _INDEX.finditer(path))


def index_set(indices: Iterable[int]) -> str:
    """Write a set of indices with its runs shortened.

    >>> index_set([0, 1, 2, 3, 5, 7, 8]), index_set([4])
    ('{0..3,5,7..8}', '4')
    """
    ordered = sorted(set(indices))
    runs: list[tuple[int, int]] = []
    for index in ordered:
        if runs and index == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    text = ",".join(str(first) if first == last else f"{first}..{last}" for first, last in runs)
    return text if len(ordered) == 1 else f"{{{text}}}"


# A number that stands alone, not as part of a path, a name or a version.
_AMOUNT = r"(?<![\w.])[0-9]+(?:,[0-9]{3})*(?:\.[0-9]+)?(?:e[+-]?[0-9]+)?(?!\w|\.\w)"
_AMOUNTS = re.compile(_AMOUNT)
_NUMBERS = re.compile(rf"{_AMOUNT}|(?<![\w-])[0-9]+(?![\w-])")


def words_of(text: str, *, paths: bool = False) -> tuple[str, ...]:
    """A text without its numbers: equal for texts that differ in these only.

    Args:
        text: a reason.
        paths: whether numbers in paths count, too, besides those that stand alone.
    """
    return tuple((_NUMBERS if paths else _AMOUNTS).split(text))


def fold_numbers(texts: Sequence[str]) -> str:
    """Texts that differ in numbers only as one: amounts are ranges, indices in paths are sets.

    >>> fold_numbers(["h.0.q reads h.0.x of 2", "h.1.q reads h.1.x of 2", "h.2.q reads h.2.x of 2"])
    'h.{0..2}.q reads h.{0..2}.x of 2'
    >>> fold_numbers(["no saving: rank 448 ≥ 418", "no saving: rank 512 ≥ 418"])
    'no saving: rank 448..512 ≥ 418'
    """
    columns = [dict.fromkeys(column) for column in zip(*map(_NUMBERS.findall, texts), strict=True)]
    slots = iter(columns)

    def folded(found: re.Match[str]) -> str:
        column = [*next(slots)]
        if _AMOUNTS.match(found.string, found.start()):
            low, *_, high = sorted(column * 2, key=lambda number: float(number.replace(",", "")))
            return low if len(column) == 1 else f"{low}..{high}"
        return index_set(map(int, column)) if all(map(_INDEX.fullmatch, column)) else _word(column)

    return _NUMBERS.sub(folded, texts[0])


def _parts(pattern: str) -> list[str]:
    """What stands between dots, those of ranges left alone."""
    return re.split(r"(?<!\.)\.(?!\.)", pattern)


def _merge(
    groups: dict[tuple[tuple[str, ...], ...], int], place: int
) -> dict[tuple[tuple[str, ...], ...], int]:
    """Join the patterns that are alike but for the word at one place."""
    merged: dict[tuple[object, ...], tuple[list[str], tuple[tuple[str, ...], ...], int]] = {}
    for key, count in groups.items():
        words = key[place] if place < len(key) else ()
        plain = words and not any(_INDEX.search(word) for word in words)
        each = count // max(1, len(words))
        # A pattern that is not to be joined here stays by itself.
        alike = (key[:place], key[place + 1 :], each) if plain else (key,)
        before, first, total = merged.get(alike, ([], key, 0))
        merged[alike] = [*before, *words], first, total + count
    return {
        (*first[:place], tuple(words), *first[place + 1 :]) if place < len(first) else first: total
        for words, first, total in merged.values()
    }


def _word(words: Sequence[str]) -> str:
    return words[0] if len(words) == 1 else "{" + ",".join(words) + "}"


def _boxes(points: set[Indices]) -> list[Box]:
    """Cover a set of index tuples exactly with products of index sets.

    A grid needs one; of the two directions to slice the others in, the better is taken.
    """
    forward = _slices(points)
    mirrored = _slices({point[::-1] for point in points})
    backward = [box[::-1] for box in mirrored]
    best = forward if len(forward) <= len(backward) else backward
    return sorted(best, key=lambda box: [min(indices) for indices in box])


def _slices(points: set[Indices]) -> list[Box]:
    if points == {()}:
        return [()]
    rests: dict[int, set[Indices]] = {}
    for first, *rest in points:
        rests.setdefault(first, set()).add(tuple(rest))
    firsts: dict[frozenset[Indices], list[int]] = {}
    for first, those in rests.items():
        firsts.setdefault(frozenset(those), []).append(first)
    return [
        (frozenset(heads), *box) for those, heads in firsts.items() for box in _slices(set(those))
    ]


def _pattern(literals: Literals, box: Box) -> str:
    middle = (
        index_set(indices) + literal for indices, literal in zip(box, literals[1:], strict=True)
    )
    return literals[0] + "".join(middle)
