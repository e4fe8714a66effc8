"""Rule files that ship with the package and are used by name.

>>> preset_names()
('convolutional', 'decoder', 'encoder', 'every-linear', 'speech', 'vision-transformer')
"""

from __future__ import annotations

from pathlib import Path

_PACKAGE = Path(__file__).resolve().parents[2]


def preset_directory() -> Path:
    """Where the presets are: inside the installed package, or in the repository's ``rules/``."""
    installed = _PACKAGE / "presets"
    return installed if installed.is_dir() else _PACKAGE.parent / "rules"


def preset_names() -> tuple[str, ...]:
    """The presets that there are, sorted."""
    return tuple(sorted(path.stem for path in preset_directory().glob("*.yaml")))


def preset_path(name: str) -> Path | None:
    """The file of a preset; None if there is no preset of that name."""
    return preset_directory() / f"{name}.yaml" if name in preset_names() else None
