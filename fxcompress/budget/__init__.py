"""Ranks from one global budget (design section 5): numpy only, no model needed.

>>> import numpy as np
>>> from fxcompress.budget import Candidate, Option, allocate, permitted_ranks
>>> ranks = permitted_ranks(4)
>>> spectrum = np.array([8.0, 4.0, 2.0, 1.0])
>>> tails = 0.5 * (np.sum(spectrum**2) - np.cumsum(spectrum**2))
>>> option = Option("low_rank", ranks, loss=tails, cost=ranks * (4.0 + 12.0))
>>> found = allocate([Candidate("up", 48.0, (option,)), Candidate("down", 48.0, (option,))], 64)
>>> found.choices["up"]
Choice(form='low_rank', rank=2, loss=2.5, cost=32.0)

Both sites as a :class:`Bundle`, which a joint form may rewrite together, at a lesser cost:

>>> from fxcompress.budget import Bundle
>>> joint = Option("joint", ranks, loss=2.0 * tails, cost=ranks * (4.0 + 2.0 * 12.0))
>>> found = allocate(
...     [Candidate("up", 48.0, (option,)), Candidate("down", 48.0, (option,))],
...     64,
...     [Bundle("both", ("up", "down"), (joint,))],
... )
>>> found.joint["both"]
Choice(form='joint', rank=2, loss=5.0, cost=56.0)
>>> found.choices["up"]
Choice(form='joint', rank=2, loss=0.0, cost=0.0)
"""

from fxcompress.budget._bundles import least_cost
from fxcompress.budget._entities import Resource
from fxcompress.budget.problem import (
    Allocation,
    Bundle,
    Candidate,
    Choice,
    Option,
    permitted_ranks,
)
from fxcompress.budget.solver import allocate
from fxcompress.budget.uniform import allocate_uniform
from fxcompress.budget.within import Together, allocate_within

__all__ = [
    "Allocation",
    "Bundle",
    "Candidate",
    "Choice",
    "Option",
    "Resource",
    "Together",
    "allocate",
    "allocate_uniform",
    "allocate_within",
    "least_cost",
    "permitted_ranks",
]
