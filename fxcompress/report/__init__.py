"""Reports: the graph diff as text, HTML and JSON; the plan as a table; progress."""

from fxcompress.progress import Progress, stages
from fxcompress.report.diff import Diff, diff_plan
from fxcompress.report.table import plan_table

__all__ = ["Diff", "Progress", "diff_plan", "plan_table", "stages"]
