"""What the models of a rule file are made of: types of values, and the classes above them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field
from pydantic_core import PydanticCustomError

from fxcompress.graph.operator import AttributeValue


def _freeze(value: Any) -> Any:
    return tuple(_freeze(item) for item in value) if isinstance(value, list | tuple) else value


def _one_or_many(value: Any) -> Any:
    return (value,) if isinstance(value, str) else value


Text = Annotated[str, Field(strict=True)]
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Whole = Annotated[int, Field(strict=True)]
Flag = Annotated[bool, Field(strict=True)]
Count = Annotated[int, Field(strict=True, ge=1)]
Share = Annotated[float, Field(strict=True, ge=0, lt=1, allow_inf_nan=False)]


def _bytes(value: Any) -> Any:
    """Bytes, of a number or of one with a unit."""
    if not isinstance(value, str):
        return value
    found = re.fullmatch(r"\s*([0-9]+(?:\.[0-9]+)?)\s*([KMGT]i?)?B?\s*", value, re.IGNORECASE)
    if found is None:
        raise PydanticCustomError(
            "invalid-bytes", "a number of bytes, with a unit if there is one: 8GiB, 500MB"
        )
    number, unit = found.groups()
    unit = (unit or "").lower()
    base = 1024 if unit.endswith("i") else 1000
    return int(float(number) * base ** " kmgt".index(unit[:1] or " "))


Bytes = Annotated[
    int, BeforeValidator(_bytes, json_schema_input_type=int | str), Field(strict=True, gt=0)
]
Identifier = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Name = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
_OneOrMany = BeforeValidator(_one_or_many, json_schema_input_type=str | list[str])
Globs = Annotated[tuple[Text, ...], _OneOrMany, Field(min_length=1)]
Words = Annotated[tuple[Text, ...], _OneOrMany, Field(min_length=1)]
Reference = Annotated[str, Field(strict=True, pattern=r"^\$[A-Za-z_][A-Za-z0-9_]*$")]
AttributePattern = Annotated[Any, AfterValidator(_freeze)]


class FrozenModel(BaseModel):
    """A mapping with the keys of its fields and no others."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True
    )

    def _has_one_of(self, keys: Sequence[str], owner: str, code: str) -> None:
        given = [f"'{key}'" for key in keys if getattr(self, key) is not None]
        if len(given) != 1:
            words = ", ".join(f"'{key}'" for key in keys[:-1]) + f" and '{keys[-1]}'"
            none, all_ = ("neither", "both") if len(keys) == 2 else ("none of them", "")
            found = (all_ if len(given) == len(keys) else "") or " and ".join(given) or none
            raise PydanticCustomError(code, f"{owner} takes one of {words}; it has {found}")

    def _have_beside_them(self, keys: Sequence[str], other: str) -> None:
        for key in keys:
            if getattr(self, key) is not None and getattr(self, other) is None:
                raise PydanticCustomError("wrong-place", f"'{key}' goes with '{other}' only")


class WithAttributes(BaseModel):
    """A matcher whose further keys are operator attributes."""

    model_config = ConfigDict(
        frozen=True, extra="allow", populate_by_name=True, use_attribute_docstrings=True
    )
    __pydantic_extra__: dict[str, AttributePattern] = Field(init=False)

    @property
    def attributes(self) -> Mapping[str, AttributeValue]:
        """The attributes asked for: ``{"kernel_size": (3, 3)}``."""
        return cast("Mapping[str, AttributeValue]", self.model_extra or {})

    @classmethod
    def keys(cls) -> tuple[str, ...]:
        """The keys of a node pattern that are no attributes."""
        return tuple(field.alias or name for name, field in cls.model_fields.items())
