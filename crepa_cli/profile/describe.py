"""Settings in words: allowed values, the known key nearest to a typo, values as users write them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from crepa_cli.profile.settings import LISTED_TABLES, TABLES, Profile
from crepa_cli.profile.table import FAMILY_DEFAULT, NONE_MEANS

PRESET_DESCRIPTION = "Preset that the settings of this file change; --profile replaces it."
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}


def json_schema() -> dict[str, Any]:
    """The JSON schema of `crepa.toml`, for editors. Every key is optional; "none" stands for null."""
    schema = _without_null(Profile.model_json_schema())
    preset = {"type": "string", "title": "Preset", "description": PRESET_DESCRIPTION}
    schema["properties"] = {"preset": preset, **schema["properties"]}
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    return dict(schema)


def _without_null(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_null(item) for item in node]
    if node == {"type": "null"}:
        return {"const": "none"}
    if not isinstance(node, dict):
        return node
    if NONE_MEANS in node:
        node = _or_none(node)
    dropped = {"required"} if isinstance(node.get("required"), list) else set()
    if node.get("default") is None or isinstance(node["default"], dict):
        dropped.add("default")
    return {key: _without_null(value) for key, value in node.items() if key not in dropped}


def _or_none(node: dict[str, Any]) -> dict[str, Any]:
    """The schema of a setting that is resolved later, with "none" as an alternative."""
    notes = {key: node[key] for key in ("title", "description", "examples")}
    value = {key: one for key, one in node.items() if key not in notes and key != NONE_MEANS}
    return {"anyOf": [value, {"type": "null"}], **notes}


@cache
def known_keys() -> Mapping[str, tuple[str, ...]]:
    """The keys of every table, as TOML spells them."""
    return {
        table: tuple(field.alias or name for name, field in model.model_fields.items())
        for table, model in TABLES.items()
    }


@cache
def family_keys() -> frozenset[tuple[str, str]]:
    """Table and key of the settings whose default is the family's."""
    return frozenset(
        (table, key)
        for table, keys in known_keys().items()
        for key in keys
        if _properties(table)[key].get(NONE_MEANS) == FAMILY_DEFAULT
    )


@cache
def examples() -> Mapping[tuple[str, str], object]:
    """A valid value for each setting that is required of a profile but not of its user, by table and key."""
    return {
        (table, key): _properties(table)[key]["examples"][0]
        for table, keys in known_keys().items()
        for key in keys
        if NONE_MEANS in _properties(table)[key]
    }


@cache
def _properties(table: str) -> dict[str, Any]:
    return dict((TABLES | LISTED_TABLES)[table].model_json_schema()["properties"])


def description(table: str, key: str) -> str:
    """The meaning of a setting, in one or two sentences."""
    return str(_properties(table)[key]["description"])


def default_value(table: str, key: str) -> str:
    """The value of a setting that nobody sets: "0.5", "the family's", or "required"."""
    schema = _properties(table)[key]
    if NONE_MEANS in schema:
        return "the family's" if schema[NONE_MEANS] == FAMILY_DEFAULT else str(schema[NONE_MEANS])
    return shown(schema["default"]) if "default" in schema else "required"


def allowed_values(table: str, key: str) -> str:
    """The values that a setting takes, in words: "a number > 0 and <= 1, or none"."""
    schema = _properties(table)[key]
    return _allowed(_or_none(schema) if NONE_MEANS in schema else schema)


def listed_values(table: str, key: str) -> list[str]:
    """The values of a setting that takes one of a list; empty for numbers and free text."""
    return _listed(_properties(table)[key])


def _listed(schema: Mapping[str, Any]) -> list[str]:
    if schema.get("type") == "boolean":
        return ["true", "false"]
    options = [value for option in schema.get("anyOf", ()) for value in _listed(option)]
    return [str(value) for value in schema.get("enum", ())] + options


def _allowed(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        *others, last = (_allowed(option) for option in schema["anyOf"])
        return f"{', '.join(others)}, or {last}"
    if "const" in schema:
        return shown(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if "$ref" in schema:
        return "a table"
    if schema["type"] == "null":
        return "none"
    if schema["type"] == "array":
        return f"a list, each item {_allowed(schema['items'])}"
    if "pattern" in schema:
        return 'a share of the run from "0%" to "100%"'
    bounds = [f"{sign} {schema[bound]}" for bound, sign in _BOUNDS.items() if bound in schema]
    return " ".join([_TYPES[schema["type"]], *([" and ".join(bounds)] if bounds else [])])


def shown(value: object, limit: int | None = 100) -> str:
    """A value in TOML's notation, cut to `limit` characters, if there is a limit; "none" for None."""
    if value is None:
        return "none"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # Python prints no integer of more than 4,300 digits.
        text = f"({type(value).__name__} too large to show)"
    return text if limit is None or len(text) <= limit else text[: limit - 3] + "..."


def unknown_table(table: str) -> str:
    """A message that a table does not exist, with the name that was probably meant."""
    owners = [owner for owner, keys in known_keys().items() if table in keys]
    if owners:
        return f"'{table}' is not a table; it is a key of " + " and of ".join(f"[{owner}]" for owner in owners)
    nearest = difflib.get_close_matches(table, TABLES, n=1, cutoff=0.5)
    hint = f"did you mean [{nearest[0]}]?" if nearest else "the tables are " + ", ".join(TABLES)
    return f"unknown table [{table}]; {hint}"


def unknown_key(table: str, key: str) -> str:
    """A message that a known table has no such key, with the name that was probably meant."""
    nearest = difflib.get_close_matches(key, known_keys()[table], n=1, cutoff=0.6)
    owners = [owner for owner, keys in known_keys().items() if key in keys]
    if nearest or owners:
        hint = f"did you mean {f'{table}.{nearest[0]}' if nearest else f'{owners[0]}.{key}'}?"
    else:
        hint = f"[{table}] has " + ", ".join(known_keys()[table])
    return f"unknown key {table}.{key}; {hint}"
