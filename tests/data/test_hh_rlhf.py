"""HH-RLHF's transcripts, with the quirks of the public files, as pairs, prompts, demonstrations."""

import gzip
import json

import datasets
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shiftrm.data.formats.hh_rlhf import (
    MARKER,
    hh_pair,
    join_turns,
    parse_transcript,
    transcript_messages,
)
from shiftrm.data.named import load
from shiftrm.errors import UserError
from shiftrm.models.rendering import encode
from tests.data.public_schemas import (
    assistant,
    hh_row,
    transcript,
    user,
    write_hh,
    write_hh_folder,
    write_rows,
)


def pair(chosen, rejected, **options):
    return hh_pair({"chosen": chosen, "rejected": rejected}, "f:1", **options)


# -- the parser ------------------------------------------------------------------------------

ODD = ("é", "👩‍🍳", "\u200f", "\u2028")
PIECES = st.sampled_from(
    ["\n", "\n\n", "\r\n", "Human:", "Assistant:", " ", "a", "\n\nHuman: ", *ODD]
)
TRANSCRIPTS = st.lists(PIECES, max_size=12).map("".join) | st.text(max_size=60)


@given(TRANSCRIPTS)
@settings(max_examples=150, deadline=None)
def test_joining_the_turns_gives_any_text_back(text):
    turns = parse_transcript(text)
    assert join_turns(turns) == text
    assert all(turn.speaker in ("Human", "Assistant") for turn in turns[1:])


@given(st.lists(st.text(max_size=30), min_size=1, max_size=6))
@settings(max_examples=200, deadline=None)
def test_what_is_written_as_turns_is_read_as_those_turns(texts):
    # A text that holds a marker is several turns; a CR at its end belongs to the next marker.
    texts = [t for t in texts if not MARKER.search(f"x{t}") and not t.endswith("\r")] or ["a"]
    written = transcript(*texts)
    turns = parse_transcript(written)
    assert [turn.text for turn in turns] == texts
    assert [turn.speaker for turn in turns] == [
        ("Human", "Assistant")[i % 2] for i in range(len(texts))
    ]
    assert {turn.marker for turn in turns} <= {"\n\nHuman: ", "\n\nAssistant: "}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("\n\nHuman: a\n\nAssistant: b", [user("a"), assistant("b")]),
        # Without the blank line at the start, as some mirrors are; with CRLF.
        ("Human: a\n\nAssistant: b", [user("a"), assistant("b")]),
        ("\r\n\r\nHuman: a\r\n\r\nAssistant: b\r\n", [user("a"), assistant("b")]),
        # White space at the ends goes, inside it stays.
        ("\n\nHuman:  a \n\n\nAssistant: b\n\n  c \t\n", [user("a"), assistant("b\n\n  c")]),
        # No markers: in quotation marks, without the blank line, in the middle of a line, no space.
        (
            '\n\nHuman: say "\n\nHuman:" now\nHuman: x Assistant: y\n\nHuman:z\n\nAssistant: b',
            [user('say "\n\nHuman:" now\nHuman: x Assistant: y\n\nHuman:z'), assistant("b")],
        ),
        # Two turns of one speaker are one message; an empty one among them leaves nothing.
        ("\n\nHuman: a\n\nHuman: b\n\nAssistant: c", [user("a\n\nb"), assistant("c")]),
        ("\n\nHuman: a\n\nAssistant:\n\nAssistant: c", [user("a"), assistant("c")]),
        # Nothing but the marker at the end.
        ("\n\nHuman: a\n\nAssistant:", [user("a"), assistant("")]),
        ("\n\nHuman: a\n\nAssistant: ", [user("a"), assistant("")]),
        ("\n\nAssistant: a\n\nHuman: b\n\nAssistant: c", "begins_with_assistant"),
        ("\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "ends_with_human"),
        ("\n\nHuman: a", "ends_with_human"),
        ("\n\nHuman: a\n\nAssistant: \n\nHuman: b\n\nAssistant: c", "empty_turn"),
        ("\n\nHuman:\n\nAssistant: c", "empty_turn"),
        ("Hello\n\nHuman: a\n\nAssistant: b", "no_transcript"),
        ("Hello", "no_transcript"),
        ("", "no_transcript"),
        ("\n\n", "no_transcript"),
    ],
)
def test_transcripts_as_messages(text, expected):
    assert transcript_messages(text) == expected


# -- pairs -----------------------------------------------------------------------------------


def test_the_prompt_ends_at_the_last_shared_assistant():
    row = hh_row("a", "b", "c", chosen="good", rejected="bad")
    assert hh_pair(row, "f:1") == {
        "prompt": [user("a"), assistant("b"), user("c")],
        "chosen": [assistant("good")],
        "rejected": [assistant("bad")],
    }


