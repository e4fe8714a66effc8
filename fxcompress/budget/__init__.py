"""Ranks from one global budget: numpy and scipy only, no model needed.

>>> import numpy as np
>>> from fxcompress.budget import Candidate, Option, allocate, permitted_ranks
>>> ranks = permitted_ranks(4)
>>> spectrum = np.array([8.0, 4.0, 2.0, 1.0])
>>> tails = 0.5 * (np.sum(spectrum**2) - np.cumsum(spectrum**2))
>>> option = Option("low_rank", ranks, loss=tails, cost=ranks * (4.0 + 12.0))
>>> found = allocate([Candidate("up", 48.0, (option,)), Candidate("down", 48.0, (option,))], 64)
>>> found.choices["up"]
Choice(form='low_rank', rank=2, loss=2.5, cost=32.0)

Both sites by themselves, or together in a joint form at a lesser cost:

>>> from fxcompress.budget import Alternatives, Mode
>>> single = (Candidate("up", 48.0, (option,)), Candidate("down", 48.0, (option,)))
>>> joint = Option("joint", ranks, loss=2.0 * tails, cost=ranks * (4.0 + 2.0 * 12.0))
>>> modes = (Mode("single", single), Mode("joint", (Candidate("both", None, (joint,)),)))
>>> found = allocate([Alternatives("both", modes)], 64)
>>> found.modes
{'both': 'joint'}
>>> found.choices
{'both': Choice(form='joint', rank=2, loss=5.0, cost=56.0)}
"""

from fxcompress.budget._knapsack import least_cost
from fxcompress.budget.frontier import Frontier, Taken, frontier
from fxcompress.budget.problem import (
    Allocation,
    Alternatives,
    Candidate,
    Choice,
    Entity,
    Mode,
    Option,
    Resource,
    permitted_ranks,
)
from fxcompress.budget.solver import allocate
from fxcompress.budget.uniform import allocate_uniform
from fxcompress.budget.within import Together, allocate_within

__all__ = [
    "Allocation",
    "Alternatives",
    "Candidate",
    "Choice",
    "Entity",
    "Frontier",
    "Mode",
    "Option",
    "Resource",
    "Taken",
    "Together",
    "allocate",
    "allocate_uniform",
    "allocate_within",
    "frontier",
    "least_cost",
    "permitted_ranks",
]
