"""The names of metrics that rule files may use.

Apart from the metrics themselves, so that rules can be checked without torch.
:mod:`fxcompress.metric.registry` holds both in step.
"""

from __future__ import annotations

from collections.abc import Mapping

from fxcompress.late import load_plugins

GROUP = "fxcompress.metrics"
"""Entry points of this group name modules that register metrics when they are imported."""

BUILT_IN: Mapping[str, str] = {
    "fxcompress.metric.euclidean:EUCLIDEAN": "euclidean",
    "fxcompress.metric.diagonal:DIAGONAL": "diagonal",
    "fxcompress.metric.elementwise:ELEMENTWISE": "elementwise",
    "fxcompress.metric.activation:ACTIVATION": "activation",
    "fxcompress.metric.kfac:KFAC": "kfac",
    "fxcompress.metric.ekfac:EKFAC": "ekfac",
}
"""The metrics of this package by their place: a module, and the metric's name in it."""

_WORDS: dict[str, None] = dict.fromkeys(BUILT_IN.values())


def add_metric_word(name: str) -> None:
    """Make a name known.

    Raises:
        ValueError: it is taken.
    """
    if name in _WORDS:
        raise ValueError(f"a metric named {name!r} is already registered")
    _WORDS[name] = None


def metric_words() -> tuple[str, ...]:
    """The names of all metrics, those of installed plug-ins included.

    >>> "kfac" in metric_words()
    True
    """
    load_plugins(GROUP)
    return tuple(_WORDS)