def test_one_response_is_the_beginning_of_the_other():
    for chosen, rejected in (("Yes", "Yes, but no"), ("Yes, but no", "Yes")):
        row = hh_pair(hh_row("a", chosen=chosen, rejected=rejected), "f:1")
        assert (row["chosen"], row["rejected"]) == ([assistant(chosen)], [assistant(rejected)])
        assert row["prompt"] == [user("a")]


def test_one_transcript_is_the_beginning_of_the_other():
    short, long = transcript("a", "b"), transcript("a", "b", "c", "d")
    assert pair(long, short) == {
        "prompt": [user("a")],
        "chosen": [assistant("b"), user("c"), assistant("d")],
        "rejected": [assistant("b")],
    }
    assert pair(short, long)["chosen"] == [assistant("b")]
    assert pair(long, short, responses="single") == "several_turns"


def test_sides_that_part_at_an_early_human_turn():
    """They are other dialogues from there; the last shared "Assistant:" is the turn before."""
    row = pair(transcript("a", "b", "c", "d"), transcript("a", "b", "x", "y"))
    assert row["prompt"] == [user("a")]
    assert row["chosen"] == [assistant("b"), user("c"), assistant("d")]
    assert row["rejected"] == [assistant("b"), user("x"), assistant("y")]
    assert pair(transcript("a", "d"), transcript("x", "y")) == "no_shared_prompt"


def test_sides_of_several_messages_are_rendered_as_the_whole_dialogue(tokenizer):
    row = pair(
        transcript("the cat", "a dog", "red", "the"), transcript("the cat", "a dog", "x", "y")
    )
    assert len(row["chosen"]) == 3
    whole = encode(tokenizer, None, row["prompt"] + row["chosen"])
    assert encode(tokenizer, row["prompt"], row["chosen"]) == whole


def test_sides_that_part_at_an_early_assistant_turn():
    row = pair(transcript("a", "b", "c", "d"), transcript("a", "x", "c", "d"))
    assert row["prompt"] == [user("a")]
    assert row["rejected"] == [assistant("x"), user("c"), assistant("d")]


@given(
    st.lists(st.sampled_from("ab"), min_size=1, max_size=7),
    st.lists(st.sampled_from("ab"), min_size=1, max_size=7),
)
@settings(max_examples=200, deadline=None)
def test_prompt_and_sides_together_are_the_transcripts(chosen, rejected):
    sides = [transcript(*turns) for turns in (chosen, rejected)]
    row = pair(*sides)
    if isinstance(row, str):
        return
    for name, text in zip(("chosen", "rejected"), sides, strict=True):
        assert row["prompt"] + row[name] == transcript_messages(text)
        assert row[name][0]["role"] == "assistant"
    # The prompt is the longest there is: the next assistant's message is not shared, too.
    assert row["chosen"][0] != row["rejected"][0] or row["chosen"][1:2] != row["rejected"][1:2]


@pytest.mark.parametrize(
    ("chosen", "rejected", "reason"),
    [
        (transcript("a", "b"), transcript("a", "b"), "equal_sides"),
        (transcript("a", "b"), transcript("a", "b \n"), "equal_sides"),
        (transcript("a", ""), transcript("a", "b"), "empty_response"),
        (transcript("a", "b"), "\n\nHuman: a\n\nAssistant:", "empty_response"),
        (transcript("a", "b"), transcript("a"), "ends_with_human"),
        (transcript("a", "b"), "", "no_transcript"),
    ],
)
def test_dropped_pairs_have_a_reason(chosen, rejected, reason):
    assert pair(chosen, rejected) == reason


def test_every_script_stays_byte_for_byte():
    hebrew, arabic, emoji = "\u200fלמה הלחם תופח?\u200e", "خميرة\u061c", "👩‍🍳 \ufe0f🍞\u3000"
    row = hh_pair(hh_row(hebrew, chosen=arabic, rejected=emoji), "f:1")
    assert row["prompt"] == [user(hebrew)]
    assert row["chosen"] == [assistant(arabic)]
    assert row["rejected"] == [assistant(emoji)]


def test_wrong_rows_are_named():
    with pytest.raises(UserError, match="f:1: column 'rejected' is missing; the row has 'chosen'"):
        hh_pair({"chosen": transcript("a", "b")}, "f:1")
    with pytest.raises(UserError, match=r"f:1: column 'chosen' is \['a'\]; expected text"):
        pair(["a"], "b")


# -- files -----------------------------------------------------------------------------------


def test_files_folders_and_kinds(tmp_path):
    plain, packed = write_hh(tmp_path / "x.jsonl", 6), write_hh(tmp_path / "x.jsonl.gz", 6)
    loaded = load("hh_rlhf", plain, kind="pairs")
    assert loaded.rows == load("hh_rlhf", packed, kind="pairs").rows
    assert (len(loaded.rows), loaded.dropped) == (6, [])
    assert loaded.places[2] == f"{plain}:3"
    demonstrations = load("hh_rlhf", plain, kind="demonstrations").rows
    prompts = load("hh_rlhf", plain, kind="prompts").rows
    for row, demonstration, prompt in zip(loaded.rows, demonstrations, prompts, strict=True):
        assert demonstration == {"prompt": row["prompt"], "completion": row["chosen"]}
        assert prompt == {"prompt": row["prompt"]}


