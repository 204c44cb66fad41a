"""Building blocks of the settings: the base class of all tables, types of text, fields that the family decides."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

NONE_MEANS = "none_means"
"""Key of a field's schema extras: what replaces "none" when the settings are resolved."""
FAMILY_DEFAULT = "family's default"
SAME_AS_RANK = "same as rank"


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


# TOML gives lists, but a frozen model wants tuples, and `--set` gives one bare string.
LISTED = BeforeValidator(_listed)
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[tuple[Text, ...], LISTED, Field(strict=False)]


class Table(BaseModel):
    """Base of all tables: strict types, no unknown keys, no changes, and "none" for the absence of a value."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, serialize_by_alias=True)

    @model_validator(mode="before")
    @classmethod
    def _none_by_name(cls, values: Any) -> Any:
        """TOML has no null: "none" unsets an optional value that a lower layer has set."""
        if not isinstance(values, dict):
            return values
        optional = {
            field.alias or name
            for name, field in cls.model_fields.items()
            if not field.is_required() and field.default is None
        }
        return {key: None if value == "none" and key in optional else value for key, value in values.items()}


def resolved_later(none_means: str, *, example: object, description: str, **bounds: Any) -> Any:
    """A required field that every resolved profile has, though a user may leave it out or set it to "none".

    Args:
        none_means: `FAMILY_DEFAULT` or `SAME_AS_RANK`.
        example: a valid value. It also stands in for the value while settings are checked without a family.
        description: without what "none" means, which is appended.
        bounds: arguments of pydantic's `Field`.
    """
    article = "the " if none_means == FAMILY_DEFAULT else ""
    return Field(
        description=f"{description} none: {article}{none_means}.",
        examples=[example],
        json_schema_extra={NONE_MEANS: none_means},
        **bounds,
    )


def broken_rule(message: str, *keys: str) -> PydanticCustomError:
    """The error of a rule that relates several keys; the first is the one to report, "table." left out."""
    return PydanticCustomError("rule", "{message}", {"message": message, "keys": keys})
