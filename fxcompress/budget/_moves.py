"""Single moves and pairs of moves within several budgets: repair, fill, exchange."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
from numpy.typing import NDArray

from fxcompress.budget._entities import Entity, Floats, Resource, allocation_from, entities_of, fits
from fxcompress.budget.problem import Allocation

PAIRS = 2_000_000
"""Pairs of moves that are looked at in one sweep at most."""


class Moves:
    """An allocation that is changed move by move; which bundles are joint stays as it is."""

    def __init__(self, resources: Sequence[Resource], found: Allocation) -> None:
        self.resources = resources
        self.found = found
        self.entities = entities_of(resources, set(found.joint))
        self.at = [self._place(entity) for entity in self.entities]

    def _place(self, entity: Entity) -> int:
        choice = (
            self.found.joint[entity.bundle]
            if entity.bundle
            else self.found.choices[entity.members[0]]
        )
        if choice.form is None or choice.rank is None:
            return entity.choices.index(None)
        return entity.choices.index((choice.form, choice.rank))

    def settled(self) -> Allocation | None:
        """Within all budgets, and without a single move or pair of moves that is better."""
        if not self._repair():
            return None
        while True:
            self._fill()
            if not self._exchange():
                return self._allocation()

    def _used(self) -> Floats:
        """The share of each budget that is used, correctly rounded."""
        rows = [entity.cost[at] for entity, at in zip(self.entities, self.at, strict=True)]
        return np.array([math.fsum(column) for column in zip(*rows, strict=True)])

    def _repair(self) -> bool:
        """Remove what exceeds the budgets; False if no move or pair of moves does."""
        for _ in range(50 * len(self.entities) + 50):
            used = self._used()
            over = excess(used)
            if not over:
                return True
            best, where = math.inf, None
            for index, (entity, at) in enumerate(zip(self.entities, self.at, strict=True)):
                removed = over - excess(used + entity.cost - entity.cost[at])
                gain = entity.loss - entity.loss[at]
                worth = np.where(removed > 1e-12, gain / np.maximum(removed, 1e-12), math.inf)
                move = int(worth.argmin())
                if worth[move] < best:
                    best, where = float(worth[move]), (index, move)
            if where is not None:
                self.at[where[0]] = where[1]
            elif not self._repair_by_pairs(used):
                return False
        return False

    def _repair_by_pairs(self, used: Floats) -> bool:
        found = self._pairs()
        if found is None:
            return False
        index, move, change, _ = found
        after = np.zeros((len(index), len(index)))
        for column, now in zip(change.T, used, strict=True):
            after += np.maximum(now + column[:, None] + column[None, :] - 1.0, 0.0)
        after[index[:, None] == index[None, :]] = math.inf
        i, j = divmod(int(after.argmin()), len(index))
        if after[i, j] >= float(excess(used)) - 1e-12:
            return False
        self.at[index[i]], self.at[index[j]] = int(move[i]), int(move[j])
        return True

    def _fill(self) -> None:
        while True:
            room = 1.0 - self._used()
            best, where = 0.0, None
            for index, (entity, at) in enumerate(zip(self.entities, self.at, strict=True)):
                change = entity.cost - entity.cost[at]
                gain = entity.loss[at] - entity.loss
                fits = (change <= room).all(1) & (gain > 0)
                if fits.any():
                    taken = np.maximum(change, 0).sum(1)
                    worth = np.where(fits, gain / np.maximum(taken, 1e-12), 0.0)
                    move = int(worth.argmax())
                    if worth[move] > best:
                        best, where = float(worth[move]), (index, move)
            if where is None or not self._moved([where]):
                return

    def _pairs(self) -> tuple[NDArray[np.int64], NDArray[np.int64], Floats, Floats] | None:
        """All single moves: entity, choice, changes of cost (k x u), and loss that they save.

        None if their pairs are too many to look at.
        """
        sizes = [len(entity.loss) for entity in self.entities]
        if sum(sizes) ** 2 > PAIRS:
            return None
        pairs = list(zip(self.entities, self.at, strict=True))
        return (
            np.repeat(np.arange(len(sizes)), sizes),
            np.concatenate([np.arange(size) for size in sizes]),
            np.concatenate([entity.cost - entity.cost[at] for entity, at in pairs]),
            np.concatenate([entity.loss[at] - entity.loss for entity, at in pairs]),
        )

    def _exchange(self) -> bool:
        """Make the best pair of moves that lowers the loss, if there is one."""
        found = self._pairs()
        if found is None:
            return False
        index, move, change, gain = found
        room = 1.0 - self._used()
        total = gain[:, None] + gain[None, :]
        possible = (index[:, None] != index[None, :]) & (total > 1e-12 * self.found.loss)
        for column, left in zip(change.T, room, strict=True):
            possible &= column[:, None] + column[None, :] <= left
        total = np.where(possible, total, 0.0)
        for flat in np.argsort(-total, axis=None, kind="stable")[:20]:
            i, j = divmod(int(flat), len(index))
            if total[i, j] <= 0:
                return False
            if self._moved([(int(index[i]), int(move[i])), (int(index[j]), int(move[j]))]):
                return True
        return False

    def _moved(self, moves: Sequence[tuple[int, int]]) -> bool:
        """Make moves, unless rounding takes them beyond a budget."""
        before = [(index, self.at[index]) for index, _ in moves]
        for index, move in moves:
            self.at[index] = move
        if fits(self.resources, self._allocation()):
            return True
        for index, move in before:
            self.at[index] = move
        return False

    def _allocation(self) -> Allocation:
        return allocation_from(
            self.resources[0], self.found, zip(self.entities, self.at, strict=True)
        )


def excess(used: Floats) -> Floats:
    """By how much budgets are exceeded, all together, in shares of each (... x u to ...)."""
    return cast("Floats", np.maximum(used - 1.0, 0.0).sum(-1))
