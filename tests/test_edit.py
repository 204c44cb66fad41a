"""Changing one number in a TOML file written by a user."""

from __future__ import annotations

import pytest

from crepa_cli.errors import UserError
from crepa_cli.profile.edit import with_value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "\n\n[crepa]\nblock_index = 5\n"),
        ("[train]\nsteps = 3\n", "[train]\nsteps = 3\n\n[crepa]\nblock_index = 5\n"),
        ("[crepa]", "[crepa]\nblock_index = 5"),
        ("[crepa] # mine\nlambda = 0.3\n", "[crepa] # mine\nblock_index = 5\nlambda = 0.3\n"),
        ("[crepa]\r\nlambda = 0.3\r\n", "[crepa]\r\nblock_index = 5\r\nlambda = 0.3\r\n"),
        ("[crepa]\n  block_index=12# x\n", "[crepa]\n  block_index=5# x\n"),
        ('[crepa]\nblock_index = "none"\n[data]\nfps = 8\n', "[crepa]\nblock_index = 5\n[data]\nfps = 8\n"),
        ("[crepa]\nlambda = 1\n[x]\nblock_index = 1\n", "[crepa]\nblock_index = 5\nlambda = 1\n[x]\nblock_index = 1\n"),
    ],
)
def test_one_number_changes_and_all_else_stays(text: str, expected: str) -> None:
    assert with_value(text, "crepa.toml", "crepa", "block_index", 5) == expected


@pytest.mark.parametrize(
    "text", ["crepa = { lambda = 0.3 }\n", "crepa.lambda = 0.3\n", 'a = """\n[crepa]\n"""\n', "crepa = 3\n"]
)
def test_a_file_that_cannot_be_changed_safely(text: str) -> None:
    with pytest.raises(UserError, match="set block_index = 5 there by hand"):
        with_value(text, "crepa.toml", "crepa", "block_index", 5)
