"""`shiftrm evaluate win-rate` with each kind of judge, and on bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shiftrm.cli import main
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.world.gold import gold_reward
from tests.cli.conftest import refused
from tests.fake_endpoint import Fail, FakeEndpoint
from tests.measure.test_judge_endpoint import likes

KEY = "sk-very-secret-0123456789"
PROMPTS = [f"prompt {i}" for i in range(6)]


def read(path):
    return Path(path).read_text(encoding="utf-8")


@pytest.fixture
def server(monkeypatch):
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with FakeEndpoint(answer=likes("good")) as fake:
        yield fake


@pytest.fixture
def shiftrm(tmp_path, capsys, monkeypatch):
    """shiftrm("evaluate", ...) in a folder with two files of responses; ours is good four times."""
    monkeypatch.chdir(tmp_path)
    ours = ["a good one"] * 4 + ["a poor one"] * 2
    theirs = ["a poor one"] * 4 + ["a good one"] * 2
    for name, texts in (("ours", ours), ("theirs", theirs)):
        rows = [
            {"prompt": p, "responses": [text, "another"], "finished": [True, True]}
            for p, text in zip(PROMPTS, texts, strict=True)
        ]
        write_jsonl(f"{name}.jsonl", rows)

    def run(*arguments):
        capsys.readouterr()
        status = main([str(a) for a in arguments])
        return status, capsys.readouterr()

    return run


def command(server=None, *more, output="out", judge="endpoint"):
    files = ["--ours", "ours.jsonl", "--theirs", "theirs.jsonl", "--output", output]
    at = [] if server is None else ["--base-url", server.url, "--model", "fake"]
    return ["evaluate", "win-rate", *files, "--judge", judge, *at, *more]


def test_an_endpoint_judges(shiftrm, server):
    status, output = shiftrm(*command(server, "--price-in", 10, "--price-out", 30))
    assert (status, output.err) == (0, "")
    assert "To ask: 12 requests, about" in output.out
    assert "at the given prices" in output.out
    assert (
        "Ours wins 67 %, ties 0 % and loses 33 % of 6 prompts, says fake (general)." in output.out
    )
    assert "Both orders agree on 100 % of the prompts; where an answer names" in output.out
    assert "in 50 % of the cases" in output.out
    assert "12 rows have several responses; the first of each was judged." in output.out
    assert "! Only 6 prompts" in output.out
    found = json.loads(read("out/win_rate.json"))
    assert found["win"]["value"] == pytest.approx(4 / 6)
    assert found["position"]["first"] == found["position"]["second"] == 6
    assert found["settings"]["parameters"] == {"temperature": 0, "max_tokens": 1024}
    rows = read_jsonl("out/verdicts.jsonl")
    assert [row["outcome"] for row in rows] == ["win"] * 4 + ["lose"] * 2
    assert rows[0]["answers"][1] == {
        "response_a": "theirs",
        "raw": "[[B]]",
        "letter": "B",
        "problem": "",
        "finish_reason": "stop",
    }
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    for name in sorted(os.listdir("out")):
        assert KEY not in read(f"out/{name}")
    assert sorted(os.listdir("out")) == [
        "answers.jsonl",
        "verdicts.jsonl",
        "win_rate.html",
        "win_rate.json",
    ]
    assert KEY not in output.out


def test_the_same_command_asks_nothing(shiftrm, server):
    shiftrm(*command(server))
    first = {name: read(f"out/{name}") for name in os.listdir("out")}
    server.bodies.clear()
    status, output = shiftrm(*command(server))
    assert status == 0
    assert "Nothing to ask: all 12 answers are in the cache." in output.out
    assert "Requests sent: 0" in output.out
    assert server.bodies == []
    assert {name: read(f"out/{name}") for name in os.listdir("out")} == first


def test_a_sample_of_the_prompts_is_judged(shiftrm, server):
    status, output = shiftrm(*command(server, "--limit", 2, "--seed", 5, "--cache", "c.jsonl"))
    assert status == 0
    assert "Judged: 2 of 6 prompts, drawn with seed 5." in output.out
    assert len(server.bodies) == 4
    assert len(read_jsonl("c.jsonl")) == 4
    shiftrm(*command(server, "--limit", 0, "--cache", "c.jsonl", output="all"))
    assert len(server.bodies) == 12  # the four were there


def test_a_dry_run_sends_nothing(shiftrm, server):
    before = sorted(os.listdir())
    status, output = shiftrm(*command(server, "--dry-run"))
    assert status == 0
    assert "To ask: 12 requests" in output.out
    assert (server.bodies, server.listed) == ([], 0)
    assert sorted(os.listdir()) == before


def test_many_requests_need_a_yes(shiftrm, server):
    before = sorted(os.listdir())
    status, output = shiftrm(*command(server, "--max-requests", 11))
    assert status == 2
    assert "12 requests are more than --max-requests 11; give --yes" in output.err
    assert server.bodies == []
    assert sorted(os.listdir()) == before
    assert shiftrm(*command(server, "--max-requests", 11, "--yes"))[0] == 0


def test_unread_answers_are_counted_and_shown(shiftrm, server):
    def answer(body):
        text = body["messages"][1]["content"]
        return "<script>alert(1)</script> who knows" if "prompt 0" in text else likes("good")(body)

    server.answer = answer
    status, output = shiftrm(*command(server))
    assert status == 0
    assert "1 of 6 prompts are not counted, since the judge gave no readable verdict" in output.out
    assert "! More than one prompt in twenty is not counted" in output.out
    assert json.loads(read("out/win_rate.json"))["counted"] == 5
    page = read("out/win_rate.html")
    assert "&lt;script&gt;alert(1)" in page
    assert "<script" not in page


def test_a_judge_who_never_decides_is_an_error_with_the_answers_kept(shiftrm, server):
    server.answer = lambda body: "hm"
    status, output = shiftrm(*command(server))
    assert status == 2
    assert "comparisons has a verdict that can be read: no verdict in it (6); see" in output.err
    assert read_jsonl("out/verdicts.jsonl")[0]["answers"][0]["raw"] == "hm"


def test_a_failing_server_keeps_what_it_said(shiftrm, server):
    server.script(None, None, Fail(503))
    status, output = shiftrm(*command(server, "--retries", 0, "--concurrency", 1))
    assert status == 2
    assert output.err.count("\n") == 1
    assert "status 503" in output.err
    assert "Answers so far are kept: the same command asks only for the others" in output.err
    assert shiftrm(*command(server))[0] == 0
    assert len(server.bodies) == 3 + 10


def test_surrogates_and_escapes_in_responses(shiftrm, server):
    rows = [{"prompt": "p\x1b[31m", "responses": ["good \ud800 <b>\u202e"]}]
    other = [{"prompt": "p\x1b[31m", "responses": ["poor"]}]
    for name, content in (("ours", rows), ("theirs", other)):
        with open(f"{name}.jsonl", "w") as handle:
            handle.write(json.dumps(content[0]) + "\n")
    status, output = shiftrm(*command(server))
    assert status == 0
    assert "\x1b" not in output.out
    assert "good ? &lt;b&gt;" in read("out/win_rate.html")
    assert "good ? <b>" in server.bodies[0]["messages"][1]["content"]


def test_the_gold_world_judges(shiftrm):
    prompts = ["describe the garden :", "review the garden :"]
    texts = {"ours": [" lovely roses bloom", " stupid"], "theirs": [" roses", " lovely roses"]}
    for name, responses in texts.items():
        rows = [{"prompt": p, "response": r} for p, r in zip(prompts, responses, strict=True)]
        write_jsonl(f"{name}.jsonl", rows)
    status, output = shiftrm(*command(judge="gold"))
    assert status == 0
    assert "Ours wins 50 %, ties 0 % and loses 50 % of 2 prompts, says gold." in output.out
    [row, _] = read_jsonl("out/verdicts.jsonl")
    assert row["score_ours"] == gold_reward(prompts[0], texts["ours"][0])
    assert "order" not in output.out
    status, output = shiftrm(*command(None, "--tie-margin", "1000", judge="gold"))
    assert "ties 100 %" in output.out


def test_a_reward_model_judges(shiftrm, reward_model, tokenizer):
    reward_model.save_pretrained("rm")
    tokenizer.save_pretrained("rm")
    status, output = shiftrm(*command(None, "--model", "rm", judge="reward-model"))
    assert (status, output.err) == (0, "")
    assert "says rm." in output.out
    assert json.loads(read("out/win_rate.json"))["position"] is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--judge", "golden"), "--judge is 'golden'; did you mean 'gold'"),
        (("--judge", "gold"), "--base-url is for --judge endpoint, not for gold"),
        (("--judge", "reward-model"), "--base-url is for --judge endpoint, not for rew"),
        (("--template", "helpfull"), "no such template or file; did you mean 'helpful'"),
        (("--tie-margin", "1"), "--tie-margin is for judges that give numbers"),
        (("--limit", "-1"), "--limit is -1"),
        (("--concurrency", "0"), "concurrency is 0"),
        (("--timeout", "0"), "timeout is 0"),
        (("--price-in", "nan"), "--price-in is nan"),
        (("--parameter", "x"), "write NAME=VALUE"),
        (("--parameter", "model=y"), "--parameter model: is set by the command"),
        (("--parameter", "x=2024-01-01"), "the parameters of requests cannot be sent"),
        (("--parameter", "temperature=.nan"), "the parameters of requests cannot be sent"),
        (("--template", "big.j2"), "big.j2: the template fails (Range too big"),
        (("--tokenizer", "nowhere"), "cannot be loaded as a tokenizer"),
        (("--base-url", "localhost"), "not an address"),
        (("--cache", "ours.jsonl"), "is not a cache of a judge's answers"),
        (("--cache", "x.csv"), "the output is JSON lines"),
        (("--output", "ours.jsonl"), "is not a folder"),
        (("--theirs", "other.jsonl"), "other.jsonl answer different prompts: 6 not in"),
        (("--ours", "none.jsonl"), "no such file"),
    ],
)
def test_bad_options_are_one_line_and_nothing_is_sent(shiftrm, server, options, message):
    write_jsonl("other.jsonl", [{"prompt": f"x{i}", "response": "y"} for i in range(6)])
    Path("big.j2").write_text(
        "{{prompt}}{{response_a}}{{response_b}}{{range(10**9)}} [[A]] [[B]] [[C]]"
    )
    refused(shiftrm, command(server, *options), message)
    assert (server.bodies, server.listed) == ([], 0)


def test_no_model(shiftrm):
    refused(shiftrm, command(judge="endpoint"), "--judge endpoint needs --model")
    refused(shiftrm, [*command(judge="gold"), "--model", "x"], "--judge gold takes no --model")


@pytest.mark.slow
def test_ctrl_c_keeps_what_was_asked(shiftrm, server, tmp_path):
    server.delay = 0.3
    process = subprocess.Popen(
        [sys.executable, "-m", "shiftrm", *map(str, command(server, "--concurrency", 2))],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # Background jobs ignore Ctrl-C, and their children with them.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and len(server.bodies) < 4:
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "give the same command again to continue; answers that have come are in" in errors
    kept = len(read_jsonl("out/answers.jsonl"))
    assert kept == len(server.bodies) < 12
    server.delay = 0
    assert shiftrm(*command(server))[0] == 0
    assert len(server.bodies) == 12
