"""Numbers that a page's prose takes from its generated tables are still in those tables.

A table is written anew when results are added, and prose beside it that quotes it is not.
"""

import re

import pytest

from tests.docs.test_build import ROOT

NUMBER = re.compile(r"(?<![\w.,/-])[+-]?\d+\.\d{2,3}(?!\d|\.\d)")
_VALUE = r"([+-]?\d+\.\d+)"
INTERVAL = re.compile(
    rf"{_VALUE}(?:\s+\({_VALUE}(?:,|\s+to)\s+{_VALUE}\)|,\s+{_VALUE}\s+to\s+{_VALUE})"
)
"""Mean, low and high in "+0.61 (-0.01, +1.23)", also with "to", or without the bracket."""

BLOCK = re.compile(r"<!-- ([\w-]+):begin -->\n(.*?)<!-- \1:end -->", re.DOTALL)


def stray_numbers(text, tables):
    """Return the numbers of two or three decimals, and the intervals, that no table holds."""
    prose, known = BLOCK.sub("", text), set(NUMBER.findall(tables))
    numbers = [number for number in NUMBER.findall(prose) if number not in known]
    intervals = intervals_of(tables)
    return numbers + [" ".join(found) for found in intervals_of(prose) if found not in intervals]


def intervals_of(text):
    return [tuple(n.lstrip("+") for n in found if n) for found in INTERVAL.findall(text)]


@pytest.mark.parametrize(
    ("page", "section"),
    [("methods", ""), ("monitor", ""), ("oodpl", "## The study")],
)
def test_the_prose_quotes_the_tables(page, section):
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    tables = "\n".join(found.group(2) for found in BLOCK.finditer(text))
    if section:
        _, found, text = text.partition(f"\n{section}\n")
        assert found
        text = re.split(r"\n## ", text)[0]
    assert stray_numbers(text, tables) == []


def test_a_number_that_has_moved_is_found():
    table = (
        "<!-- t:begin -->\n| a | 1.29 (+0.84, -1.75) |\n| b | 0.84 (+1.29, +0.01) |\n<!-- t:end -->"
    )
    prose = "It gains 1.29 (+0.84\nto -1.75), and 0.50 alone; arXiv 2402.00742, torch 2.13.0.\n"
    assert stray_numbers(prose + table, table) == ["0.50"]
    assert stray_numbers("1.29 and 2.00" + table, table.replace("1.29", "1.3")) == ["1.29", "2.00"]
    # Each number is somewhere in the table, the interval is not.
    assert stray_numbers("It is 0.84,\n+0.84 to -1.75." + table, table) == ["0.84 0.84 -1.75"]
