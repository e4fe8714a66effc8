"""The plan: what is done to every site, and why.  It is what ``plan.json`` holds.

Everything here is a frozen value with a JSON form; no tensors, no modules.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    ConfigDict,
    Field,
    RootModel,
    field_validator,
    model_validator,
)
from torch import fx, nn

from fxcompress.errors import RewriteError
from fxcompress.forms.target import Rank
from fxcompress.forms.template import Template
from fxcompress.graph.wrappers import unwrapped
from fxcompress.notebook import Shown
from fxcompress.plans.record import Frozen, Whole, showable
from fxcompress.plans.structure import Structure, structure_of
from fxcompress.plans.tradeoff import Closest, Tradeoff
from fxcompress.plans.units import COUNTED, CountedUnit, CountedWord, UnitWord

FORMAT: Literal[4] = 4
"""Version of ``plan.json``; files of another version are refused."""

FloatingType = Literal["float64", "float32", "bfloat16", "float16"]


class Size(RootModel[dict[CountedWord, Annotated[int, AfterValidator(showable)]]]):
    """Exact counts by the word of their unit, biases included.

    A plan of before there was some unit lacks it everywhere.

    Attributes:
        parameters: number of parameter entries.
        macs: multiply-accumulates for the whole recorded batch.
        bytes: parameters and buffers as stored.
    """

    model_config = ConfigDict(frozen=True)

    if TYPE_CHECKING:

        def __init__(self, root: dict[str, int] = ..., /, **counts: int) -> None: ...

    def __repr_args__(self) -> Iterable[tuple[str | None, Any]]:
        return self.root.items()

    @field_validator("root")
    @classmethod
    def _complete(cls, value: dict[str, int]) -> dict[str, int]:
        if "parameters" not in value:
            raise ValueError("parameters are missing")
        return value

    @classmethod
    def of(cls, count: Callable[[CountedUnit], int]) -> Size:
        """What a function counts in every unit."""
        return cls({unit.word: int(count(unit)) for unit in COUNTED})

    @property
    def units(self) -> tuple[CountedUnit, ...]:
        """The units that it has, in the order of reports."""
        return tuple(unit for unit in COUNTED if unit.word in self.root)

    @property
    def parameters(self) -> int:
        return self["parameters"]

    @property
    def macs(self) -> int:
        return self["macs"]

    @property
    def bytes(self) -> int:
        return self["bytes"]

    def __getitem__(self, unit: str) -> int:
        return self.root[unit]

    def __add__(self, other: Size) -> Size:
        return Size({unit: number + other[unit] for unit, number in self.root.items()})

    def __sub__(self, other: Size) -> Size:
        return Size({unit: number - other[unit] for unit, number in self.root.items()})


ZERO = Size.of(lambda unit: 0)


def total_size(sizes: Iterable[Size]) -> Size:
    """Sizes added up, each count for itself; zero of none."""
    first, *rest = [*sizes] or [ZERO]
    return Size({unit: sum((one[unit] for one in rest), n) for unit, n in first.root.items()})


class Part(Frozen):
    """One operator of the subgraph that stands where an operator stood.

    Attributes:
        path: of a layer below the site, ``"body.up"``, or ``"shared.down"`` for what several
            sites have in common; empty for a function.
        op: the canonical operator (``"linear"``, ``"conv2d"``), or the name of a torch function.
        in_features, out_features: of a layer with a weight, None for anything else.
        kernel: of a convolution, empty for anything else.
    """

    path: str
    op: str
    in_features: Whole | None = None
    out_features: Whole | None = None
    kernel: tuple[Whole, ...] = ()


class Then(Frozen):
    """The form of what a narrowed hidden value leaves of an operator.

    Attributes:
        form: its name.
        rank: of it.
        full_rank: the rank at which it would lose nothing more.
    """

    form: str
    rank: Rank
    full_rank: Rank

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if not _within(self.rank, self.full_rank):
            raise ValueError(f"rank {self.rank} is not within 1..{self.full_rank}")
        return self

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank, or both of them."""
        return _as_tuple(self.rank)

    @property
    def full_ranks(self) -> tuple[int, ...]:
        """The rank, or both of them, at which nothing more would be lost."""
        return _as_tuple(self.full_rank)


AND_INPUT = " and its input"
"""Ends the name of a bundle that is a hidden value, after the path of what reads it."""


