"""Metrics by name, those that were registered from outside among them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from types import MappingProxyType

from fxcompress.metric.metric import Metric
from fxcompress.metric.statistic import Statistic
from fxcompress.metric.words import BUILT_IN, add_metric_word

_METRICS: dict[str, Metric] = {}

METRICS: Mapping[str, Metric] = MappingProxyType(_METRICS)
"""All metrics that are registered, by name."""


def register_metric(metric: Metric) -> None:
    """Make a metric known by its name, to rule files too (``metric: {kind: NAME}``).

    Args:
        metric: an instance of a subclass of :class:`Metric`.

    Raises:
        ValueError: the name is taken, or no name; or two of its statistics have one name.
        TypeError: it is no metric.
    """
    if not isinstance(metric, Metric):
        raise TypeError(f"an instance of Metric is registered, not {metric!r}")
    name = getattr(metric, "name", None)
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"the name of a metric is an identifier, not {name!r}")
    own = [each.name for each in metric.needs if isinstance(each, Statistic)]
    for each in own:
        if own.count(each) > 1:
            raise ValueError(f"metric {name} needs two statistics named {each!r}")
    add_metric_word(name)
    _METRICS[name] = metric


for _place, _word in BUILT_IN.items():
    _module, _, _name = _place.partition(":")
    _metric: Metric = getattr(importlib.import_module(_module), _name)
    assert _metric.name == _word, f"{_place} is {_metric.name}, not {_word}"
    _METRICS[_word] = _metric
