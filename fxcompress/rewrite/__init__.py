"""Rewriting: bodies in place of operators, in a module tree or in an fx graph."""

from fxcompress.rewrite.applied import (
    hold_like,
    hold_planned,
    idle_matrices,
    planned_weight,
    record_operators,
)
from fxcompress.rewrite.apply import Bodies, apply_plan, empty_bodies, mismatches
from fxcompress.rewrite.attention import ProjectedAttention
from fxcompress.rewrite.batch_norm import find_batch_norms, fold_batch_norms
from fxcompress.rewrite.facade import Factorized
from fxcompress.rewrite.joint import JointMember
from fxcompress.rewrite.offloaded import is_offloaded, resident
from fxcompress.rewrite.skeleton import own_parameters, prepared, skeleton
from fxcompress.rewrite.substitute import Provenance
from fxcompress.rewrite.verify import verify

__all__ = [
    "Bodies",
    "Factorized",
    "JointMember",
    "ProjectedAttention",
    "Provenance",
    "apply_plan",
    "empty_bodies",
    "find_batch_norms",
    "fold_batch_norms",
    "hold_like",
    "hold_planned",
    "idle_matrices",
    "is_offloaded",
    "mismatches",
    "own_parameters",
    "planned_weight",
    "prepared",
    "record_operators",
    "resident",
    "skeleton",
    "verify",
]