class Held(Frozen):
    """What a module, or a parameter by itself, has of every channel of a narrowed hidden value.

    Attributes:
        name: of the module or of the parameter.
        parameters, bytes: of one channel.
    """

    name: str
    parameters: Whole
    bytes: Whole


class SitePlan(Frozen):
    """One weight parameter with all its uses, and what becomes of it.

    Attributes:
        name: path of the module (``"model.layers.0.mlp.up_proj"``).
        weight: name of the parameter.
        applied: how a function applies the weight, where that is not done by a module of its own:
            as it is stored, or transposed (of a matrix (in x out)); empty for a module.
        op: canonical operator.
        operator: the operator in words, ``"linear 576→1536"``.
        in_features, out_features: channels of a convolution; rows and width of a table.
        bias: whether there is one.
        dtype: ``"float32"``, ...
        calls: how often the recorded pass used it.
        rule: id of the rule that matched.
        location: ``"rules.yaml:22"``.
        forms: forms that the rule allowed.
        form: the form chosen, None if the site stays dense.
        rank: its rank, None if the site stays dense; ``tucker2`` has two of them.
        full_rank: the rank at which that form would lose nothing; min(m, n) if dense.
        bundle: name of the bundle that the form is for, empty for a site by itself.
        member: place in that bundle, from 0, in the order of the rule's pattern.
        order: in how many blocks the body puts the channels of its input in order (a convolution
            those of its output); 0 if they stay as they are.
        then: the form that it takes beside that of a narrowed bundle; None if it takes none.
        parts: what the form puts in the operator's place; empty if the site stays dense.
        predicted: predicted loss at that rank, in ``Plan.loss_unit``; 0 if dense.  By the moments
            of the batches held back, if there are any that reach the site.
        energy: share of the squared singular values that is kept, in [0, 1].
        before, after: sizes of this operator; what a bundle shares counts for its first site.
        seconds: measured time of this operator before and after, where a budget is about it;
            that of a bundle counts for its first site.
        reason: why it stays dense; empty if it was rewritten.
        spectrum: singular values in the metric: at most 64 of them, evenly spaced from the first
            to the last.
        held: of the last site of a narrowed hidden value, what else goes with its channels.
        closest: of a site that stays dense, what came closest to being worth it at the price of the
            budget; None if nothing was offered.
    """

    name: str
    weight: str
    op: str
    operator: str
    in_features: Whole
    out_features: Whole
    bias: bool
    dtype: FloatingType
    calls: Whole
    rule: str
    location: str
    forms: tuple[str, ...]
    form: str | None
    rank: Rank | None
    full_rank: Rank
    bundle: str = ""
    member: Whole = 0
    order: Whole = 0
    then: Then | None = None
    parts: tuple[Part, ...] = ()
    predicted: float
    energy: float
    before: Size
    after: Size
    seconds: tuple[float, float] | None = None
    reason: str = ""
    spectrum: tuple[float, ...] = ()
    applied: Literal["", "as stored", "transposed"] = ""
    held: tuple[Held, ...] = ()
    closest: Closest | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if (self.form is None) != (self.rank is None):
            raise ValueError(f"{self.name}: a form needs a rank, and a rank a form")
        if self.rank is not None and not _within(self.rank, self.full_rank):
            raise ValueError(f"{self.name}: rank {self.rank} is not within 1..{self.full_rank}")
        if self.then is not None and not self.bundle:
            raise ValueError(f"{self.name}: 'then' is for what a narrowed bundle leaves")
        return self

    @property
    def own_order(self) -> int:
        """The order of the body of its form; that of a bundle has none, whatever is left then."""
        return 0 if self.bundle else self.order

    @property
    def choice(self) -> tuple[str, Rank]:
        """Form and rank of a site that is rewritten."""
        assert self.form is not None
        assert self.rank is not None
        return self.form, self.rank

    @property
    def narrowing(self) -> tuple[str, int, int]:
        """Form, width and place of a site of a hidden value that is narrowed."""
        form, width = self.choice
        assert isinstance(width, int)
        return form, width, self.member

    @property
    def form_text(self) -> str:
        """The form, and what it is followed by: ``"narrow, pivoted"``; ``"dense"`` without one."""
        return f"{self.form or 'dense'}{f', {self.then.form}' if self.then else ''}"

    @property
    def reader(self) -> str:
        """Path of what reads the hidden value that its bundle is; empty if it is none."""
        return self.bundle.removesuffix(AND_INPUT) if self.bundle.endswith(AND_INPUT) else ""

    @property
    def group(self) -> str:
        """Name of what it is rewritten with: the bundle, or the site itself."""
        return self.bundle or self.name

    @property
    def ranks(self) -> tuple[int, ...]:
        """The rank, or both of them; the full one of a site that stays dense."""
        return _as_tuple(self.full_rank if self.rank is None else self.rank)

    @property
    def full_ranks(self) -> tuple[int, ...]:
        """The rank, or both of them, at which nothing would be lost."""
        return _as_tuple(self.full_rank)

    @property
    def rank_share(self) -> float:
        """Rank as a share of the full one, in (0, 1]; the product for two."""
        return math.prod(self.ranks) / math.prod(self.full_ranks)


