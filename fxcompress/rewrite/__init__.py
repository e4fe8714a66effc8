"""Rewriting: bodies in place of operators, in a module tree or in an fx graph."""

from fxcompress.rewrite.apply import apply_plan, mismatches
from fxcompress.rewrite.attention import ProjectedAttention
from fxcompress.rewrite.facade import Factorized
from fxcompress.rewrite.skeleton import own_parameters, prepared, skeleton
from fxcompress.rewrite.substitute import Provenance, linear_shape, substitute
from fxcompress.rewrite.verify import verify

__all__ = [
    "Factorized",
    "ProjectedAttention",
    "Provenance",
    "apply_plan",
    "linear_shape",
    "mismatches",
    "own_parameters",
    "prepared",
    "skeleton",
    "substitute",
    "verify",
]
