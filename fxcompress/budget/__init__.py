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
"""

from fxcompress.budget._sites import least_cost
from fxcompress.budget.problem import Allocation, Candidate, Choice, Option, permitted_ranks
from fxcompress.budget.solver import allocate
from fxcompress.budget.uniform import allocate_uniform

__all__ = [
    "Allocation",
    "Candidate",
    "Choice",
    "Option",
    "allocate",
    "allocate_uniform",
    "least_cost",
    "permitted_ranks",
]