def _as_tuple(rank: Rank) -> tuple[int, ...]:
    return rank if isinstance(rank, tuple) else (rank,)


def _within(rank: Rank, full: Rank) -> bool:
    """Whether a rank, or each of two, is at least 1 and not above the full one."""
    if isinstance(rank, int) or isinstance(full, int):
        return isinstance(rank, int) and isinstance(full, int) and 1 <= rank <= full
    return all(1 <= one <= most for one, most in zip(rank, full, strict=True))


class Unmatched(Frozen):
    """An operator with a weight that no rule rewrites, and the reason."""

    name: str
    op: str
    weight: str
    shape: tuple[Whole, ...]
    parameters: Whole
    reason: str


class NodeSummary(Frozen):
    """One node of a recorded graph, for diffs."""

    name: str
    op: str
    path: str
    inputs: tuple[str, ...]
    shape: tuple[Whole, ...] | None


class Limit(Frozen):
    """A further budget that had to be met at the same time, and how it was.

    Attributes:
        keep, of, unit, limit, cost, dense, multiplier: as of :class:`BudgetOutcome`.
        rule: the rule whose operators it is about, empty for all.
    """

    keep: float
    of: Literal["matched", "model"]
    unit: UnitWord
    limit: float
    cost: float
    dense: float
    multiplier: float | None
    rule: str = ""


class BudgetOutcome(Frozen):
    """The budget and how it was met.

    Attributes:
        keep: fraction asked for.
        of: what it is a fraction of: all matched operators, or the whole model.
        unit: word of a unit (:mod:`fxcompress.plans.units`); of ``"latency"`` amounts are seconds.
        allocation: ``"global"`` or ``"uniform"``.
        limit: the budget for the matched operators, in the unit.
        cost: what their plan costs, never above the limit.
        dense: what they cost before.
        multiplier: λ, predicted loss per unit of cost; None for uniform ranks.
        predicted: predicted loss, summed over sites.
        fitted: the same by the damped moments that the ranks were chosen by: what was minimized.
        bound: no plan within the budget can have a lower fitted loss; None for uniform.
    """

    keep: float
    of: Literal["matched", "model"]
    unit: UnitWord
    allocation: Literal["global", "uniform"]
    limit: float
    cost: float
    dense: float
    multiplier: float | None
    predicted: float
    fitted: float
    bound: float | None

    @model_validator(mode="before")
    @classmethod
    def _of_one_kind(cls, values: Any) -> Any:
        """Plans of version 0.1.0 knew one predicted loss, the fitted one."""
        if isinstance(values, dict) and "predicted" in values:
            return {"fitted": values["predicted"], **values}
        return values

    @property
    def gap(self) -> float | None:
        """Duality gap, in the unit of the predicted loss."""
        return None if self.bound is None else self.fitted - self.bound


class MeasuredSite(Frozen):
    """A site, or a bundle as a whole, rewritten alone in the dense model.

    Attributes:
        name: of the site or of the bundle.
        sites: names of the sites that are rewritten: itself, or the members.
        predicted: their predicted loss, in ``Plan.loss_unit``.
        measured: KL to the dense model, in nats per prediction.
        error: its standard error, from the differences between batches; None of one batch.
    """

    name: str
    sites: tuple[str, ...]
    predicted: float
    measured: float
    error: float | None


