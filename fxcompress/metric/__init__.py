"""Metrics: which small changes of a weight matter, and by how much.

:func:`calibrate` runs the model over the calibration data and gathers :class:`Moments` for
every site; a :class:`Metric` turns them into a :class:`QuadraticForm` on changes of its weight, in
which forms approximate it.
"""

from typing import TYPE_CHECKING

from fxcompress.late import exported

if TYPE_CHECKING:
    from fxcompress.metric.capture import Calibration as Calibration
    from fxcompress.metric.capture import calibrate as calibrate
    from fxcompress.metric.kronecker import Kronecker as Kronecker
    from fxcompress.metric.kronecker import KroneckerMetric as KroneckerMetric
    from fxcompress.metric.metric import Metric as Metric
    from fxcompress.metric.moments import Moments as Moments
    from fxcompress.metric.output import Loss as Loss
    from fxcompress.metric.output import OutputKind as OutputKind
    from fxcompress.metric.passes import Draws as Draws
    from fxcompress.metric.quadratic import QuadraticForm as QuadraticForm
    from fxcompress.metric.registry import METRICS as METRICS
    from fxcompress.metric.registry import register_metric as register_metric
    from fxcompress.metric.spectrum import decompose as decompose
    from fxcompress.metric.statistic import Statistic as Statistic
    from fxcompress.metric.whiten import Factor as Factor
    from fxcompress.metric.words import metric_words as metric_words

__all__, __getattr__, __dir__ = exported(
    __name__,
    {
        "fxcompress.metric.capture": ("Calibration", "calibrate"),
        "fxcompress.metric.kronecker": ("Kronecker", "KroneckerMetric"),
        "fxcompress.metric.metric": ("Metric",),
        "fxcompress.metric.moments": ("Moments",),
        "fxcompress.metric.output": ("Loss", "OutputKind"),
        "fxcompress.metric.passes": ("Draws",),
        "fxcompress.metric.quadratic": ("QuadraticForm",),
        "fxcompress.metric.registry": ("METRICS", "register_metric"),
        "fxcompress.metric.spectrum": ("decompose",),
        "fxcompress.metric.statistic": ("Statistic",),
        "fxcompress.metric.whiten": ("Factor",),
        "fxcompress.metric.words": ("metric_words",),
    },
)