def test_subsets_are_folders(tmp_path):
    folder = write_hh_folder(tmp_path / "hh", 10)

    def count(**options):
        return len(load("hh_rlhf", options.pop("source", folder), kind="pairs", **options).rows)

    assert count() == count(subset="all") == 40
    assert count(subset="helpful") == 30
    assert count(subset="harmless") == count(subset="harmless-base") == 10
    assert count(subset="helpful-online", split="test") == 2
    assert count(source=folder / "helpful-base") == 10
    parts = folder.parent / "parts"
    for number in range(3):
        write_hh(parts / f"part-{number}.jsonl", 4, seed=number)
    assert count(source=parts) == 12
    with pytest.raises(UserError, match=r"no subset 'helpfull'; did you mean 'helpful'\?"):
        count(subset="helpfull")
    with pytest.raises(UserError, match="helpful-base: has no split 'valid'; it has 'train'"):
        count(split="valid")
    with pytest.raises(UserError, match="helpful-base: has no split 'valid'"):
        count(subset="helpful-base", split="valid")
    with pytest.raises(UserError, match="is one file, so subset=helpful has no effect"):
        count(source=write_hh(tmp_path / "x.jsonl", 2), subset="helpful")


def test_the_hub_is_read_folder_by_folder(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, data_dir):
        asked.append((name, config, split, data_dir))
        return [hh_row(f"question in {data_dir}", chosen="a", rejected="b")]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    loaded = load("hh_rlhf", "Anthropic/hh-rlhf", kind="pairs", subset="helpful", split="test")
    folders = ["helpful-base", "helpful-online", "helpful-rejection-sampled"]
    assert asked == [("Anthropic/hh-rlhf", None, "test", folder) for folder in folders]
    assert loaded.places[0] == "Anthropic/hh-rlhf/helpful-base[test] row 1"


def test_red_team_attempts_are_refused(tmp_path):
    with pytest.raises(UserError, match="red-team-attempts holds single transcripts"):
        load("hh_rlhf", tmp_path, kind="pairs", subset="red-team-attempts")
    row = {"min_harmlessness_score_transcript": -2.2, "transcript": transcript("a", "b")}
    path = write_rows(tmp_path / "red_team_attempts.jsonl.gz", [row])
    with pytest.raises(UserError, match=r"gz:1: a row of red-team-attempts, which holds no pref"):
        load("hh_rlhf", path, kind="pairs")


def test_broken_files_name_the_line(tmp_path):
    good = json.dumps(hh_row("a", chosen="b", rejected="c")).encode()

    def message(name, content):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError) as error:
            load("hh_rlhf", tmp_path / name, kind="pairs")
        return str(error.value).replace(str(tmp_path), "")

    assert message("x.jsonl", good + b'\n{"chosen": "\xff"}\n').startswith(
        "/x.jsonl:2: not valid UTF-8 at byte 13"
    )
    assert message("x.jsonl", good + b"\n" + good[:-9]).startswith("/x.jsonl:2: not valid JSON")
    many = gzip.compress(b"".join(good.replace(b" a", b" %d" % i) + b"\n" for i in range(3000)))
    found = message("x.jsonl.gz", many[:-20])
    assert found.startswith("/x.jsonl.gz: not a whole gzip file after line "), found
    assert found.endswith("; fetch it again")
    assert "not a whole gzip file" in message("x.jsonl.gz", many[:500] + b"####" + many[504:])
    assert message("x.jsonl.gz", gzip.compress(good + b'\n{"a\xff')).startswith(
        "/x.jsonl.gz:2: not valid UTF-8"
    )


def test_crlf_between_lines_and_blank_lines(tmp_path):
    lines = [json.dumps(hh_row(str(i), chosen="b", rejected="c")) for i in range(2)]
    (tmp_path / "x.jsonl").write_bytes("\r\n".join([lines[0], "", lines[1], ""]).encode())
    loaded = load("hh_rlhf", tmp_path / "x.jsonl", kind="pairs")
    assert [place[-2:] for place in loaded.places] == [":1", ":3"]


def test_half_an_emoji_is_dropped_and_counted(tmp_path):
    """JSON can spell what UTF-8 cannot: a surrogate without its other half."""
    rows = [hh_row("a", chosen="cut \ud83d", rejected="c"), hh_row("b", chosen="👩", rejected="c")]
    loaded = load("hh_rlhf", write_rows(tmp_path / "x.jsonl", rows), kind="pairs")
    assert loaded.dropped == [{"where": f"{tmp_path}/x.jsonl:1", "reason": "broken_unicode"}]
    assert loaded.rows[0]["chosen"] == [assistant("👩")]