class Fidelity(Shown, Frozen):
    """Predicted losses and measured ones, on data that the metric was not estimated on.

    Attributes:
        batches, predictions: how much data.
        output: family of the output distribution.
        sites: everything that is rewritten, bundles as one, in graph order.
        measured, error: of the whole compressed model, as of :class:`MeasuredSite`.
        rank_correlation: Spearman's, of predicted and measured over ``sites``; None if there are
            fewer than three, or all alike.
        ratio: median of measured / predicted over the sites that are above their noise; None if
            there are none, or the predictions are not in nats.
        warnings: where prediction and measurement part, and what to do about it.
    """

    batches: Whole
    predictions: Whole
    output: str
    sites: tuple[MeasuredSite, ...]
    measured: float
    error: float | None
    rank_correlation: float | None
    ratio: float | None
    warnings: tuple[str, ...] = ()

    @property
    def singly(self) -> float:
        """Measured KL of the sites one at a time, summed up."""
        return math.fsum(one.measured for one in self.sites)

    @property
    def headline(self) -> str:
        """``KL 0.1275 measured on 4 batches, 30 sites``."""
        return f"KL {self.measured:.4g} measured on {self.batches} batches, {len(self.sites)} sites"

    def __str__(self) -> str:
        width = max((len(one.name) for one in self.sites), default=4)
        lines = [self.headline, f"{'site':{width}}  {'predicted':>10}  {'measured':>10}"]
        lines += [
            f"{s.name:{width}}  {s.predicted:>10.3g}  {s.measured:>10.3g}" for s in self.sites
        ]
        return "\n".join([*lines, *(f"warning: {warning}" for warning in self.warnings)])

    @property
    def by_site(self) -> dict[str, MeasuredSite]:
        """What was measured by the name of a site; the same for all members of a bundle."""
        return {name: one for one in self.sites for name in one.sites}


class HeldBack(Frozen):
    """The whole compressed model beside the dense one, on calibration batches held back.

    Attributes:
        batches, predictions: how much data.
        output: family of the output distribution; ``"loss"`` for a user's loss.
        measured: KL to the dense model, or what the user's loss rises by; nats per prediction.
        error: its standard error, from the differences between batches; None of one batch.
    """

    batches: int
    predictions: int
    output: str
    measured: float
    error: float | None


class Batch(Frozen):
    """The batch that graphs were recorded on: multiply-accumulates and times are of all of it.

    Attributes:
        samples: how many it holds, by the first extent of its tensors; None if they differ in it.
        shapes: of its tensors, each once.
    """

    samples: Annotated[int, Field(ge=1)] | None = None
    shapes: tuple[tuple[Whole, ...], ...] = ()


Seconds = Annotated[float, Field(ge=1e-9, le=1e9)]
Ratio = Annotated[float, Field(gt=0, le=1e18)]

NOTICED = 0.97
"""Models that are this many times as fast or faster are not called slower."""


NOT_TIMED = "the forward time was not measured: "
"""What the warning of a model that could not be timed begins with."""


class Speed(Frozen):
    """Forward passes over the recorded batch, by the dense and the compressed model in turns.

    Attributes:
        before, after: seconds that a pass takes, the medians.
        spread: quartiles of ``before / after`` over pairs of passes.
        pairs: how many these are.
        machine: processor or GPU, and version of torch.
        device: type of it, ``"cpu"`` or ``"cuda"``.
        threads: that torch had.
        dtype: of the parameters.
    """

    before: Seconds
    after: Seconds
    spread: tuple[Ratio, Ratio]
    pairs: Annotated[int, Field(ge=1)]
    machine: str
    device: str
    threads: Whole
    dtype: str

    @property
    def ratio(self) -> float:
        """How many times as fast as the dense model the compressed one is."""
        return self.before / self.after

    @property
    def slower(self) -> bool:
        """Whether the compressed model is slower, beyond the noise: in three pairs of four."""
        return self.ratio < NOTICED and self.spread[1] < 1


class Round(Frozen):
    """One attempt at a round of ISVT: a thresholding, and gradient steps after it.

    Attributes:
        round: counted from 1.
        keep: fraction that the (first) budget allowed.
        removed: what the thresholding took away, ``½ ‖V - W‖²_M`` summed over sites.
        before: the objective after the thresholding, before the steps.
        after: the same after them, on the same batches; None if it was not finite.
        accepted: whether the steps were kept; if not, the weights are those before them.
        rate: highest learning rate, the step size of a whitened gradient, or the share of the way
            to a correction that was gone.
        kind: ``"factors"``, ``"whitened"`` or ``"correction"``.
    """

    round: Whole
    keep: float
    removed: float
    before: float
    after: float | None
    accepted: bool
    rate: float
    kind: Literal["factors", "whitened", "correction"]


