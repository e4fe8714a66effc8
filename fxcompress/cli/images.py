"""Folders of images, by pillow where it is installed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from fxcompress.cli.code import reading
from fxcompress.cli.models import library

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp")


def is_image_folder(path: Path) -> bool:
    """Whether a folder, or one of those in it, has images."""
    return bool(_images(path))


def image_batches(path: Path, model: str, rows: int) -> list[Any]:
    """Images as floats in 0..1 (rows x 3 x height x width), or as a model's processor wants them.

    With a folder for each class they are ``(images, labels)``; classes are in order of the names.

    Args:
        path: the folder.
        model: what ``--model`` says; a Hugging Face directory may have a processor.
        rows: of a batch.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise typer.BadParameter(f"--data {path} has images: pip install pillow") from error
    import torch

    files = _images(path)
    classes = sorted({file.parent for file in files})
    with reading(f"images from {path}"):
        pictures = [Image.open(file).convert("RGB") for file in files]
        if (Path(model) / "preprocessor_config.json").is_file():
            processor = library().AutoImageProcessor.from_pretrained(model)
            stacked = processor(pictures, return_tensors="pt")["pixel_values"]
        else:
            stacked = _stacked(pictures, path)
    labels = torch.tensor([classes.index(file.parent) for file in files])
    starts = range(0, len(files), rows)
    parts = [stacked[at : at + rows] for at in starts]
    classified = [labels[at : at + rows] for at in starts]
    if Path(model).is_dir():
        if len(classes) == 1:
            return [{"pixel_values": part} for part in parts]
        return [
            {"pixel_values": part, "labels": label}
            for part, label in zip(parts, classified, strict=True)
        ]
    return parts if len(classes) == 1 else list(zip(parts, classified, strict=True))


def _images(path: Path) -> list[Path]:
    found = [each for pattern in ("*", "*/*") for each in sorted(path.glob(pattern))]
    return [each for each in found if each.suffix.lower() in SUFFIXES]


def _stacked(pictures: list[Any], path: Path) -> Tensor:
    import numpy as np
    import torch

    sizes = {picture.size for picture in pictures}
    if len(sizes) > 1:
        raise typer.BadParameter(
            f"--data {path}: the images have {len(sizes)} sizes; make them one size, or give "
            "batches by file.py:function"
        )
    arrays = np.stack([np.asarray(picture, dtype=np.float32) / 255 for picture in pictures])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).contiguous()
