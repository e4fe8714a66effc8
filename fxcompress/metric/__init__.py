"""Metrics: which small changes of a weight matter, and by how much.

:func:`calibrate` runs the model over the calibration data and gathers :class:`Moments` for
every site; a :class:`Metric` turns them into a quadratic form on changes of its weight
(:mod:`fxcompress.metric.quadratic`), in which forms approximate it.
"""

from fxcompress.metric.activation import ACTIVATION
from fxcompress.metric.capture import Calibration, calibrate
from fxcompress.metric.diagonal import DIAGONAL
from fxcompress.metric.ekfac import EKFAC
from fxcompress.metric.elementwise import ELEMENTWISE
from fxcompress.metric.euclidean import EUCLIDEAN
from fxcompress.metric.kfac import KFAC
from fxcompress.metric.metric import Factor, Metric
from fxcompress.metric.moments import Moments
from fxcompress.metric.output import Loss, OutputKind
from fxcompress.metric.passes import Draws
from fxcompress.metric.spectrum import decompose

METRICS: dict[str, Metric] = {
    m.name: m for m in (EUCLIDEAN, DIAGONAL, ELEMENTWISE, ACTIVATION, KFAC, EKFAC)
}

__all__ = [
    "METRICS",
    "Calibration",
    "Draws",
    "Factor",
    "Loss",
    "Metric",
    "Moments",
    "OutputKind",
    "calibrate",
    "decompose",
]
