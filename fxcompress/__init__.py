"""fxcompress: a declarative graph-rewriting compiler pass for low-rank compression.

>>> small = fxcompress.compile(model, "decoder", calibration)
>>> print(fxcompress.diff(model, small))
>>> fxcompress.save(small, "out/")
"""

from fxcompress.compare import diff
from fxcompress.compile import compile, explain, plan
from fxcompress.errors import (
    BudgetError,
    CalibrationError,
    FxcompressError,
    FxcompressWarning,
    LoadError,
    RecordError,
    RewriteError,
    RuleError,
    SaveError,
    TrainingError,
)
from fxcompress.forms import register_form
from fxcompress.isvt import ISVT
from fxcompress.late import import_after
from fxcompress.loading import load
from fxcompress.measure import measure
from fxcompress.plan import Plan, plan_of
from fxcompress.saving import save
from fxcompress.sweep import sweep

# So that from_pretrained knows compressed models, whichever of both is imported first.
import_after("transformers.quantizers.auto", "fxcompress.hf")

__version__ = "0.1.0"

__all__ = [  # noqa: RUF022 (as sorted() has them)
    "BudgetError",
    "CalibrationError",
    "FxcompressError",
    "FxcompressWarning",
    "ISVT",
    "LoadError",
    "Plan",
    "RecordError",
    "RewriteError",
    "RuleError",
    "SaveError",
    "TrainingError",
    "compile",
    "diff",
    "explain",
    "load",
    "measure",
    "plan",
    "plan_of",
    "register_form",
    "save",
    "sweep",
]
