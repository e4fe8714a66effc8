"""``draw``: the graph of a model, or what was changed in one, to look at."""

from __future__ import annotations

from typing import Any

from torch import nn

from fxcompress.errors import RecordError
from fxcompress.graph.inputs import Forward
from fxcompress.graph.wrappers import unwrapped
from fxcompress.picture import Picture
from fxcompress.picture.nodes import of_operators
from fxcompress.pipeline.survey import working_copy
from fxcompress.plans.plan import Plan, history
from fxcompress.rewrite import record_operators


def draw(
    model: nn.Module | Plan, example: Any = None, *, forward: Forward | None = None
) -> Picture:
    """The graph of a model as rules see it, or of a compressed one before and after.

    >>> print(fxcompress.draw(model, batch))                                    # doctest: +SKIP
    LlamaForCausalLM: 282 nodes
    model
      embed_tokens             embedding 256→64       2×16×64
      layers.0 … 5             6 alike
      ...

    Args:
        model: any module that runs, which is recorded on the example; a plan, or a model that was
            compressed and carries one, is drawn from that, without being run.
        example: one batch.
        forward: how to call the model on it, as in :func:`fxcompress.compile`.

    Raises:
        RecordError: there is no example to record the model on, the model fails on it, or the plan
            holds no graph.
    """
    plans = (model,) if isinstance(model, Plan) else history(model)[-1:]
    for plan in plans:
        if not plan.before:
            raise RecordError("this plan holds no graph: it was made by hand, or cut down")
        return Picture.of_plan(plan)
    assert not isinstance(model, Plan)
    if example is None:
        raise RecordError("drawing a model runs it once: give it an example batch")
    recording = record_operators(working_copy(model), [example], forward=forward)
    return Picture.of_graph(type(unwrapped(model)).__name__, of_operators(recording.operators))
