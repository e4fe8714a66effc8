"""The settings of a rule file: budgets, metric, solver, and defaults of all rules."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Discriminator, Field, Tag, model_validator
from pydantic_core import PydanticCustomError

from fxcompress.metric.words import metric_words
from fxcompress.plans.units import UNITS, CountedUnit, UnitWord
from fxcompress.rules.language.fields import Count, Flag, FrozenModel, Number, Share, Text, Whole


class Budget(FrozenModel):
    """How much of the model may remain: ``{keep: 0.8, of: matched, unit: parameters}``."""

    keep: Annotated[float, Field(strict=True, gt=0, le=1, allow_inf_nan=False)]
    """The fraction that remains."""
    of: Literal["matched", "model"] = "matched"
    """Of what: the operators that the rules match, or the whole model."""
    unit: UnitWord = "parameters"
    """What is counted; latency is measured on this machine, operator by operator."""

    @model_validator(mode="after")
    def _measurable(self) -> Self:
        if self.of == "model" and not isinstance(UNITS[self.unit], CountedUnit):
            message = f"{self.unit} is measured for the matched operators only: leave 'of' out"
            raise PydanticCustomError("wrong-place", message)
        return self


def different_budgets(budgets: tuple[Budget, ...]) -> tuple[Budget, ...]:
    """One budget per unit and whole."""
    seen = {(budget.unit, budget.of) for budget in budgets}
    if len(seen) < len(budgets):
        message = "two budgets are about the same unit: keep the tighter one"
        raise PydanticCustomError("duplicate-budget", message)
    return budgets


class Damping(FrozenModel):
    """Added to each factor's eigenvalues, relative to their mean.

    What is left out is chosen by what it loses on the batches held back; 1e-3 and 1e-1 if none are.
    """

    input: Annotated[Number, Field(ge=0)] | None = None
    """For the second moments of the inputs."""
    output: Annotated[Number, Field(ge=0)] | None = None
    """For the second moments of the gradients of the outputs."""


def _known_metric(value: Any) -> Any:
    known = metric_words()
    if isinstance(value, str) and value in known:
        return value
    expected = ", ".join(f"'{name}'" for name in known)
    raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})


class Metric(FrozenModel):
    """The distance that decides which components of a weight count."""

    kind: Annotated[str, BeforeValidator(_known_metric)] = "kfac"
    """Which distance; kfac is the Fisher metric in its Kronecker form."""
    damping: Damping = Damping()
    """Added to each factor's eigenvalues, relative to their mean."""
    output: Annotated[
        Annotated[Literal["auto", "categorical", "bernoulli", "gaussian"], Tag("one")]
        | Annotated[
            dict[Text, Literal["categorical", "bernoulli", "gaussian"]],
            Field(min_length=1),
            Tag("several"),
        ],
        Discriminator(lambda value: "several" if isinstance(value, dict) else "one"),
    ] = "auto"
    """What the outputs of the model mean; of several outputs, by name or place ("0")."""
    fisher: Literal["sampled", "exact", "empirical"] = "sampled"
    """Where labels come from: drawn from the model, all of them (few classes), or the data's."""
    seed: Whole = 0
    """Of the draws from the model's predictions."""
    batches: Count | None = None
    """How many of the calibration batches are used, from the first; all if left out."""
    held_back: Share = 0.125
    """Share of them that the metric never sees, one of two or more at least: the loss of the plan
    is predicted and measured on these.  0 for none."""


class Solver(FrozenModel):
    """How ranks are chosen, and how the weights are trained meanwhile.

    By default the model is cut once, and nothing is trained.  With ``{rounds: 5, steps: 20}``
    ranks fall in five rounds of twenty gradient steps each, towards the dense model's own
    predictions: no labels are needed.
    """

    allocation: Literal["global", "uniform"] = "global"
    """One global threshold, or the same fraction everywhere."""
    rounds: Count = 1
    """Thresholdings, the last one to the budget."""
    steps: Annotated[Whole, Field(ge=0)] = 0
    """Gradient steps after each of them, one calibration batch a step; 0 trains nothing."""
    schedule: Literal["soft", "hard"] = "soft"
    """Whether the budget falls over the rounds, or holds from the first one on."""
    objective: Literal["kl", "task"] = "kl"
    """What is descended on: the KL divergence from the dense model, or the loss= given."""
    gradient: Literal["factors", "whitened"] = "factors"
    """Steps of an optimizer on the factors, or steps along the gradient in the coordinates of the
    metric, each of them thresholded (proximal gradient)."""
    learning_rate: Annotated[Number, Field(gt=0)] | None = None
    """At its highest, 2.5e-4 if left out; it rises and falls over all rounds.  For whitened
    gradients the first step size, 1 if left out."""
    features: Annotated[Number, Field(ge=0)] = 10.0
    """Weight, beside the KL, of the mean over layers of how far their outputs are from those of
    the dense model, in the Fisher metric; 0 for the KL alone.  It is not used with a task loss."""
    correct: Flag = False
    """Whether weights are fitted in closed form, after each thresholding, to the inputs that the
    compressed layers before them really produce: a share of the way that the objective chooses."""
    memory: Annotated[Number, Field(gt=0)] = 4.0
    """GiB for what a gradient keeps; larger batches are cut into pieces."""

    @property
    def iterative(self) -> bool:
        """Whether anything is trained."""
        return self.steps > 0 or self.correct

    @model_validator(mode="after")
    def _whole(self) -> Self:
        if self.rounds > 1 and not self.iterative:
            message = "rounds without gradient steps change nothing: give 'steps' too, or 'correct'"
            raise PydanticCustomError("wrong-place", message)
        if self.objective == "task" and self.features and "features" in self.model_fields_set:
            message = "features are compared with the dense model's, which a task loss does not ask"
            raise PydanticCustomError("wrong-place", message)
        return self


class Defaults(FrozenModel):
    """What holds for every rule that does not say otherwise."""

    tied: Literal["skip"] = "skip"
    """What becomes of weights that several operators read."""
    multi_call: Literal["once", "skip"] = "once"
    """What becomes of a module that is called several times."""
    multiple_of: Count = 1
    """Ranks are multiples of this."""
    min_rank: Count = 1
    """The lowest rank."""
    min_saving: Share = 0.0
    """The share of an operator's cost that a rewrite has to save to be made."""
