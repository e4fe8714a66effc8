"""Models: a directory of Hugging Face's, or what a function of the user's returns."""

from __future__ import annotations

import importlib
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fxcompress.cli.code import call, reading
from fxcompress.errors import LoadError

if TYPE_CHECKING:
    from torch import nn

DTYPES = ("float32", "bfloat16", "float16", "float64")
_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def load_model(source: str, device: str | None = None, dtype: str | None = None) -> nn.Module:
    """A Hugging Face model from a directory, or whatever a function returns.

    Args:
        source: what ``--model`` says.
        device, dtype: where it is moved, and to what type; as it is if left out.
    """
    if dtype is not None and dtype not in DTYPES:
        raise typer.BadParameter(f"--dtype {dtype!r} is none of {', '.join(DTYPES)}")
    import torch
    from torch import nn

    if Path(source).is_dir():
        transformers = library()
        with reading(f"a model from {source}"):
            config = transformers.AutoConfig.from_pretrained(source, trust_remote_code=False)
            name = (config.architectures or [None])[0]
            cls = getattr(transformers, name or "", None)
            if cls is None:
                raise LoadError("its config.json names no architecture of transformers")
            made = cls.from_pretrained(source)
            made.eval()
    elif _HUB.fullmatch(source) and not Path(source).parent.is_dir():
        raise typer.BadParameter(
            f"--model {source!r} is neither an existing directory or file nor module:function. If "
            f"it is a name on the Hugging Face Hub: nothing is downloaded here; run 'hf download "
            f"{source} --local-dir {source.rpartition('/')[2]}' and give that directory"
        )
    else:
        made = call(source, "--model")
    if not isinstance(made, nn.Module):
        raise typer.BadParameter(f"{source}() returned {type(made).__name__}, not an nn.Module")
    if device is None and dtype is None:
        return made
    try:
        return made.to(device=device, dtype=None if dtype is None else getattr(torch, dtype))
    except (RuntimeError, AssertionError) as error:  # the latter where torch has no CUDA
        first = str(error).partition("\n")[0]
        raise typer.BadParameter(f"--device {device}: {first}") from error


def library() -> Any:
    """The package transformers, silent about all but errors."""
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise typer.BadParameter("this needs transformers: pip install 'fxcompress[hf]'") from error
    transformers.utils.logging.disable_progress_bar()  # it has its own, terminal or not
    transformers.utils.logging.set_verbosity_error()
    return transformers


def tokenizer_of(model: str) -> Any:
    """The tokenizer beside a Hugging Face model."""
    if not Path(model).is_dir():
        raise typer.BadParameter(
            "a text file needs the tokenizer of a Hugging Face directory: give one as --model, or "
            "batches of tokens by --data file.py:function"
        )
    files = (
        "tokenizer.json",
        "tokenizer_config.json",
        "tokenizer.model",
        "vocab.json",
        "vocab.txt",
    )
    if not any((Path(model) / name).exists() for name in files):
        raise typer.BadParameter(
            f"{model} has no tokenizer, which a text file needs: save it there, "
            f"AutoTokenizer.from_pretrained(...).save_pretrained({model!r}), or give batches of "
            "tokens by --data file.py:function"
        )
    with reading(f"a tokenizer from {model}"):
        return library().AutoTokenizer.from_pretrained(model, trust_remote_code=False)


def copy_tokenizer(model: str, out: Path) -> None:
    """Put the tokenizer of a Hugging Face directory beside the result."""
    if Path(model).is_dir() and (Path(model) / "tokenizer_config.json").exists():
        library().AutoTokenizer.from_pretrained(model).save_pretrained(out)