class Made(Frozen):
    """With what and when a plan was made.

    Attributes:
        version: of fxcompress.
        torch: its version.
        date: the day, ``"2026-01-31"``, in UTC.
    """

    version: str
    torch: str
    date: str


class Folded(Frozen):
    """A batch norm that is folded into the convolution before it: module paths of both."""

    convolution: str
    norm: str


class Plan(Shown, Frozen):
    """What is done to a model.

    Attributes:
        format: version of this record.
        model_class: ``"transformers.models.llama.modeling_llama.LlamaForCausalLM"``.
        rules: name of the rule file.
        made: with what and when; None in files of before it was kept.
        metric: name of the metric.
        loss_unit: what predicted losses are measured in.
        calibration: what the metric was estimated on (batches, predictions, family, seed).
        damping: of the input and of the output factors, given or chosen; empty where the metric
            has none.
        held_back: the model measured on the batches that the metric did not see; None if it is
            not rewritten yet, or nothing was held back.
        batch: what multiply-accumulates are counted for, and the forward pass is timed on.
        speed: forward time of the dense and the compressed model; None if it was not measured.
        budget: the budget and how it was met; the first of several.
        limits: the other budgets, and those of single rules.
        tradeoff: what other budgets would cost and lose; None with several budgets, with uniform
            ranks, and in files of before it was kept.
        sites: every matched site, in graph order.
        templates: of the forms that rules spelled out, by the names of these forms.
        folded: batch norms that became part of the convolution before them.
        unmatched: every other operator with a weight, and why.
        model_before, model_after: sizes of the whole model.
        expanded: attention modules that were split into their projections.
        before, after: the recorded graphs; ``after`` is empty until the model is rewritten.
        seconds: time spent per stage.
        warnings: what the user should know.
        objective: what the rounds descended on, ``"kl"`` or ``"task"``; empty without rounds.
        rounds: of ISVT, in order; the objective never rises over accepted ones of equal keep.
        fidelity: predicted and measured losses, once :func:`fxcompress.measure` was called.
        earlier: the plans that were carried out before this one, oldest first, if the model given
            was a compressed one.
        save_id: in ``plan.json``, the id of the save, which the weights beside it have too; empty
            in memory, and in files of before there were such ids.
    """

    format: Literal[4] = FORMAT
    model_class: str
    rules: str
    made: Made | None = None
    metric: str
    loss_unit: str
    calibration: dict[str, int | str]
    damping: tuple[float, ...] = ()
    held_back: HeldBack | None = None
    batch: Batch = Batch()
    speed: Speed | None = None
    budget: BudgetOutcome
    limits: tuple[Limit, ...] = ()
    tradeoff: Tradeoff | None = None
    sites: tuple[SitePlan, ...]
    templates: dict[str, Template] = Field(default_factory=dict)
    folded: tuple[Folded, ...] = ()
    unmatched: tuple[Unmatched, ...]
    model_before: Size
    model_after: Size
    expanded: tuple[str, ...] = ()
    before: tuple[NodeSummary, ...] = ()
    after: tuple[NodeSummary, ...] = ()
    seconds: dict[str, float] = Field(default_factory=dict)
    warnings: tuple[str, ...] = ()
    objective: Literal["", "kl", "task"] = ""
    rounds: tuple[Round, ...] = ()
    fidelity: Fidelity | None = None
    earlier: tuple[Plan, ...] = ()
    save_id: str = Field("", pattern=r"^([0-9a-f]{16})?$")

    @model_validator(mode="after")
    def _coherent(self) -> Self:
        if len({site.name for site in self.sites}) < len(self.sites):
            raise ValueError("a site appears twice")
        sizes = [size for site in self.sites for size in (site.before, site.after)]
        if any(size.units != self.model_before.units for size in (*sizes, self.model_after)):
            raise ValueError("not all sizes are in the same units")
        absent = {unit.word for unit in COUNTED} - self.model_before.root.keys()
        if absent & {self.budget.unit, *(limit.unit for limit in self.limits)}:
            raise ValueError("no size is in the unit of a budget")
        for name, sites in self.bundles.items():
            if len({(site.form, site.rank) for site in sites}) > 1:
                raise ValueError(f"the sites of bundle {name} differ in form or rank")
        return self

    @property
    def headline(self) -> str:
        """What was rewritten, how much is left, and the loss."""
        from fxcompress.report.frame import headline

        return headline(self)

    def worst(self, n: int = 10) -> tuple[SitePlan, ...]:
        """The rewritten sites that lose most, the worst one first.

        By what was measured site by site, once :func:`fxcompress.measure` was called, else by
        what was predicted.  Of sites that are rewritten together the first one stands for all.

        Args:
            n: how many.
        """
        measured = {} if self.fidelity is None else self.fidelity.by_site
        losses = {
            sites[0].name: measured[sites[0].name].measured
            if sites[0].name in measured
            else math.fsum(site.predicted for site in sites)
            for sites in self.groups.values()
        }
        first = [sites[0] for sites in self.groups.values()]
        return tuple(sorted(first, key=lambda site: -losses[site.name])[: max(0, n)])

    def to_dataframe(self) -> Any:
        """One row for each matched site, as a ``pandas.DataFrame``.

        Raises:
            ImportError: pandas is not installed.
        """
        from fxcompress.report.frame import site_rows

        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_dataframe() needs pandas: pip install pandas") from error
        return pandas.DataFrame(site_rows(self))

    @property
    def rewritten(self) -> tuple[SitePlan, ...]:
        return tuple(site for site in self.sites if site.form is not None)

    @property
    def groups(self) -> dict[str, tuple[SitePlan, ...]]:
        """The sites that are rewritten, a single one by its name, several by that of the bundle."""
        found: dict[str, tuple[SitePlan, ...]] = {}
        bundles = self.bundles
        for site in self.rewritten:
            found[site.group] = bundles.get(site.group, (site,))
        return found

    @property
    def bundles(self) -> dict[str, tuple[SitePlan, ...]]:
        """The sites that are rewritten together, by the name of their bundle.

        They stand in the order of the rule's pattern, as the forms have them.
        """
        found: dict[str, tuple[SitePlan, ...]] = {}
        for site in sorted(self.sites, key=lambda site: site.member):
            if site.bundle:
                found[site.bundle] = (*found.get(site.bundle, ()), site)
        return found

    def __str__(self) -> str:
        from fxcompress.report.table import plan_table

        return plan_table(self)


