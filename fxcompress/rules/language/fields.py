"""What the models of a rule file are made of: types of values, and the classes above them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field

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
Identifier = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z_][A-Za-z0-9_]*$")]
Name = Annotated[str, Field(strict=True, pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$")]
_OneOrMany = BeforeValidator(_one_or_many, json_schema_input_type=str | list[str])
Globs = Annotated[tuple[Text, ...], _OneOrMany, Field(min_length=1)]
Ops = Annotated[tuple[Text, ...], _OneOrMany, Field(min_length=1)]
Reference = Annotated[str, Field(strict=True, pattern=r"^\$[A-Za-z_][A-Za-z0-9_]*$")]
AttributePattern = Annotated[Any, AfterValidator(_freeze)]


class FrozenModel(BaseModel):
    """A mapping with the keys of its fields and no others."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", populate_by_name=True, use_attribute_docstrings=True
    )


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
