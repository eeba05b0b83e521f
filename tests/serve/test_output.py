"""Lines and logged requests: what happens when they cannot be written."""

import contextlib
import json
import resource
import sys

import pytest

from shiftrm.errors import UserError
from shiftrm.progress import LOG_FILE, Progress
from shiftrm.serve.output import RequestLog, print_line
from tests.serve.conftest import KEY
from tests.serve.test_swap import AUTH, point, version_of, wait_for

ROW = {"prompt": "the", "responses": [" cat"]}


def broken_pipe(line):
    raise BrokenPipeError


def test_nobody_reads_the_lines(serving, model, other, tmp_path):
    """`shiftrm serve | head -2`: the model can still be changed, by a request and by the link."""
    link = tmp_path / "current"
    link.symlink_to(model)
    server = serving(link, token=KEY, say=broken_pipe)
    first = version_of(server)
    point(link, other)
    wait_for(lambda: version_of(server) != first)
    assert server.post("/reload", {"model": str(model)}, headers=AUTH)["model"] == "reward"
    server.post("/reload", {"model": str(tmp_path)}, status=400, headers=AUTH)


def test_an_unexpected_error_is_one_line_of_json(serving, model, monkeypatch):
    from shiftrm.serve import formats

    server = serving(model, say=broken_pipe)
    monkeypatch.setattr(formats.Question, "__init__", lambda *_: 1 / 0)
    error = server.post("/score", ROW, status=500)
    assert error == {"error": "the server failed (ZeroDivisionError)"}


def test_the_link_is_followed_after_an_error(serving, model, other, tmp_path, monkeypatch):
    link = tmp_path / "current"
    link.symlink_to(model)
    server = serving(link)
    first = version_of(server)
    monkeypatch.setattr(server.models, "follow_link", lambda: 1 / 0)
    wait_for(lambda: len(server.said) > 1)
    monkeypatch.undo()
    point(link, other)
    wait_for(lambda: version_of(server) != first)
    assert server.said[1] == "the link to the model cannot be followed (ZeroDivisionError)"
    assert server.said[2].startswith("model current@")


def test_printing_never_raises(monkeypatch, capsys):
    print_line("a lone \ud800 surrogate")
    assert capsys.readouterr().out == "a lone \\ud800 surrogate\n"

    class Closed:
        def write(self, text):
            raise ValueError("I/O operation on closed file")

    monkeypatch.setattr(sys, "stdout", Closed())
    print_line("nobody")


def test_progress_notes_lone_surrogates(tmp_path):
    progress = Progress("serve", None)
    progress.log_to(tmp_path)
    progress.note("model \ud800")
    assert (tmp_path / LOG_FILE).read_text().endswith("model \\ud800\n")


def test_requests_are_logged_if_asked(serving, model, tmp_path):
    with contextlib.closing(RequestLog(tmp_path / "requests.jsonl")) as log:
        server = serving(model, log=log)
        answers = [server.post("/score", ROW) for _ in range(2)]
        rows = [json.loads(line) for line in log.path.read_text().splitlines()]
        server.close()
    for row, answer in zip(rows, answers, strict=True):
        assert row["request"] == ROW
        assert row["rewards"] == answer["rewards"]
        assert row["version"] == answer["version"]
        assert row["time"]


def test_a_full_disk_does_not_stop_the_answers(serving, model):
    with contextlib.closing(RequestLog("/dev/full")) as log:
        server = serving(model, log=log)
        for _ in range(3):
            server.post("/score", ROW)
        assert server.said[1:] == ["requests are answered but not logged: No space left on device"]
        assert "shiftrm_requests_unlogged_total 3.0" in server.http.get("/metrics").text
        server.close()


def test_a_line_that_does_not_fit_is_taken_back(tmp_path):
    failures = []
    log = RequestLog(tmp_path / "requests.jsonl", failures.append)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    log._write({"row": 1})
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
        log._write({"row": "x" * 100})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    log._write({"row": 3})
    log.close()
    assert [json.loads(line)["row"] for line in log.path.read_text().splitlines()] == [1, 3]
    assert len(failures) == 1


def test_a_log_that_cannot_be_opened(tmp_path):
    with pytest.raises(UserError, match="cannot be written"):
        RequestLog(tmp_path)
