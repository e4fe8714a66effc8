"""The budget problem and its answer, as frozen values.

A :class:`Candidate` is a site as the budget sees it: what leaving it dense costs, and what each
permitted (form, rank) would cost and lose.  :class:`Alternatives` are the modes in which some sites
can be treated together, of which one is taken: each has candidates of its own.  The answer is an
:class:`Allocation`: one mode of all alternatives, one :class:`Choice` for each candidate that is
then there.  Losses are in nats (the predicted KL divergence to the dense model); costs are in
whatever unit the budget has (parameters, MACs, bytes, seconds).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

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
    """A site as the budget sees it, or whatever else is given one form and one rank.

    Attributes:
        name: unique in the problem, but that the modes of alternatives may share candidates.
        dense_cost: cost of leaving it as it is, which loses nothing, in the budget's unit; finite,
            >= 0.  None if that is no choice, as for sites that are in one joint form.
        options: the forms it may take, each form once; if empty, it stays dense.
        group: all candidates of one group get the same form and the same rank, or all of
            them stay dense; None for a candidate on its own.

    Raises:
        ValueError: naming the candidate, if it or one of its options is malformed, or if it has
            no choice at all.
    """

    name: str
    dense_cost: float | None
    options: tuple[Option, ...]
    group: str | None = None

    def __post_init__(self) -> None:
        _check_number(f"candidate {self.name!r}", "dense_cost", self.dense_cost or 0.0)
        _check_options(f"candidate {self.name!r}", self.options)
        if self.dense_cost is None and not any(option.ranks.size for option in self.options):
            raise ValueError(f"candidate {self.name!r} has no rank, and it cannot stay dense")


@dataclass(frozen=True, eq=False)
class Mode:
    """One way to treat some sites together, with what is then left to choose.

    Attributes:
        name: unique among its alternatives.
        members: what there is to choose for in this mode; a group of them has no others
            elsewhere.
        loss: what the mode itself loses, whatever its members choose, in nats; finite, >= 0.
        cost: what the mode itself costs, in the budget's unit; finite, >= 0.

    Raises:
        ValueError: naming the mode, if it is malformed.
    """

    name: str
    members: tuple[Candidate, ...]
    loss: float = 0.0
    cost: float = 0.0

    def __post_init__(self) -> None:
        _check_number(f"mode {self.name!r}", "loss", self.loss)
        _check_number(f"mode {self.name!r}", "cost", self.cost)
        seen: set[str] = set()
        for member in self.members:
            if member.name in seen:
                raise ValueError(f"mode {self.name!r}: its member {member.name!r} is in it already")
            seen.add(member.name)


@dataclass(frozen=True, eq=False)
class Alternatives:
    """The modes in which some sites can be treated, of which one is taken.

    Linears on one input: each for itself, or all in one joint form,

        >>> import numpy as np
        >>> def at(loss, cost):
        ...     return (Option("low_rank", np.array([1]), np.array([loss]), np.array([cost])),)
        >>> members = (Candidate("q", 9.0, at(0.3, 6.0)), Candidate("k", 9.0, at(0.2, 6.0)))
        >>> whole = Candidate("qk", None, at(0.4, 9.0))
        >>> qk = Alternatives("qk", (Mode("single", members), Mode("joint", (whole,))))

    or a hidden value at one of several widths, at each of which the operators around it have ranks
    of their own:

        >>> def up(width):
        ...     return Candidate("up", 4.0 * width, at(0.1 * width, 2.0 + width))
        >>> modes = (Mode("8", (up(8),)), Mode("6", (up(6),), loss=0.5, cost=1.0))
        >>> hidden = Alternatives("hidden", modes)

    Attributes:
        name: unique in the problem.
        modes: at least one; a site that is in several has the same name in each, and choices of
            its own.  Of equally good modes the first is taken.

    Raises:
        ValueError: naming the alternatives, if there is no mode or two have one name.
    """

    name: str
    modes: tuple[Mode, ...]

    def __post_init__(self) -> None:
        if not self.modes:
            raise ValueError(f"alternatives {self.name!r} have no mode")
        names = [mode.name for mode in self.modes]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"alternatives {self.name!r}: two modes have the name {name!r}")


Entity: TypeAlias = Candidate | Alternatives
"""What a budget is shared out among."""


@dataclass(frozen=True, eq=False)
class Resource:
    """One of several limited quantities: what there is to choose for, with costs in its unit.

    Attributes:
        name: unique, ``"parameters"``.
        budget: limit on the total cost; finite, not negative.
        entities: equal in all resources but for their costs; a site that a resource is not
            about costs nothing in it, dense or not.
    """

    name: str
    budget: float
    entities: tuple[Entity, ...]


@dataclass(frozen=True)
class Choice:
    """What becomes of one candidate.

    Attributes:
        form: name of the form chosen; None if it stays dense.
        rank: rank chosen; None if it stays dense.
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
        choices: from the name of each candidate to its choice, in the order given; of alternatives
            those of the mode that is taken.
        multiplier: the Lagrange multiplier λ at the optimum of the dual, in nats per unit of
            cost; NaN where no dual problem was solved.
        loss: sum of the losses of the choices and the modes, in nats.
        cost: sum of the costs of both (correctly rounded), never above ``budget``.
        budget: the budget given.
        bound: a lower bound on the loss of *any* allocation within the budget, in nats.
        modes: from the name of all alternatives, in the order given, to the mode that is taken.
    """

    choices: Mapping[str, Choice]
    multiplier: float
    loss: float
    cost: float
    budget: float
    bound: float
    modes: Mapping[str, str] = field(default_factory=dict)

    @property
    def gap(self) -> float:
        """How far the loss can be from the least possible, in nats: ``loss - bound`` >= 0."""
        return self.loss - self.bound


def _check_number(owner: str, name: str, value: float) -> None:
    """Raise ValueError, naming the owner, for a loss or cost that no one can have."""
    if not 0.0 <= value < math.inf:
        raise ValueError(f"{owner}: {name} must be finite and not negative, not {value}")


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
