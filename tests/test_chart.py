"""Charts of characters, against the dots that they must have."""

from __future__ import annotations

import math

import pytest
from rich.text import Text

from crepa_cli.report.chart import (
    BLOCKS,
    BRAILLE,
    PLAIN,
    Line,
    Signs,
    beside,
    draw_bar,
    draw_chart,
    fitting,
    level,
    packed,
    signs_for,
    spread,
    widths,
)


def dots(rows: list[str], signs: Signs) -> set[tuple[int, int]]:
    """The dots of a drawing, as column and row."""
    across, down = signs.dots
    return {
        (x * across + column, y * down + row)
        for y, text in enumerate(rows)
        for x, cell in enumerate(text)
        for row, bits in enumerate(signs.bits)
        for column, bit in enumerate(bits)
        if signs.cells.index(cell) & bit
    }


def plot(line: Line, signs: Signs, width: int = 20, height: int = 6) -> set[tuple[int, int]]:
    """The dots of a chart of one line between 0 and 1, whose values take 2 columns at the left."""
    rows = draw_chart([line], width + 2, height + 1, signs, steps=(0, 9))[:-1]
    return dots([row.plain[2:] for row in rows], signs)


@pytest.mark.parametrize("signs", [BRAILLE, BLOCKS, PLAIN])
def test_a_line_reaches_both_edges_without_a_gap(signs: Signs) -> None:
    values = [0.0, 1.0, *(0.5 + 0.4 * math.sin(step) for step in range(5)), 1.0]
    drawn = plot(Line(spread(values)), signs)
    columns, rows = 20 * signs.dots[0], 6 * signs.dots[1]
    assert {column for column, _ in drawn} == set(range(columns))
    assert {row for _, row in drawn} == set(range(rows))
    start = (0, rows - 1)
    reached, waiting = {start}, [start]
    while waiting:
        x, y = waiting.pop()
        near = {(x + dx, y + dy) for dx in (-1, 0, 1) for dy in (-1, 0, 1)} & drawn - reached
        reached |= near
        waiting += near
    assert reached == drawn


def test_each_value_lies_at_its_height_and_a_gap_stays_empty() -> None:
    drawn = plot(Line(spread([0.0, 0.25, None, 0.75, 1.0])), BRAILLE)
    assert {(0, 23), (10, 17), (29, 6), (39, 0)} <= drawn
    assert not [column for column, _ in drawn if 10 < column < 29]


def test_values_and_steps_stand_beside_a_chart() -> None:
    rows = [
        row.plain
        for row in draw_chart([Line(spread([-1.5, 0.25])), level(-0.5)], 20, 5, PLAIN, steps=(0, 1234), named=-0.5)
    ]
    assert [row[:5] for row in rows] == ["0.25 ", "-0.5 ", "     ", "-1.5 ", "     "]
    assert rows[-1] == "     0         1,234"
    assert {len(row) for row in rows} == {20}


def test_a_single_value_is_a_line_all_the_way_and_its_step_stands_at_the_right() -> None:
    rows = [row.plain for row in draw_chart([Line(spread([0.5]))], 12, 4, PLAIN, steps=(0, 0))]
    assert [row.strip() for row in rows] == ["", "0.5 ''''''''", "", "0"]
    assert rows[-1] == "           0"


def test_an_encoding_gets_the_finest_signs_it_has() -> None:
    assert signs_for("utf-8") is BRAILLE
    assert signs_for("cp437") is BLOCKS
    assert signs_for("ascii") is signs_for("cp1252") is signs_for("unknown") is PLAIN
    for signs, encoding in ((BRAILLE, "utf-8"), (BLOCKS, "cp437"), (PLAIN, "ascii")):
        drawing = "".join(
            row.plain for row in draw_chart([Line(spread([0, 1, 0]))], 30, 8, signs, steps=(0, 2), mark=0.5)
        )
        (drawing + draw_bar(0.5, 10, signs)).encode(encoding)


def test_a_bar_is_filled_by_its_share() -> None:
    assert [draw_bar(share, 4, PLAIN) for share in (-1.0, 0.0, 0.5, 2.0)] == ["----", "----", "==--", "===="]


def test_blocks_of_lines_stand_beside_each_other_in_the_whole_width() -> None:
    assert widths(76, 3) == [24, 25, 25]
    rows = beside([([Text("a"), Text("b")], 3), ([Text("long text")], 4)])
    assert [row.plain for row in rows] == ["a   long", "b       "]


def test_parts_are_kept_whole_or_left_out() -> None:
    assert packed(["12345", "1234567890", "1234", "123"], 12, 2) == ["12345   1234", "1234567890"]
    assert packed(["too long"], 5, 1) == []
    assert fitting(4, "12345", "1234", "1") == "1234"
