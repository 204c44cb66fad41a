"""Change one setting in a user's TOML file and keep everything else, including comments."""

from __future__ import annotations

import re

import tomli_w

from crepa_cli.errors import UserError
from crepa_cli.profile.files import parse_toml


def with_value(text: str, label: str, table: str, key: str, value: object) -> str:
    """The text of a TOML file with `key = value` in its `[table]`.

    Args:
        text: the contents of the file.
        label: its name in messages.
        table: is appended to the file if it is missing.
        key: is inserted at the top of the table if it is missing.
        value: the new value: a number, a boolean or a word.

    Raises:
        UserError: if the text is not valid TOML, or does not write the table as `[table]`.
    """
    expected = parse_toml(text, label)
    settings = expected.setdefault(table, {})
    newline = "\r\n" if "\r\n" in text else "\n"
    line = tomli_w.dumps({key: value}).rstrip()
    header = re.search(rf"^[ \t]*\[[ \t]*{table}[ \t]*\][^\r\n]*", text, re.MULTILINE)
    if header is None:
        separator = newline if text.endswith("\n") else 2 * newline
        changed = f"{text}{separator}[{table}]{newline}{line}{newline}"
    else:
        changed = text[: header.end()] + _in_table(text[header.end() :], line, newline)
    if isinstance(settings, dict):
        settings[key] = value
    if not _says(changed, expected):
        raise UserError(
            f"{label}: [{table}] is written in a form that cannot be edited safely; set {line} there by hand"
        )
    return changed


def _in_table(rest: str, line: str, newline: str) -> str:
    """The text after a table's header, with the key of the line changed or added."""
    key, _, value = line.partition(" = ")
    end = re.search(r"^[ \t]*\[", rest, re.MULTILINE)
    body, others = (rest[: end.start()], rest[end.start() :]) if end else (rest, "")
    body, count = re.subn(
        rf"^([ \t]*{key}[ \t]*=[ \t]*)[^\s#]+", lambda found: found[1] + value, body, count=1, flags=re.MULTILINE
    )
    return body + others if count else f"{newline}{line}{body}{others}"


def _says(text: str, expected: dict[str, object]) -> bool:
    try:
        return parse_toml(text, "") == expected
    except UserError:
        return False
