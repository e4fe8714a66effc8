"""Many module paths as few: ``model.layers.{0..29}.mlp.{up_proj,down_proj}``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_Slot = frozenset[str]


def fold_paths(paths: Iterable[str]) -> tuple[tuple[str, int], ...]:
    """Fold paths that differ in a number, then in a word, of one place; with their counts.

    >>> fold_paths(["h.0.fc", "h.1.fc", "h.2.fc", "h.3.fc", "lm_head"])
    (('h.{0..3}.fc', 4), ('lm_head', 1))
    """
    order: dict[str, int] = {}
    by_length: dict[int, dict[tuple[_Slot, ...], int]] = {}
    for path in paths:
        parts = path.split(".")
        for part in parts:
            order.setdefault(part, len(order))
        groups = by_length.setdefault(len(parts), {})
        key = tuple(frozenset((part,)) for part in parts)
        groups[key] = groups.get(key, 0) + 1
    folded: list[tuple[str, int]] = []
    for length, groups in by_length.items():
        for numbers in (True, False):
            for place in range(length):
                groups = _merge(groups, place, numbers=numbers)
        folded += [
            (".".join(_slot(slot, order) for slot in key), count) for key, count in groups.items()
        ]
    return tuple(folded)


_NUMBER = re.compile(r"(?<![\w-])\d+(?![\w-])")


def fold_key(text: str) -> str:
    """Equal for texts that differ in numbers only."""
    return _NUMBER.sub("#", text)


def fold_numbers(texts: Sequence[str]) -> str:
    """Texts of one :func:`fold_key` as one.

    >>> fold_numbers(["h.0.q reads h.0.x of 2", "h.1.q reads h.1.x of 2", "h.2.q reads h.2.x of 2"])
    'h.{0..2}.q reads h.{0..2}.x of 2'
    """
    columns = zip(*(_NUMBER.findall(text) for text in texts), strict=True)
    slots = iter([_slot(frozenset(column), {}) for column in columns])
    return _NUMBER.sub(lambda found: next(slots), texts[0])


def _merge(
    groups: dict[tuple[_Slot, ...], int], place: int, *, numbers: bool
) -> dict[tuple[_Slot, ...], int]:
    """Join the groups that are alike but for one place."""
    buckets: dict[tuple[object, ...], list[tuple[_Slot, ...]]] = {}
    for key in groups:
        is_number = all(_is_number(part) for part in key[place])
        # A group that is not to be folded here gets a bucket of its own.
        rest = (key[:place], key[place + 1 :]) if is_number == numbers else (key,)
        buckets.setdefault(rest, []).append(key)
    merged: dict[tuple[_Slot, ...], int] = {}
    for keys in buckets.values():
        union = frozenset().union(*(key[place] for key in keys))
        first = keys[0]
        # A path given twice counts in one place only, which a product cannot say.
        uneven = len({groups[key] / _size(key) for key in keys}) > 1
        if len(keys) == 1 or uneven:
            merged |= {key: groups[key] for key in keys}
        else:
            merged[(*first[:place], union, *first[place + 1 :])] = sum(groups[k] for k in keys)
    return merged


def _size(key: Sequence[_Slot]) -> int:
    size = 1
    for slot in key:
        size *= len(slot)
    return size


def _slot(slot: _Slot, order: dict[str, int]) -> str:
    if len(slot) == 1:
        return next(iter(slot))
    if all(_is_number(part) for part in slot):
        return "{" + _ranges(sorted(int(part) for part in slot)) + "}"
    return "{" + ",".join(sorted(slot, key=lambda part: order[part])) + "}"


def _is_number(part: str) -> bool:
    """Whether a range stands for it: ``01`` is not ``1``."""
    return part.isdecimal() and part == str(int(part))


def _ranges(numbers: Sequence[int]) -> str:
    """``0..3,7``: runs of three and more become ranges."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ",".join(
        f"{run[0]}..{run[-1]}" if len(run) > 2 else ",".join(map(str, run)) for run in runs
    )
