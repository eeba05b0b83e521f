"""Files are whole or absent, and errors name file and line."""

import errno
import os
from pathlib import Path

import pytest

from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError, suggest
from shiftrm.files import (
    atomic_write_text,
    encodable,
    read_jsonl,
    remove_unfinished,
    replace_directory,
    together,
    write_jsonl,
)


def test_round_trip_keeps_unicode(tmp_path):
    rows = [{"a": "über 🌹 שלום"}, {"a": [1, 2.5, None]}]
    assert read_jsonl(write_jsonl(tmp_path / "x.jsonl", rows)) == rows


def test_text_that_utf8_has_no_form_for_survives(tmp_path):
    rows = [{"text": "half an emoji \ud83d"}, {"text": "a whole one \U0001f600"}]
    assert read_jsonl(write_jsonl(tmp_path / "x.jsonl", rows)) == rows
    assert "\U0001f600" in (tmp_path / "x.jsonl").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1}\n{"a": \n', r"x\.jsonl:2: not valid JSON at column"),
        (b'{"a": 1}\n\n[1, 2]\n', r"x\.jsonl:3: expected a JSON object, found list"),
        (b'{"a": "\xff"}\n', r"x\.jsonl:1: not valid UTF-8"),
        (b'{"b": 1}\n', r"x\.jsonl:1: column 'a' is missing; the row has 'b'"),
        (b"\n\n", r"x\.jsonl: the file has no rows"),
        (b'{"a": 1}\n{"a": "cut of', r"x\.jsonl:2: not valid JSON"),
    ],
)
def test_bad_lines_are_named(tmp_path, content, message):
    (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(UserError, match=message):
        read_jsonl(tmp_path / "x.jsonl", required=("a",))


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_jsonl(tmp_path / "none.jsonl")


def test_nan_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_jsonl(tmp_path / "x.jsonl", [{"a": float("nan")}])
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = atomic_write_text(tmp_path / "x.txt", "old")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_replace_directory_keeps_the_first(tmp_path):
    for name, content in (("first", "1"), ("second", "2")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "x").write_text(content)
    replace_directory(tmp_path / "first", tmp_path / "done")
    replace_directory(tmp_path / "second", tmp_path / "done")
    assert (tmp_path / "done" / "x").read_text() == "1"
    assert not (tmp_path / "second").exists()


def test_messages_are_one_line():
    assert str(UserError("first\n  second")) == "first second"
    assert suggest("retraned", ["retrained", "fixed"]) == "; did you mean 'retrained'?"
    assert suggest("xyz", ["b", "a"]) == "; known: a, b"


def test_a_lone_surrogate_becomes_a_question_mark_in_texts(tmp_path):
    atomic_write_text(tmp_path / "page.html", "a\ud800b")
    assert (tmp_path / "page.html").read_bytes() == b"a?b"
    assert encodable([{"role": "\udc00", "n": 1}, "x"]) == [{"role": "?", "n": 1}, "x"]


@pytest.mark.parametrize("line", ["[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
@pytest.mark.parametrize("name", ["x.jsonl", "x.json"])
def test_json_beyond_all_measure_is_one_line(tmp_path, line, name):
    (tmp_path / name).write_text(line)
    with pytest.raises(UserError, match=r"x\.json.*nested too deep or with a number too long"):
        list(iterate_rows(tmp_path / name))


def test_errors_cannot_rule_the_terminal():
    assert str(UserError("a\x1b[2J\nb \u202e \ud800")) == r"a\x1b[2J b \u202e \ud800"
    assert str(UserError("שלום 👩 é")) == "שלום 👩 é"


def write_three(folder):
    with together():
        for name in ("second", "third", "main"):
            atomic_write_text(folder / "new" / name, name)


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_files_that_are_written_together_appear_together(tmp_path):
    with together():
        first = atomic_write_text(tmp_path / "new" / "first", "1")
        atomic_write_text(tmp_path / "new" / "second", "2")
        assert not first.exists()
    assert {p.name: p.read_text() for p in first.parent.iterdir()} == {"first": "1", "second": "2"}


@pytest.mark.parametrize("call", ["fsync", "link"])
@pytest.mark.parametrize("which", [1, 2, 3])
def test_of_files_that_are_written_together_an_error_leaves_none(
    tmp_path, monkeypatch, call, which
):
    plain, calls = getattr(os, call), iter((*[None] * (which - 1), full, *[None] * 9))
    monkeypatch.setattr(os, call, lambda *given: (next(calls) or plain)(*given))
    with pytest.raises(OSError, match="No space left") as error:
        write_three(tmp_path)
    assert list(tmp_path.iterdir()) == []
    if call == "fsync":
        assert Path(error.value.filename).name == ("second", "third", "main")[which - 1]


def test_a_file_that_may_be_rewritten_is_replaced_together(tmp_path):
    old = atomic_write_text(tmp_path / "old", "before")
    with pytest.raises(ValueError, match="not JSON compliant"), together():
        write_jsonl(old, [{"a": 1}, {"a": float("nan")}])
    assert old.read_text() == "before"
    with together():
        atomic_write_text(old, "after")
    assert old.read_text() == "after"
    assert list(tmp_path.iterdir()) == [old]


def test_without_hard_links_files_are_renamed(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", unsupported)
    write_three(tmp_path)
    assert sorted(p.name for p in tmp_path.rglob("*")) == ["main", "new", "second", "third"]


@pytest.mark.parametrize(("call", "which"), [("link", 1), ("link", 2), ("link", 3), ("unlink", 1)])
def test_a_file_that_a_killed_process_named_is_unfinished(tmp_path, call, which):
    """All that have a name are deleted, and no file that has only a similar name."""
    other = atomic_write_text(tmp_path / "new" / ".main.12345678.tmp", "precious")
    child = os.fork()
    if not child:
        plain, calls = getattr(os, call), iter(range(1, 10))
        setattr(os, call, lambda *x: os._exit(9) if next(calls) == which else plain(*x))
        write_three(tmp_path)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    names = {"second", "third", "main"}
    there = {p.name for p in other.parent.iterdir()} & names
    assert len(there) == (3 if call == "unlink" else which - 1)
    for name in names:
        remove_unfinished(tmp_path / "new" / name)
    assert {p.name for p in other.parent.iterdir()} & names == set()
    assert other.read_text() == "precious"
