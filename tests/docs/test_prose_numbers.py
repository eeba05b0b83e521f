"""Numbers that a page's prose takes from its generated tables are still in those tables.

A table is written anew when results are added, and prose beside it that quotes it is not.
"""

import re

import pytest

from tests.docs.test_build import ROOT

NUMBER = re.compile(r"(?<![\w.,/-])[+-]?\d+\.\d{2,3}(?!\d|\.\d)")
BLOCK = re.compile(r"<!-- ([\w-]+):begin -->\n(.*?)<!-- \1:end -->", re.DOTALL)


def stray_numbers(text, tables):
    """Return the numbers of two or three decimals in the prose that no table holds."""
    known = set(NUMBER.findall(tables))
    return [number for number in NUMBER.findall(BLOCK.sub("", text)) if number not in known]


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
    table = "<!-- t:begin -->\n| a | 1.29 (+0.84, -1.75) |\n<!-- t:end -->"
    prose = "It gains 1.29 (+0.84 to -1.75), and 0.50 alone; arXiv 2402.00742, torch 2.13.0.\n"
    assert stray_numbers(prose + table, table) == ["0.50"]
    assert stray_numbers("1.29, 2.00" + table, table.replace("1.29", "1.30")) == ["1.29", "2.00"]
