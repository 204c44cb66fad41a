"""Settings in words: what a key allows, which known key a typo is nearest to, values as people write them."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from crepa_cli.profile.settings import TABLES, Profile

_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPES = {"integer": "a whole number", "number": "a number", "boolean": "true or false", "string": "text"}


def json_schema() -> dict[str, Any]:
    """The JSON schema of `crepa.toml`, for editors. Every key may be left out; "none" stands for null."""
    schema = _without_null(Profile.model_json_schema())
    schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    return dict(schema)


def _without_null(node: Any) -> Any:
    if isinstance(node, list):
        return [_without_null(item) for item in node]
    if node == {"type": "null"}:
        return {"const": "none"}
    if not isinstance(node, dict):
        return node
    dropped = {"required"} if isinstance(node.get("required"), list) else set()
    if node.get("default") is None or isinstance(node["default"], dict):
        dropped.add("default")
    return {key: _without_null(value) for key, value in node.items() if key not in dropped}


@cache
def known_keys() -> Mapping[str, tuple[str, ...]]:
    """The keys of every table, as TOML spells them."""
    return {
        table: tuple(field.alias or name for name, field in model.model_fields.items())
        for table, model in TABLES.items()
    }


@cache
def _properties(table: str) -> dict[str, Any]:
    return dict(TABLES[table].model_json_schema()["properties"])


def description(table: str, key: str) -> str:
    """What a setting means, in one or two sentences."""
    return str(_properties(table)[key]["description"])


def allowed_values(table: str, key: str) -> str:
    """The values that a setting takes, in words: "a number > 0 and <= 1, or none"."""
    return _allowed(_properties(table)[key])


def _allowed(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        *others, last = (_allowed(option) for option in schema["anyOf"])
        return f"{', '.join(others)}, or {last}"
    if "const" in schema:
        return shown(schema["const"])
    if "enum" in schema:
        return "one of " + ", ".join(schema["enum"])
    if schema["type"] == "null":
        return "none"
    if schema["type"] == "array":
        return f"a list, each item {_allowed(schema['items'])}"
    bounds = [f"{sign} {schema[bound]}" for bound, sign in _BOUNDS.items() if bound in schema]
    return " ".join([_TYPES[schema["type"]], *([" and ".join(bounds)] if bounds else [])])


def shown(value: object, limit: int = 100) -> str:
    """A value as TOML would have it, cut to `limit` characters; "none" where there is no value."""
    if value is None:
        return "none"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except (ValueError, RecursionError):  # Python prints no integer of more than 4,300 digits.
        text = f"({type(value).__name__} too large to show)"
    return text if len(text) <= limit else text[: limit - 3] + "..."


def unknown_table(table: str) -> str:
    """Says that a table does not exist, and which one may have been meant."""
    owners = [owner for owner, keys in known_keys().items() if table in keys]
    if owners:
        return f"'{table}' is not a table; it is a key of " + " and of ".join(f"[{owner}]" for owner in owners)
    nearest = difflib.get_close_matches(table, TABLES, n=1, cutoff=0.5)
    hint = f"did you mean [{nearest[0]}]?" if nearest else "the tables are " + ", ".join(TABLES)
    return f"unknown table [{table}]; {hint}"


def unknown_key(table: str, key: str) -> str:
    """Says that a key does not exist in a known table, and which one may have been meant."""
    nearest = difflib.get_close_matches(key, known_keys()[table], n=1, cutoff=0.6)
    owners = [owner for owner, keys in known_keys().items() if key in keys]
    if nearest or owners:
        hint = f"did you mean {f'{table}.{nearest[0]}' if nearest else f'{owners[0]}.{key}'}?"
    else:
        hint = f"[{table}] has " + ", ".join(known_keys()[table])
    return f"unknown key {table}.{key}; {hint}"
