"""The budget problem and its answer, as frozen values.

A :class:`Candidate` is a site as the budget sees it: what leaving it dense costs, and what each
permitted (form, rank) would cost and lose.  A :class:`Bundle` is several of them that one joint
form may rewrite together.  The answer is an :class:`Allocation`: one :class:`Choice` per
candidate, and one per bundle that is rewritten jointly.  Losses are in nats (the predicted KL
divergence to the dense model, design section 4); costs are in whatever unit the budget has
(parameters, MACs, bytes, seconds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


def permitted_ranks(
    full_rank: int, *, minimum: int = 1, maximum: int | None = None, multiple_of: int = 1
) -> NDArray[np.int64]:
    """The ranks an option may use: the multiples of ``multiple_of`` within the limits.

    The minimum is rounded up, and the maximum and the full rank are rounded down, to a multiple:

        >>> permitted_ranks(10, minimum=3, multiple_of=4)
        array([4, 8])
        >>> permitted_ranks(10, maximum=3)
        array([1, 2, 3])

    Args:
        full_rank: rank of the dense weight, min(m, n).
        minimum: least rank allowed, at least 1.
        maximum: greatest rank allowed; None for the full rank.
        multiple_of: every rank is a multiple of this.

    Returns:
        The ranks in increasing order, shape ``(k,)``.  Empty only if no multiple lies within
        the limits; an option without ranks is never chosen, so its site can only stay dense.

    Raises:
        ValueError: if an argument is below 1.
    """
    limits = {"full_rank": full_rank, "minimum": minimum, "multiple_of": multiple_of}
    if maximum is not None:
        limits["maximum"] = maximum
    for name, value in limits.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, not {value}")
    first = -(-minimum // multiple_of) * multiple_of
    last = full_rank if maximum is None else min(maximum, full_rank)
    return np.arange(first, last + 1, multiple_of, dtype=np.int64)


@dataclass(frozen=True, eq=False)
class Option:
    """One form of one site, at each of its permitted ranks.

    The arrays are read, never written or copied, so sites of one shape may share theirs.

    Attributes:
        form: name of the factorization form (``"low_rank"``, ``"pivoted"``, ...).
        ranks: shape ``(k,)``, int64, at least 1, strictly increasing; may be empty.
        loss: shape ``(k,)``, float64: predicted loss at each rank, in nats; finite, >= 0.  It need
            not fall with the rank: forms with two ranks encode both in one number.
        cost: shape ``(k,)``, float64: cost at each rank, in the budget's unit; finite, >= 0,
            of any shape in the rank (linear, concave, with steps).
    """

    form: str
    ranks: NDArray[np.int64]
    loss: NDArray[np.float64]
    cost: NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Candidate:
    """A site as the budget sees it.

    Leaving the site dense (loss 0, cost ``dense_cost``) is always one of its choices.

    Attributes:
        name: name of the site, unique in the problem.
        dense_cost: cost of leaving the site as it is, in the budget's unit; finite, >= 0.
        options: the forms the site may take, each form once; if empty, the site stays dense.
        group: all candidates of one group get the same form and the same rank, or all of
            them stay dense; None for a site on its own.

    Raises:
        ValueError: naming the candidate, if it or one of its options is malformed.
    """

    name: str
    dense_cost: float
    options: tuple[Option, ...]
    group: str | None = None

    def __post_init__(self) -> None:
        if not 0.0 <= self.dense_cost < math.inf:
            raise ValueError(
                f"candidate {self.name!r}: dense_cost must be finite and not negative, "
                f"not {self.dense_cost}"
            )
        _check_options(f"candidate {self.name!r}", self.options)


@dataclass(frozen=True, eq=False)
class Bundle:
    """Candidates that one joint form may rewrite together, such as linears on one input.

    Either every member makes a choice of its own, as if there were no bundle, or the whole
    bundle takes one of the joint choices.

    Attributes:
        name: name of the bundle, unique among the bundles of the problem.
        members: names of its candidates, at least one; each is in one bundle and in no group.
        options: the joint forms, each form once; loss and cost are those of the whole bundle.
            If empty, the members choose for themselves.

    Raises:
        ValueError: naming the bundle, if it or one of its options is malformed.
    """

    name: str
    members: tuple[str, ...]
    options: tuple[Option, ...]

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError(f"bundle {self.name!r} has no members")
        _check_options(f"bundle {self.name!r}", self.options)


@dataclass(frozen=True)
class Choice:
    """What becomes of one site, or of one bundle.

    Attributes:
        form: name of the form chosen; None if the site stays dense.
        rank: rank chosen; None if the site stays dense.
        loss: predicted loss of the choice, in nats.
        cost: cost of the choice, in the budget's unit.
    """

    form: str | None
    rank: int | None
    loss: float
    cost: float


@dataclass(frozen=True)
class Allocation:
    """One choice per candidate, within the budget.

    Attributes:
        choices: from the name of each candidate, in the order given, to its choice.  A member of
            a bundle in ``joint`` has the joint form and rank, with loss and cost 0: those of the
            bundle are counted once, in ``joint``.
        multiplier: the Lagrange multiplier λ at the optimum of the dual, in nats per unit of
            cost; NaN where no dual problem was solved.
        loss: sum of the losses of the choices and the joint choices, in nats.
        cost: sum of the costs of both (correctly rounded), never above ``budget``.
        budget: the budget given.
        bound: a lower bound on the loss of *any* allocation within the budget, in nats.
        joint: from the name of each bundle that is rewritten jointly, in the order given, to the
            choice of the whole bundle.
    """

    choices: Mapping[str, Choice]
    multiplier: float
    loss: float
    cost: float
    budget: float
    bound: float
    joint: Mapping[str, Choice] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """How far the loss can be from the least possible, in nats: ``loss - bound`` >= 0."""
        return self.loss - self.bound


def _check_options(owner: str, options: Sequence[Option]) -> None:
    """Raise ValueError, naming the owner and the option, for one malformed or given twice."""
    seen: set[str] = set()
    for option in options:
        problem = _problem(option)
        if option.form in seen:
            problem = "the form appears twice"
        if problem is not None:
            raise ValueError(f"{owner}, option {option.form!r}: {problem}")
        seen.add(option.form)


def _problem(option: Option) -> str | None:
    """What is wrong with an option, None if nothing is."""
    arrays = {"ranks": option.ranks, "loss": option.loss, "cost": option.cost}
    for name, array in arrays.items():
        if array.ndim != 1:
            return f"{name} must have one dimension, not shape {array.shape}"
    if not option.ranks.size == option.loss.size == option.cost.size:
        sizes = ", ".join(f"{name} {array.size}" for name, array in arrays.items())
        return f"the arrays must have one entry per rank, their lengths differ: {sizes}"
    if option.ranks.dtype != np.int64:
        return f"ranks must be int64, not {option.ranks.dtype}"
    for name in ("loss", "cost"):
        array = arrays[name]
        if array.dtype != np.float64:
            return f"{name} must be float64, not {array.dtype}"
        # min and max carry a NaN through, and need no temporary array.
        if array.size and not (array.min() >= 0.0 and array.max() < math.inf):
            return f"{name} must be finite and not negative"
    if option.ranks.size and option.ranks[0] < 1:
        return f"ranks must be at least 1, not {option.ranks[0]}"
    if np.any(option.ranks[1:] <= option.ranks[:-1]):
        return "ranks must be strictly increasing"
    return None
