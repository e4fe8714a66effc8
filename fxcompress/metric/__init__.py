"""Metrics: which small changes of a weight matter, and by how much.

:func:`calibrate` runs the model over the calibration data and gathers :class:`Moments` for
every site; a :class:`Metric` turns them into a :class:`QuadraticForm` on changes of its weight, in
which forms approximate it.
"""

from fxcompress.metric.activation import ACTIVATION
from fxcompress.metric.capture import Calibration, calibrate
from fxcompress.metric.diagonal import DIAGONAL
from fxcompress.metric.ekfac import EKFAC
from fxcompress.metric.elementwise import ELEMENTWISE
from fxcompress.metric.euclidean import EUCLIDEAN
from fxcompress.metric.kfac import KFAC
from fxcompress.metric.kronecker import Kronecker, KroneckerMetric
from fxcompress.metric.metric import Metric
from fxcompress.metric.moments import Moments
from fxcompress.metric.output import Loss, OutputKind
from fxcompress.metric.passes import Draws
from fxcompress.metric.quadratic import QuadraticForm
from fxcompress.metric.spectrum import decompose
from fxcompress.metric.statistic import Statistic
from fxcompress.metric.whiten import Factor

METRICS: dict[str, Metric] = {
    m.name: m for m in (EUCLIDEAN, DIAGONAL, ELEMENTWISE, ACTIVATION, KFAC, EKFAC)
}

__all__ = [
    "METRICS",
    "Calibration",
    "Draws",
    "Factor",
    "Kronecker",
    "KroneckerMetric",
    "Loss",
    "Metric",
    "Moments",
    "OutputKind",
    "QuadraticForm",
    "Statistic",
    "calibrate",
    "decompose",
]
