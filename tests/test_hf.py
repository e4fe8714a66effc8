"""``save_pretrained``, ``from_pretrained`` and the Trainer: the compressed model, or an error."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import fxcompress
from fxcompress import LoadError, SaveError, plan_of
from tests.small import rules
from tests.zoo import DECODER

PROMPT = torch.tensor([[5, 9, 17, 33], [6, 8, 20, 3]])
Auto = transformers.AutoModelForCausalLM


def llama(**options: Any) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**DECODER, **options})
    model: Any = transformers.LlamaForCausalLM(config)
    return model.eval()


def compressed(**options: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    batch = {"input_ids": torch.randint(3, 128, (4, 16), generator=generator)}
    return fxcompress.compile(llama(**options), rules(0.5, name="*layers*"), [batch])


def assert_same(a: Any, b: Any) -> None:
    with torch.no_grad():
        assert torch.equal(a(PROMPT).logits, b(PROMPT).logits)
    assert plan_of(a) == plan_of(b)
    assert type(a) is type(b)


def test_round_trips(tmp_path: Path) -> None:
    small = compressed()
    small.save_pretrained(tmp_path / "a")
    loaded = Auto.from_pretrained(tmp_path / "a")
    assert_same(loaded, small)
    assert_same(fxcompress.load(tmp_path / "a"), small)
    loaded.save_pretrained(tmp_path / "b", max_shard_size="40KB")
    assert len([*(tmp_path / "b").glob("model-*")]) > 2
    assert_same(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "b"), small)
    assert_same(fxcompress.load(tmp_path / "b"), small)
    fxcompress.save(loaded, tmp_path / "c")
    assert_same(fxcompress.load(tmp_path / "c"), small)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_save_themselves_likewise(copied: Any, tmp_path: Path) -> None:
    small = compressed(tie_word_embeddings=True)
    copied(small).save_pretrained(tmp_path)
    assert_same(Auto.from_pretrained(tmp_path), small)


def test_embeddings_that_were_resized(tmp_path: Path) -> None:
    small = compressed()
    small.resize_token_embeddings(140)
    small.save_pretrained(tmp_path / "a")
    assert_same(Auto.from_pretrained(tmp_path / "a"), small)
    fxcompress.save(small, tmp_path / "b")
    assert_same(fxcompress.load(tmp_path / "b"), small)


_PROGRAM = """
import sys
{imports}
try:
    print(type(transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
except Exception as error:
    print("raised", type(error).__name__)
"""


@pytest.mark.parametrize(
    ("imports", "printed"),
    [
        ("import transformers", "raised RuntimeError"),
        ("import fxcompress, transformers", "LlamaForCausalLM"),
        (
            "import transformers; transformers.LlamaForCausalLM; import fxcompress",
            "LlamaForCausalLM",
        ),
    ],
)
def test_in_a_new_process(imports: str, printed: str, tmp_path: Path) -> None:
    compressed().save_pretrained(tmp_path)
    root = str(Path(fxcompress.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM.format(imports=imports), str(tmp_path)],
        capture_output=True, text=True, timeout=200, env={**os.environ, "PYTHONPATH": root},
    )  # fmt: skip
    assert done.stdout.strip() == printed, done.stderr


def test_what_is_incomplete_or_no_whole_is_refused(tmp_path: Path) -> None:
    small = compressed()
    with pytest.raises(SaveError, match="part of a compressed model"):
        small.model.save_pretrained(tmp_path / "part")
    small.save_pretrained(tmp_path)
    with pytest.raises(LoadError, match="not what the plan was made for"):
        transformers.AutoModel.from_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    with safe_open(file, "pt") as opened:
        about = opened.metadata()
    state = load_file(file)
    factor = next(name for name in state if ".body." in name)
    del state[factor]
    save_file(state, file, about)
    with pytest.raises(LoadError, match="incomplete"):
        Auto.from_pretrained(tmp_path)
    save_file(state, file, {"format": "pt"})
    with pytest.raises(LoadError, match="carry no plan"):
        Auto.from_pretrained(tmp_path)
    small.lm_head = torch.nn.Linear(64, 5)
    with pytest.raises(SaveError, match="changed after it was rewritten"):
        small.save_pretrained(tmp_path / "changed")


class _Data(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 16

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        row = torch.randint(3, 128, (8,), generator=torch.Generator().manual_seed(index))
        return {"input_ids": row, "labels": row}


def test_the_trainer_saves_and_resumes(tmp_path: Path) -> None:
    def trainer(model: Any) -> Any:
        options = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, report_to=[],
            use_cpu=True, disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        return transformers.Trainer(model, options, train_dataset=_Data())

    small = compressed()
    again = copy.deepcopy(small)
    first = trainer(small)
    first.train()
    first.save_model(str(tmp_path / "final"))
    small.eval()
    assert_same(Auto.from_pretrained(tmp_path / "final"), small)
    trainer(again).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_same(again.eval(), small)


def test_the_config_of_a_save_that_was_cut_off(tmp_path: Path) -> None:
    """The weights have their own; a config of another save beside them is not used."""
    small = compressed()
    fxcompress.save(small, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"fxcompress_save": "of another", "rms_norm_eps": 0.5}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert_same(fxcompress.load(tmp_path), small)
