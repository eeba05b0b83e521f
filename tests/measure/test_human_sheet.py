"""Blind sheets: what is drawn, what is shown, and that neither says whose response is whose."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shiftrm.errors import UserError
from shiftrm.measure.judges.comparing import Comparison
from shiftrm.measure.people.blinding import (
    Placement,
    distinct,
    make_sheet,
    pair_id,
    place,
    shown_turns,
)
from shiftrm.measure.people.key_files import COLUMNS, key_text, read_key, sheet_csv
from shiftrm.report.sheet import sheet_page

PAIRS = [Comparison(f"prompt {i}", f"left {i}", f"right {i}") for i in range(7)]


def swapped(pairs):
    return [Comparison(p.prompt, p.theirs, p.ours) for p in pairs]


def other_side(placements):
    return [Placement(p.pair, "B" if p.ours == "A" else "A") for p in placements]


# -- Drawing ---------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 2**32))
def test_sides_are_balanced_and_every_second_rater_sees_them_the_other_way_round(n, raters, seed):
    sheets = place(n, raters=raters, seed=seed)
    assert len(sheets) == raters
    for sheet in sheets:
        assert sorted(p.pair for p in sheet) == list(range(n))
        first = sum(p.ours == "A" for p in sheet)
        assert abs(first - (n - first)) <= 1
    for one, two in zip(sheets[::2], sheets[1::2], strict=False):
        assert {p.pair: p.ours for p in one} == {p.pair: p.ours for p in other_side(two)}


def test_sides_do_not_follow_the_place_in_the_file_or_on_the_sheet():
    """Over 2,000 seeds, ours is A for half of all draws at every place: 5 standard errors."""
    by_pair, by_place = [0] * 6, [0] * 6
    for seed in range(2000):
        [sheet] = place(6, raters=1, seed=seed)
        for at, p in enumerate(sheet):
            by_pair[p.pair] += p.ours == "A"
            by_place[at] += p.ours == "A"
    assert all(abs(count - 1000) < 5 * 2000**0.5 / 2 for count in by_pair + by_place)


def test_the_same_pair_is_asked_once():
    again = Comparison("prompt 3", "left 3", "right 3")
    assert distinct([*PAIRS, again]) == PAIRS
    others = [Comparison("prompt 3", "left 3", "x"), Comparison("prompt 3", "right 3", "left 3")]
    assert distinct([*PAIRS, *others]) == [*PAIRS, *others]


# -- Blindness -------------------------------------------------------------------------------


def test_the_same_texts_at_the_same_places_are_the_same_bytes_whoever_wrote_them():
    """Ours and theirs exchanged, and the sides as well: nothing of the sheet may change."""
    for placements in place(7, raters=3, seed=1):
        sheet = make_sheet(PAIRS, placements, rater=1)
        mirrored = make_sheet(swapped(PAIRS), other_side(placements), rater=1)
        assert sheet_page(sheet) == sheet_page(mirrored)
        assert sheet_csv(sheet) == sheet_csv(mirrored)


def test_exchanging_the_files_exchanges_a_and_b_and_nothing_else():
    """Same seed, files swapped: every item shows the same two texts, at the other places."""
    [placements] = place(7, raters=1, seed=3)
    sheet = make_sheet(PAIRS, placements, rater=1)
    other = make_sheet(swapped(PAIRS), placements, rater=1)
    assert [(i.turns, i.b, i.a) for i in sheet.items] == [(i.turns, i.a, i.b) for i in other.items]
    page, other_page = sheet_page(sheet), sheet_page(other)
    for item in sheet.items:
        both = [json.dumps(item.a), json.dumps(item.b)]
        assert all(page.count(text) == other_page.count(text) == 1 for text in both)
    assert len(page) == len(other_page)


def test_space_at_the_ends_does_not_tell_samplers_apart():
    plain = make_sheet([Comparison("p", "x", "y")], [Placement(0, "A")], rater=1)
    assert plain == make_sheet([Comparison(" p\n", " x", "y\n\n")], [Placement(0, "A")], rater=1)


def test_the_ids_of_sheets():
    """Nothing that a spreadsheet takes for a number, and another for every rater."""
    ids = [make_sheet(PAIRS[:1], [Placement(0, "A")], rater=rater).id for rater in range(1, 50)]
    assert len(set(ids)) == 49
    assert all(name.startswith("s") and len(name) == 13 for name in ids)


# -- What is shown ---------------------------------------------------------------------------


def test_turns_of_a_chat():
    chat = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image"}]},
        {"role": "assistant", "tool_calls": [{"name": "add"}]},
    ]
    assert shown_turns(chat) == (
        ("system", "Be brief."),
        ("user", 'What?\n{"type": "image"}'),
        ("assistant", '[{"name": "add"}]'),
    )
    assert shown_turns("a\r\nb\rc") == (("", "a\nb\nc"),)
    assert shown_turns("a\x00b\ud800\x1bc\td") == (("", "a\ufffdb\ufffd\ufffdc\td"),)


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "＝", "＋", "－", "＠"])  # noqa: RUF001
def test_no_cell_is_a_formula(start):
    pair = Comparison(f"{start}1+1", f'{start}HYPERLINK("x")', f'a{start}b, "c"\n{start}d')
    text = sheet_csv(make_sheet([pair], [Placement(0, "A")], rater=1))
    assert text.startswith("\ufeff")
    header, row = csv.reader(io.StringIO(text.removeprefix("\ufeff"), newline=""))
    assert tuple(header) == COLUMNS
    assert row[2:5] == [f"'{start}1+1", f'\'{start}HYPERLINK("x")', pair.theirs]
    assert not any(cell.startswith(start) for cell in row)


def test_chats_in_cells():
    chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}]
    text = sheet_csv(make_sheet([Comparison(chat, "a", "b")], [Placement(0, "B")], rater=1))
    [_, row] = csv.reader(io.StringIO(text, newline=""))
    assert row[2:5] == ["user: Hi\n\nassistant: Yes?", "b", "a"]


# -- Files -----------------------------------------------------------------------------------


def test_the_key_reads_back(tmp_path):
    placements = place(7, raters=2, seed=0)
    sheets = [make_sheet(PAIRS, placed, rater=r) for r, placed in enumerate(placements)]
    path = tmp_path / "key.json"
    path.write_text(key_text(PAIRS, sheets, placements, settings={"seed": 0}))
    key = read_key(path)
    assert list(key.pairs.values()) == PAIRS
    assert list(key.pairs) == [pair_id(pair) for pair in PAIRS]
    for sheet, placed in zip(sheets, placements, strict=True):
        for item, (name, ours) in zip(sheet.items, key.sheets[sheet.id], strict=True):
            assert (item.a if ours == "A" else item.b) == key.pairs[name].ours
            assert item.turns == (("", key.pairs[name].prompt),)
        assert [ours for _, ours in key.sheets[sheet.id]] == [p.ours for p in placed]


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": 2}', "7", '{"format": 1, "pairs"'])
def test_what_is_no_key(tmp_path, text):
    (tmp_path / "key.json").write_text(text)
    with pytest.raises(UserError, match="is not the key of a sheet"):
        read_key(tmp_path / "key.json")
