"""Sites: matched weights, with what the recording knows of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fxcompress.budget import Bundle as BudgetBundle
from fxcompress.budget import Candidate, Option, permitted_ranks
from fxcompress.forms import (
    Form,
    JointBody,
    JointForm,
    LinearShape,
    Template,
    find_form,
    find_joint_form,
)
from fxcompress.forms.form import Losses, Ranks
from fxcompress.graph.canonical import is_hf_conv1d
from fxcompress.graph.recorder import Recording
from fxcompress.plan import ZERO, Size
from fxcompress.rules import Match, MatchResult
from fxcompress.rules.result import Bundle

Unit = Literal["parameters", "macs", "bytes"]


@dataclass(frozen=True)
class Site:
    """One weight parameter with all its uses, and the rule that claimed it.

    Attributes:
        name: path of the module that owns the weight.
        shape: of the linear operator.
        rows: positions it is applied to in the recorded example.
        source: key of the value it is applied to; equal for sites with the same input.
        forms: forms to choose from, by name.
        match: rule id, location and bounds on the rank.
    """

    name: str
    weight: str
    op: str
    shape: LinearShape
    rows: int
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
        m, n = self.shape.out_features, self.shape.in_features
        parameters = m * n + (m if self.shape.bias else 0)
        return Size(
            parameters=parameters,
            macs=self.rows * m * n,
            bytes=parameters * self.shape.dtype.itemsize,
        )

    def size(self, form: str, rank: int) -> Size:
        """The same at a rank of a form that the site may take by itself."""
        ranks = np.array([rank], dtype=np.int64)
        counts = _counts(self.forms[form], self.shape, ranks, self.rows, _biases([self.shape]))
        return Size(**{unit: int(count[0]) for unit, count in counts.items()})

    def ranks(self, form: str) -> Ranks:
        """The ranks of a form that the rule permits; none if it does not fit the shape."""
        chosen = self.forms[form]
        if chosen.misfit(self.shape) is not None:
            return np.empty(0, dtype=np.int64)
        return _permitted(chosen.full_rank(self.shape), self.match)

    def candidate(
        self, losses: Mapping[str, Losses], unit: Unit, excluded: Collection[str]
    ) -> Candidate:
        """The site as the budget sees it, without the forms in ``excluded``.

        Args:
            losses: form -> predicted loss at each of its :meth:`ranks`.
            unit: of the budget.
            excluded: forms that are not to be chosen.
        """
        dense = float(getattr(self.dense_size(), unit))
        options = []
        for name, form in self.forms.items():
            if name not in excluded:
                ranks = self.ranks(name)
                cost = _counts(form, self.shape, ranks, self.rows, _biases([self.shape]))[unit]
                options += _worthwhile(name, ranks, losses[name], cost, dense, self.match)
        return Candidate(self.name, dense, tuple(options), self.match.group)


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
        """Of the sites."""
        return tuple(site.shape for site in self.sites)

    def ranks(self, form: str) -> Ranks:
        """The ranks of a form that the rule permits; none if it does not fit the shapes."""
        chosen = self.forms[form]
        if chosen.misfit(self.shapes) is not None:
            return np.empty(0, dtype=np.int64)
        return _permitted(chosen.full_rank(self.shapes), self.match)

    def options(
        self, losses: Mapping[str, Losses], unit: Unit, excluded: Collection[str]
    ) -> BudgetBundle:
        """The bundle as the budget sees it; arguments as of :meth:`Site.candidate`."""
        dense = sum(float(getattr(site.dense_size(), unit)) for site in self.sites)
        options = []
        for name, form in self.forms.items():
            if name not in excluded:
                ranks = self.ranks(name)
                biases = _biases(self.shapes)
                cost = _counts(form, self.shapes, ranks, self.sites[0].rows, biases)[unit]
                options += _worthwhile(name, ranks, losses[name], cost, dense, self.match)
        names = tuple(site.name for site in self.sites)
        return BudgetBundle(self.name, names, tuple(options))

    def sizes(self, form: str, rank: int, body: JointBody) -> tuple[Size, ...]:
        """Size of every site at a rank of a joint form; what is shared counts for the first.

        Args:
            form: its name.
            rank: of ``body``.
            body: of the form, with or without values.
        """
        ranks = np.array([rank], dtype=np.int64)
        rows = self.sites[0].rows
        counts = _counts(self.forms[form], self.shapes, ranks, rows, _biases(self.shapes))
        rest = [
            _head_size(head, rows, site.shape)
            for head, site in zip(body.heads[1:], self.sites[1:], strict=True)
        ]
        whole = Size(**{unit: int(count[0]) for unit, count in counts.items()})
        return (whole - sum(rest, ZERO), *rest)


def _head_size(head: nn.Module, rows: int, shape: LinearShape) -> Size:
    parameters = sum(parameter.numel() for parameter in head.parameters())
    biases = shape.out_features if shape.bias else 0
    tensors = (*head.parameters(), *head.buffers())
    return Size(
        parameters=parameters,
        macs=(parameters - biases) * rows,
        bytes=sum(tensor.numel() * tensor.element_size() for tensor in tensors),
    )


def on_meta(shape: LinearShape) -> LinearShape:
    """The same without memory: for bodies that are only looked at."""
    return replace(shape, device=torch.device("meta"))


def _biases(shapes: Sequence[LinearShape]) -> int:
    return sum(shape.out_features for shape in shapes if shape.bias)


def _counts(form: Any, shape: Any, ranks: Ranks, rows: int, biases: int) -> dict[Unit, Ranks]:
    """Cost at each rank in every unit, biases included; of a form or of a joint one."""
    like = shape if isinstance(shape, LinearShape) else shape[0]
    return {
        "parameters": form.parameters(shape, ranks) + biases,
        "macs": form.macs(shape, ranks) * rows,
        "bytes": form.bytes(shape, ranks) + biases * like.dtype.itemsize,
    }


def _permitted(full_rank: int, match: Match | Bundle) -> Ranks:
    return permitted_ranks(
        full_rank, minimum=match.min_rank, maximum=match.max_rank, multiple_of=match.multiple_of
    )


def _worthwhile(
    name: str, ranks: Ranks, loss: Losses, cost: Ranks, dense: float, match: Match | Bundle
) -> list[Option]:
    """The option of a form at the ranks that save enough, if there are any.

    Ranks at which a form loses more than at a lower one are left out, too: truncation never
    does, but other projections may in a metric that they are not made for.
    """
    worth = cost <= (1 - match.min_saving) * dense
    worth &= loss <= np.minimum.accumulate(loss)
    if not worth.any():
        return []
    return [Option(name, ranks[worth], loss[worth], cost[worth].astype(np.float64))]


def gather_sites(
    recording: Recording,
    matched: MatchResult,
    templates: Mapping[str, Template] = MappingProxyType({}),
) -> tuple[tuple[Site, ...], tuple[SiteBundle, ...]]:
    """The matched weights of a recording and their bundles, in graph order.

    Args:
        recording: of the working copy.
        matched: what the rules match in it.
        templates: of the rules, by the names of the forms that they stand for.
    """
    operators = {operator.name: operator for operator in recording.operators}
    sites = []
    for match in matched.matches:
        operator = operators[match.operators[0]]
        facts = recording.weights[match.weight]
        attributes = operator.attributes
        shape = LinearShape(
            in_features=int(attributes["in_features"]),  # type: ignore[arg-type]
            out_features=int(attributes["out_features"]),  # type: ignore[arg-type]
            bias=bool(attributes["bias"]),
            dtype=getattr(torch, facts.dtype),
            device=torch.device(facts.device),
        )
        sites.append(
            Site(
                name=operator.path,
                weight=match.weight,
                op=operator.op,
                shape=shape,
                rows=facts.rows,
                calls=len(facts.calls),
                source=facts.source,
                forms={name: find_form(name, templates) for name in match.forms},
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


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear module as (m x n), whichever way it is stored."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.T if is_hf_conv1d(module) else weight
