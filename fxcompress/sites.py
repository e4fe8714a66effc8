"""Sites: matched weights, with what the recording knows of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from fxcompress.budget import Candidate, Option, permitted_ranks
from fxcompress.forms import FORMS, LinearShape
from fxcompress.graph.canonical import is_hf_conv1d
from fxcompress.graph.recorder import Recording
from fxcompress.metric import Spectrum
from fxcompress.plan import Size
from fxcompress.rules import Match


@dataclass(frozen=True)
class Site:
    """One weight parameter with all its uses, and the rule that claimed it.

    Attributes:
        name: path of the module that owns the weight.
        shape: of the linear operator.
        rows: positions it is applied to in the recorded example.
        source: key of the value it is applied to; equal for sites with the same input.
        match: rule id, location, allowed forms and bounds on the rank.
    """

    name: str
    weight: str
    op: str
    shape: LinearShape
    rows: int
    calls: int
    source: str
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
        """The same at a rank of a form."""
        ranks = np.array([rank], dtype=np.int64)
        bias = self.shape.out_features if self.shape.bias else 0
        chosen = FORMS[form]
        return Size(
            parameters=int(chosen.parameters(self.shape, ranks)[0]) + bias,
            macs=self.rows * int(chosen.macs(self.shape, ranks)[0]),
            bytes=int(chosen.bytes(self.shape, ranks)[0]) + bias * self.shape.dtype.itemsize,
        )

    def candidate(self, spectrum: Spectrum, unit: str, excluded: frozenset[str]) -> Candidate:
        """The site as the budget sees it, without the forms in ``excluded``."""
        loss = spectrum.loss().cpu().numpy()
        ranks = permitted_ranks(
            self.shape.full_rank,
            minimum=self.match.min_rank,
            maximum=self.match.max_rank,
            multiple_of=self.match.multiple_of,
        )
        bias = self.shape.out_features if self.shape.bias else 0
        dense = float(getattr(self.dense_size(), unit))
        options = []
        for name in self.match.forms:
            if name in excluded:
                continue
            form = FORMS[name]
            if unit == "parameters":
                cost = form.parameters(self.shape, ranks) + bias
            elif unit == "macs":
                cost = form.macs(self.shape, ranks) * self.rows
            else:
                cost = form.bytes(self.shape, ranks) + bias * self.shape.dtype.itemsize
            worth = cost <= (1 - self.match.min_saving) * dense
            if worth.any():
                kept = cost[worth].astype(np.float64)
                options.append(Option(name, ranks[worth], loss[ranks[worth]], kept))
        return Candidate(self.name, dense, tuple(options), self.match.group)


def gather_sites(recording: Recording, matches: Sequence[Match]) -> tuple[Site, ...]:
    """The matched weights of a recording, in graph order."""
    operators = {operator.name: operator for operator in recording.operators}
    sites = []
    for match in matches:
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
                match=match,
            )
        )
    return tuple(sites)


def dense_weight(module: nn.Module) -> torch.Tensor:
    """The weight of a linear module as (m x n), whichever way it is stored."""
    weight: torch.Tensor = module.weight  # type: ignore[assignment]
    return weight.T if is_hf_conv1d(module) else weight