_PLAN = "_fxcompress_plan"
_STRUCTURE = "_fxcompress_structure"
_PRESERVED = "_user_preserved_attributes"


def attach_plan(model: nn.Module, plan: Plan) -> None:
    """Let a model that was just rewritten carry its plan; it survives ``deepcopy`` and pickling."""
    _carry(model, _PLAN, plan)
    _carry(model, _STRUCTURE, structure_of(model))
    if "transformers.modeling_utils" in sys.modules:
        from fxcompress.saved.hf import watch

        watch(model)


def update_plan(model: nn.Module, plan: Plan) -> None:
    """Exchange the plan that a model carries for one that says more about the same rewrite."""
    _carry(unwrapped(model), _PLAN, plan)


def _carry(model: nn.Module, key: str, value: object) -> None:
    model.__dict__[key] = value
    if isinstance(model, fx.GraphModule):
        # Its deepcopy drops attributes, except for those in here; pickling drops ``meta``.
        model.meta.setdefault(_PRESERVED, {})[key] = value


def plan_of(model: nn.Module) -> Plan:
    """The plan of a model that came from :func:`compile` or :func:`fxcompress.load`.

    Args:
        model: may be wrapped by ``torch.compile`` or for data parallelism.

    Raises:
        RewriteError: the model carries none.
    """
    model = unwrapped(model)
    carried = getattr(model, "__dict__", {}).get(_PLAN)
    if not isinstance(carried, Plan):
        raise RewriteError(
            f"this {type(model).__name__} did not come from fxcompress.compile() or .load()"
        )
    return carried


def rewritten_structure(model: nn.Module) -> Structure | None:
    """What a model consisted of when its plan was carried out; None if it does not say."""
    found = unwrapped(model).__dict__.get(_STRUCTURE)
    return found if isinstance(found, Structure) else None


def history(model: nn.Module) -> tuple[Plan, ...]:
    """The plans that were carried out on a model, oldest first; none on a dense one."""
    last = unwrapped(model).__dict__.get(_PLAN)
    if not isinstance(last, Plan):
        return ()
    return (*last.earlier, last.model_copy(update={"earlier": ()}))
