"""fxcompress: a declarative graph-rewriting compiler pass for low-rank compression.

>>> small = fxcompress.compile(model, "decoder", calibration)
>>> print(fxcompress.diff(model, small))
>>> fxcompress.save(small, "out/")
"""

from typing import TYPE_CHECKING

from fxcompress.late import exported, import_after
from fxcompress.version import __version__ as __version__

if TYPE_CHECKING:
    from fxcompress.errors import BudgetError as BudgetError
    from fxcompress.errors import CalibrationError as CalibrationError
    from fxcompress.errors import CheckpointError as CheckpointError
    from fxcompress.errors import FxcompressError as FxcompressError
    from fxcompress.errors import FxcompressWarning as FxcompressWarning
    from fxcompress.errors import LoadError as LoadError
    from fxcompress.errors import MemoryLimitError as MemoryLimitError
    from fxcompress.errors import ProcessError as ProcessError
    from fxcompress.errors import RecordError as RecordError
    from fxcompress.errors import RewriteError as RewriteError
    from fxcompress.errors import RuleError as RuleError
    from fxcompress.errors import SaveError as SaveError
    from fxcompress.errors import TrainingError as TrainingError
    from fxcompress.forms.registry import register_form as register_form
    from fxcompress.isvt import ISVT as ISVT
    from fxcompress.metric.registry import register_metric as register_metric
    from fxcompress.pipeline.compare import diff as diff
    from fxcompress.pipeline.compile import compile as compile
    from fxcompress.pipeline.compile import explain as explain
    from fxcompress.pipeline.compile import plan as plan
    from fxcompress.pipeline.draw import draw as draw
    from fxcompress.pipeline.forecast import Forecast as Forecast
    from fxcompress.pipeline.forecast import forecast as forecast
    from fxcompress.pipeline.measure import measure as measure
    from fxcompress.pipeline.sweep import sweep as sweep
    from fxcompress.plans.plan import Fidelity as Fidelity
    from fxcompress.plans.plan import Plan as Plan
    from fxcompress.plans.plan import SitePlan as SitePlan
    from fxcompress.plans.plan import plan_of as plan_of
    from fxcompress.report.diff import Diff as Diff
    from fxcompress.report.sweep import Sweep as Sweep
    from fxcompress.rules.matching.explain import Explanation as Explanation
    from fxcompress.saved.load import load as load
    from fxcompress.saved.save import save as save

__all__, __getattr__, __dir__ = exported(
    __name__,
    {
        "fxcompress.errors": (
            *("BudgetError", "CalibrationError", "CheckpointError", "FxcompressError"),
            *("FxcompressWarning", "LoadError", "MemoryLimitError", "ProcessError", "RecordError"),
            "RewriteError",
            *("RuleError", "SaveError", "TrainingError"),
        ),
        "fxcompress.forms": (),
        "fxcompress.forms.registry": ("register_form",),
        "fxcompress.isvt": ("ISVT",),
        "fxcompress.metric": (),
        "fxcompress.metric.registry": ("register_metric",),
        "fxcompress.operators": (),
        "fxcompress.picture": (),
        "fxcompress.pipeline.compare": ("diff",),
        "fxcompress.pipeline.compile": ("compile", "explain", "plan"),
        "fxcompress.pipeline.draw": ("draw",),
        "fxcompress.pipeline.forecast": ("Forecast", "forecast"),
        "fxcompress.pipeline.measure": ("measure",),
        "fxcompress.pipeline.sweep": ("sweep",),
        "fxcompress.plans": (),
        "fxcompress.plans.plan": ("Fidelity", "Plan", "SitePlan", "plan_of"),
        "fxcompress.report.diff": ("Diff",),
        "fxcompress.report.sweep": ("Sweep",),
        "fxcompress.rules": (),
        "fxcompress.rules.matching.explain": ("Explanation",),
        "fxcompress.saved.load": ("load",),
        "fxcompress.saved.save": ("save",),
    },
)

# So that from_pretrained knows compressed models, whichever of both is imported first.
import_after("transformers.quantizers.auto", "fxcompress.saved.hf")
