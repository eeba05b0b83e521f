"""Answers on disk: whole lines only, from any thread and process, whatever killed the last one."""

import json
import multiprocessing
import threading

import pytest

from shiftrm.errors import UserError
from shiftrm.measure.judges.cache import AnswerCache, question_key
from shiftrm.models.endpoint import Completion


def test_keys_of_questions_differ_in_everything_that_matters():
    base = {
        "base_url": "http://a/v1",
        "model": "m",
        "messages": [{"role": "user", "content": "x"}],
        "parameters": {"temperature": 0},
    }
    others = [
        {"base_url": "http://b/v1"},
        {"model": "n"},
        {"messages": [{"role": "user", "content": "y"}]},
        {"parameters": {"temperature": 1}},
    ]
    keys = {question_key(**base), *(question_key(**{**base, **other}) for other in others)}
    assert len(keys) == 5


@pytest.mark.parametrize("cut", [1, 10, 60])
def test_half_a_line_is_dropped_and_written_again(tmp_path, cut):
    path = tmp_path / "cache.jsonl"
    cache = AnswerCache(path)
    cache.add("one", Completion("[[A]]\ud800", "stop", 3, 4), model="m")
    cache.add("two", Completion("[[B]]"), model="m")
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    after = AnswerCache(path)
    assert after.get("one") == Completion("[[A]]\ud800", "stop", 3, 4)
    assert after.get("two") is None
    after.add("two", Completion("[[B]]"), model="m")
    assert path.read_bytes() == whole


def test_a_long_half_line_is_dropped(tmp_path):
    path = tmp_path / "cache.jsonl"
    AnswerCache(path).add("one", Completion("x"), model="m")
    whole = path.read_bytes()
    for half in (b'{"key": "' + b"y" * 9999, b"\0" * 5000):
        path.write_bytes(whole + half)
        AnswerCache(path).add("two", Completion("y"), model="m")
        assert [json.loads(line)["key"] for line in path.read_bytes().splitlines()] == [
            "one",
            "two",
        ]
    path.write_bytes(b'{"key": "' + b"y" * 9999)  # nothing but half a line
    AnswerCache(path).add("one", Completion("x"), model="m")
    assert path.read_bytes() == whole


def test_a_broken_line_in_the_middle_is_asked_again(tmp_path):
    path = tmp_path / "cache.jsonl"
    cache = AnswerCache(path)
    for key in ("one", "two", "three"):
        cache.add(key, Completion(key), model="m")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(
        lines[0] + b'{"key": "tw\n' + b"[]\n" + b'{"key": 3, "answer": "x"}\n' + lines[2]
    )
    after = AnswerCache(path)
    assert (after.get("one"), after.get("two")) == (Completion("one"), None)
    assert after.get("three") == Completion("three")


@pytest.mark.parametrize("text", ['{"prompt": "x"}\n', "important words", "[1]\n"])
def test_another_file_is_not_taken_for_a_cache(tmp_path, text):
    path = tmp_path / "mine.jsonl"
    path.write_text(text)
    with pytest.raises(UserError, match="is not a cache of a judge's answers"):
        AnswerCache(path)
    assert path.read_text() == text
    (tmp_path / "empty").touch()
    assert len(AnswerCache(tmp_path / "empty")) == 0


def test_two_objects_on_one_file_see_each_others_answers(tmp_path):
    mine, yours = AnswerCache(tmp_path / "c"), AnswerCache(tmp_path / "c")
    mine.add("a", Completion("x"), model="m")
    assert yours.get("a") == Completion("x")
    yours.add("b", Completion("y"), model="m")
    assert mine.get("b") == Completion("y")


def _write_many(path, name, count):
    cache = AnswerCache(path)
    for i in range(count):
        cache.add(f"{name}-{i}", Completion("x" * 3000), model="m")


def test_processes_and_threads_append_whole_lines(tmp_path):
    path = tmp_path / "cache.jsonl"
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_write_many, args=(path, p, 20)) for p in ("a", "b")]
    for process in processes:
        process.start()
    shared = AnswerCache(path)
    threads = [
        threading.Thread(
            target=lambda t=t: [
                shared.add(f"{t}-{i}", Completion("y"), model="m") for i in range(10)
            ]
        )
        for t in ("c", "d")
    ]
    for thread in threads:
        thread.start()
    for worker in (*processes, *threads):
        worker.join(30)
    keys = [json.loads(line)["key"] for line in path.read_bytes().splitlines()]
    assert len(keys) == len(set(keys)) == 60
    assert all(shared.get(f"{p}-{i}") for p in ("a", "b") for i in range(20))
