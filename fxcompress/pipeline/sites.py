"""Sites: matched weights, with what the recording knows of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor, nn

from fxcompress.budget import permitted_ranks
from fxcompress.forms import (
    ConvShape,
    Form,
    JointBody,
    JointForm,
    LinearShape,
    Rank,
    Shape,
    Template,
    find_form,
    find_joint_form,
)
from fxcompress.forms.target import Ranks, Target
from fxcompress.graph.recorder import Recording, Weight
from fxcompress.operators.modules import shape_of
from fxcompress.plans.plan import ZERO, Size
from fxcompress.rules import Bundle, Match, MatchResult

CountUnit = Literal["parameters", "macs", "bytes"]


@dataclass(frozen=True)
class Site:
    """One weight parameter with all its uses, and the rule that claimed it.

    Attributes:
        name: path of the module that owns the weight.
        shape: of the operator, with the sizes of what it is applied to in the recorded example.
        source: key of the value it is applied to; equal for sites with the same input.
        forms: forms to choose from, by name.
        match: rule id, location and bounds on the rank.
    """

    name: str
    weight: str
    op: str
    shape: Shape
    calls: int
    source: str
    forms: Mapping[str, Form]
    match: Match

    @property
    def in_features(self) -> int:
        return self.shape.in_features

    @property
    def out_features(self) -> int:
        return self.shape.out_features

    def dense_size(self) -> Size:
        """Parameters, MACs and bytes of the operator as it is."""
        parameters = self.shape.weights + _biases([self.shape])
        return Size(
            parameters=parameters,
            macs=self.shape.macs,
            bytes=parameters * self.shape.dtype.itemsize,
        )

    def size(self, form: str, rank: Rank) -> Size:
        """The same at a rank of a form that the site may take by itself."""
        counts = self.counts(form, np.array([rank], dtype=np.int64))
        return Size(**{unit: int(count[0]) for unit, count in counts.items()})

    def approximated(self, form: str, target: Target, rank: Any) -> Tensor:
        """The dense weight (canonical layout, float64) that a form stands for at a rank."""
        chosen = self.forms[form]
        factors = [factor.to(torch.float64) for factor in chosen.factors(target, rank)]
        return chosen.product(self.shape, factors)

    def ranks(self, form: str) -> Ranks:
        """The ranks of a form that the rule permits; none if it does not fit the shape."""
        chosen = self.forms[form]
        full = chosen.full_rank(self.shape)
        fits = chosen.misfit(self.shape) is None
        return _permitted(full, self.match) if fits else _permitted(full, self.match)[:0]

    def counts(self, form: str, ranks: Ranks) -> dict[CountUnit, Ranks]:
        """Cost at ranks of a form in every unit that is counted, biases included."""
        chosen, biases = self.forms[form], _biases([self.shape])
        return {
            "parameters": chosen.parameters(self.shape, ranks) + biases,
            "macs": chosen.macs(self.shape, ranks),
            "bytes": chosen.bytes(self.shape, ranks) + biases * self.shape.dtype.itemsize,
        }


@dataclass(frozen=True)
class SiteBundle:
    """Sites on one input that joint forms may rewrite together.

    Attributes:
        name: of the bundle.
        sites: in the order of the rule's pattern.
        forms: the joint forms to choose from, by name.
        match: rule id, location, bounds on the rank.
    """

    name: str
    sites: tuple[Site, ...]
    forms: Mapping[str, JointForm]
    match: Bundle

    @property
    def shapes(self) -> tuple[LinearShape, ...]:
        """Of the sites, which are linear operators."""
        return tuple(cast("LinearShape", site.shape) for site in self.sites)

    def ranks(self, form: str) -> Ranks:
        """The ranks of a form that the rule permits; none if it does not fit the shapes."""
        chosen = self.forms[form]
        if chosen.misfit(self.shapes) is not None:
            return np.empty(0, dtype=np.int64)
        return _permitted(chosen.full_rank(self.shapes), self.match)

    def counts(self, form: str, ranks: Ranks) -> dict[CountUnit, Ranks]:
        """Cost of all sites together at ranks of a joint form, as :meth:`Site.counts`."""
        chosen, biases = self.forms[form], _biases(self.shapes)
        return {
            "parameters": chosen.parameters(self.shapes, ranks) + biases,
            "macs": chosen.macs(self.shapes, ranks),
            "bytes": chosen.bytes(self.shapes, ranks) + biases * self.shapes[0].dtype.itemsize,
        }

    def sizes(self, form: str, rank: int, body: JointBody) -> tuple[Size, ...]:
        """Size of every site at a rank of a joint form; what is shared counts for the first.

        Args:
            form: its name.
            rank: of ``body``.
            body: of the form, with or without values.
        """
        counts = self.counts(form, np.array([rank], dtype=np.int64))
        rest = [
            _head_size(head, shape)
            for head, shape in zip(body.heads[1:], self.shapes[1:], strict=True)
        ]
        whole = Size(**{unit: int(count[0]) for unit, count in counts.items()})
        return (whole - sum(rest, ZERO), *rest)


def _head_size(head: nn.Module, shape: LinearShape) -> Size:
    parameters = sum(parameter.numel() for parameter in head.parameters())
    biases = shape.out_features if shape.bias else 0
    tensors = (*head.parameters(), *head.buffers())
    return Size(
        parameters=parameters,
        macs=(parameters - biases) * shape.rows,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def on_meta(shape: Any) -> Any:
    """The same without memory: for bodies that are only looked at."""
    return replace(shape, device=torch.device("meta"))


def _biases(shapes: Sequence[Shape]) -> int:
    return sum(shape.out_features for shape in shapes if shape.bias)


PAIRS = 16
"""Values of each of two ranks that are offered: with all of them there would be millions."""


def _permitted(full_rank: Rank, match: Match | Bundle) -> Ranks:
    """Ranks within the bounds of a rule (k), or pairs of them (k x 2)."""

    def within(full: int) -> Ranks:
        return permitted_ranks(
            full,
            minimum=match.limits.min_rank,
            maximum=match.limits.max_rank,
            multiple_of=match.limits.multiple_of,
        )

    if isinstance(full_rank, int):
        return within(full_rank)
    first, second = (_thinned(within(full)) for full in full_rank)
    pairs = np.meshgrid(first, second, indexing="ij")
    return np.stack(pairs, axis=-1).reshape(-1, 2)


def _thinned(ranks: Ranks) -> Ranks:
    """At most :data:`PAIRS` of them, evenly spaced, the last one among them."""
    if len(ranks) <= PAIRS:
        return ranks
    return ranks[np.linspace(0, len(ranks) - 1, PAIRS).round().astype(np.int64)]


_SHIFT = 20


def encoded(ranks: Ranks) -> Ranks:
    """One number for each rank or pair of ranks, as the solver has them; it keeps their order."""
    return ranks if ranks.ndim == 1 else (ranks[:, 0] << _SHIFT) + ranks[:, 1]


def decoded(full_rank: Rank, code: int) -> Rank:
    """The rank, or the pair, that a number stands for."""
    return code if isinstance(full_rank, int) else (code >> _SHIFT, code & ((1 << _SHIFT) - 1))


def gather_sites(
    model: nn.Module,
    recording: Recording,
    matched: MatchResult,
    templates: Mapping[str, Template] = MappingProxyType({}),
) -> tuple[tuple[Site, ...], tuple[SiteBundle, ...]]:
    """The matched weights of a recording and their bundles, in graph order.

    Args:
        model: the working copy.
        recording: of ``model``.
        matched: what the rules match in it.
        templates: of the rules, by the names of the forms that they stand for.
    """
    operators = {operator.name: operator for operator in recording.operators}
    sites = []
    for match in matched.matches:
        operator = operators[match.operators[0]]
        facts = recording.weights[match.weight]
        sites.append(
            Site(
                name=operator.path,
                weight=match.weight,
                op=operator.op,
                shape=_measured(shape_of(model.get_submodule(operator.path)), facts),
                calls=len(facts.calls),
                source=facts.source,
                forms={name: find_form(name, operator.op, templates) for name in match.forms},
                match=match,
            )
        )
    by_weight = {site.weight: site for site in sites}
    bundles = tuple(
        SiteBundle(
            name=bundle.name,
            sites=tuple(by_weight[weight] for weight in bundle.members),
            forms={name: find_joint_form(name, templates) for name in bundle.forms},
            match=bundle,
        )
        for bundle in matched.bundles
    )
    return tuple(sites), bundles


def _measured(shape: Shape, facts: Weight) -> Shape:
    """A shape with the sizes of what the operator is applied to in the recorded example."""
    if isinstance(shape, ConvShape):
        return replace(shape, inputs=facts.inputs)
    return replace(shape, rows=facts.rows)
