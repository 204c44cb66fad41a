"""Options of another trainer's configuration: reading their values, and what was found in them."""

from __future__ import annotations

import difflib
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from pydantic import TypeAdapter, ValidationError

Options = dict[str, Any]
"""Values by option, without dashes. What is understood is taken out."""


class Found(NamedTuple):
    """An option, the setting it stands for, and the value of that setting."""

    option: str
    setting: str
    value: object


@dataclass
class Findings:
    """The result of reading a configuration.

    Attributes:
        settings: in our terms.
        notes: for the user, on values that stand for others here.
        refused: why it cannot be imported: what has no counterpart here and would train another run.
    """

    settings: list[Found] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def coerced(type_: Any, value: object) -> Any:
    """The value converted to a type if possible, such as "1e-4" to a number; otherwise as it is."""
    try:
        return TypeAdapter(type_).validate_python(value)
    except ValidationError:
        return value


def taken_flag(options: Options, option: str) -> bool | None:
    """Remove a boolean option and return it; None, without removing it, if it is not boolean."""
    flag = coerced(bool, options.get(option))
    if not isinstance(flag, bool):
        return None
    del options[option]
    return flag


def number(options: Options, option: str, default: float) -> float:
    """A numeric option; its default if it is unset or no number, which the check of all settings reports."""
    value = coerced(float, options.get(option))
    return value if isinstance(value, float) and math.isfinite(value) else default


def unset(value: object) -> bool:
    """Whether a value stands for the absence of one."""
    return value is None or value == ""


def word(value: object) -> str:
    """Text or a boolean in lower case; empty for anything else."""
    return str(value).lower() if isinstance(value, (str, bool)) else ""


def meant(name: str, known: Collection[str]) -> str:
    """The known names, and which of them a wrong one probably stands for."""
    nearest = difflib.get_close_matches(name, known, n=1)
    hint = f"; did you mean {nearest[0]}?" if nearest else ""
    return f"must be one of {', '.join(known)}{hint}"
