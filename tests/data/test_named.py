"""The registry: every format gives the kinds it says, and its options are checked."""

import dataclasses
import re

import pytest

from shiftrm.data.groups import check_prompt
from shiftrm.data.named import COMMON, FORMATS, KINDS, load, parse_options
from shiftrm.data.pairs import check_pair
from shiftrm.data.sources import HUB_NAME
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from tests.data import public_schemas as made

WRITERS = {
    "hh_rlhf": made.write_hh,
    "summarize": made.write_comparisons,
    "tldr": made.write_posts,
    "sharegpt": made.write_sharegpt,
    "oasst1": made.write_oasst1,
    "pku": made.write_pku,
    "ultrafeedback": made.write_ultrafeedback,
    "preference": made.write_binarized,
}

NEEDED = {"pku": {"preference": "harmless"}}


@pytest.mark.parametrize("name", FORMATS.names())
def test_made_up_files_are_read_whole_as_every_kind(tmp_path, name):
    form = FORMATS.get(name)
    for seed in (0, 1):
        path = WRITERS[name](tmp_path / f"{seed}.json", 12, seed)
        for kind in form.kinds:
            loaded = load(name, path, kind=kind, **NEEDED.get(name, {}))
            unused = {"not_best", "follow_up"} if name == "oasst1" else set()
            assert set(loaded.counts()) <= unused
            assert len(loaded.rows) == len(loaded.places) >= 12
            for row, place in zip(loaded.rows, loaded.places, strict=True):
                assert place.startswith(str(path))
                check_kind(row, kind, place)
            write_jsonl(tmp_path / "out.jsonl", loaded.rows)
            assert read_jsonl(tmp_path / "out.jsonl") == loaded.rows


def check_kind(row, kind, where):
    if kind == "pairs":
        check_pair(row, where)
    columns = set(row) - {"tree"}
    assert (
        columns
        in {
            "pairs": [{"prompt", "chosen", "rejected"}],
            "prompts": [{"prompt"}],
            "demonstrations": [{"prompt", "completion"}, {"messages"}],
        }[kind]
    )
    check_prompt(row, where)
    for column in columns:
        assert row[column], "no empty text"


@pytest.mark.parametrize("name", FORMATS.names())
def test_formats_say_what_they_offer(name):
    form = FORMATS.get(name)
    assert form.about
    assert set(form.kinds) <= set(KINDS)
    assert all(HUB_NAME.fullmatch(hub.partition(":")[0]) for hub in form.hub)
    for field in dataclasses.fields(form.options):
        assert field.metadata["help"]
    assert list(form.option_help())[-2:] == list(COMMON) or "seed" in form.option_help()


def test_unknown_names_are_refused_with_a_suggestion(tmp_path):
    path = made.write_hh(tmp_path / "x.jsonl", 3)
    for options, message in (
        ({"format": "hh-rlhf"}, "unknown format 'hh-rlhf'; did you mean 'hh_rlhf'?"),
        ({"kind": "pair"}, "hh_rlhf: gives no 'pair'; it gives pairs, prompts, demonstrations"),
        ({"respones": "x"}, "hh_rlhf: unknown setting 'respones'; did you mean 'responses'?"),
        ({"responses": 3}, "hh_rlhf: responses is 3; expected text"),
        ({"responses": "two"}, "hh_rlhf: responses is 'two'; give 'any' or 'single'"),
        ({"limit": "3"}, "hh_rlhf: limit is '3'; expected a whole number"),
        ({"limit": 0}, "limit is 0; it must be at least 1"),
    ):
        given = {"format": "hh_rlhf", "kind": "pairs", **options}
        with pytest.raises(UserError, match=re.escape(message)):
            load(given.pop("format"), path, **given)


def test_limit_and_seed(tmp_path):
    path = made.write_hh(tmp_path / "x.jsonl", 30)
    loaded = load("hh_rlhf", path, kind="pairs", limit=5)
    assert (len(loaded.rows), loaded.counts()) == (5, {"over_limit": 25})
    assert load("hh_rlhf", path, kind="pairs", limit=5, seed=1).rows != loaded.rows


def test_duplicates_are_counted_and_an_empty_result_is_refused(tmp_path):
    rows = made.hh_rows(3)
    path = made.write_rows(tmp_path / "x.jsonl", [*rows, rows[1]])
    loaded = load("hh_rlhf", path, kind="pairs")
    assert loaded.dropped == [{"where": f"{path}:4", "reason": "duplicate"}]
    made.write_rows(path, [made.hh_row("a", chosen="b", rejected="b")] * 2)
    with pytest.raises(UserError, match=r"no row is left as pairs of hh_rlhf \(2 equal_sides\)"):
        load("hh_rlhf", path, kind="pairs")
    path.write_text("")
    with pytest.raises(UserError, match=r"no row is left as pairs of hh_rlhf \(there are none\)"):
        load("hh_rlhf", path, kind="pairs")


def test_rows_kept_and_rows_dropped_are_the_rows_read(tmp_path):
    rows = made.hh_rows(20)
    for number, row in enumerate(rows):
        if number % 4 == 0:
            row["chosen"] = row["rejected"]
        if number % 7 == 1:
            row["rejected"] = row["rejected"].replace("\n\nHuman: ", "")
    path = made.write_rows(tmp_path / "x.jsonl", rows)
    loaded = load("hh_rlhf", path, kind="pairs")
    places = [*loaded.places, *(row["where"] for row in loaded.dropped)]
    assert sorted(places) == sorted(f"{path}:{number}" for number in range(1, 21))
    assert sum(loaded.counts().values()) == len(loaded.dropped)


def test_words_become_options_of_their_type():
    words = ["lang=no", "pairs=extremes", "limit=3", "seed=2"]
    # `no` is Norwegian, where YAML would read false.
    expected = {"lang": "no", "pairs": "extremes", "limit": 3, "seed": 2}
    assert parse_options("oasst1", words) == expected
    for word, message in (
        ("limit=many", "oasst1: limit is 'many'; expected a whole number"),
        ("langs=en", "oasst1: no option 'langs'; did you mean 'lang'?"),
        ("en", "'en' is not an option; write name=value"),
    ):
        with pytest.raises(UserError, match=re.escape(message)):
            parse_options("oasst1", [word])


MADE_UP = dataclasses.replace(
    FORMATS.get("hh_rlhf"),
    rows=lambda *_: ((str(i), {"prompt": str(i)}) for i in range(600)),
    mappers={"prompts": lambda row, where, options: row},
)


def test_progress_is_told():
    told = []
    load("tests.data.test_named:MADE_UP", "x", kind="prompts", progress=told.append)
    assert told == [256, 512]


def test_a_recipe_reads_a_format_by_import_path():
    from shiftrm.pipeline.data_sets import place_of, read_source

    spec = {"format": "tests.data.test_named:MADE_UP", "source": None, "split": None}
    assert place_of(spec) == "Anthropic/hh-rlhf"
    assert len(read_source(spec | {"source": "x", "options": {"limit": 3}}, "prompts").rows) == 3
