"""What every record of a plan has in common: frozen, strict, and fit to be shown."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator

from fxcompress.errors import printable

LARGEST = 2**63 - 1
"""The largest whole number in a plan, either way."""

LARGEST_FLOAT = 1e250
"""The largest other number, so that sums of such are finite."""

Whole = Annotated[int, Field(ge=0)]


class Frozen(BaseModel):
    """A record that any report can show: its texts are printable, its numbers not too large.

    That holds whoever made it; texts that came with control characters have escapes in their
    place (:func:`printable`).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _showable(cls, value: Any) -> Any:
        return showable(value)


def showable(value: Any) -> Any:
    """A value, and all that is in it, with printable texts.

    Raises:
        ValueError: a number is too large.
    """
    if isinstance(value, str):
        return printable(value)
    if isinstance(value, tuple):
        return tuple(map(showable, value))
    if isinstance(value, dict):
        return {showable(key): showable(one) for key, one in value.items()}
    largest = LARGEST_FLOAT if isinstance(value, float) else LARGEST
    if isinstance(value, int | float) and abs(value) > largest:
        raise ValueError("the number is too large")
    return value
