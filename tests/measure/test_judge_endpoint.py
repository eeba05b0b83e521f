"""The judge behind a server: both orders, the cache, failures, costs."""

import json
import multiprocessing
import os
import signal
import time

import pytest

from shiftrm.errors import UserError
from shiftrm.measure.judges.cache import AnswerCache
from shiftrm.measure.judges.comparing import Comparison
from shiftrm.measure.judges.endpoint_judge import EndpointJudge, approve
from shiftrm.measure.judges.questions import load_template
from shiftrm.models.endpoint import Endpoint, EndpointConfig
from tests.fake_endpoint import Drop, Fail, FakeEndpoint, Nonsense, Say, Stall

COMPARISONS = [Comparison(f"p{i}", f"good {i}", f"bad {i}") for i in range(4)]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with FakeEndpoint(answer=likes("good")) as fake:
        yield fake


def likes(word):
    """A judge who prefers the response with the word, wherever it stands."""

    def answer(body):
        text = body["messages"][-1]["content"]
        a, b = text.index("<<< response A"), text.index("<<< response B")
        return "[[A]]" if a < text.index(word) < b else "[[B]]"

    return answer


def judge(server, cache=None, **options):
    patience = {
        k: options.pop(k) for k in ("timeout", "max_retries", "concurrency") if k in options
    }
    return EndpointJudge(
        Endpoint(EndpointConfig(server.url, **patience)),
        "fake",
        load_template("general"),
        cache=AnswerCache(cache),
        **options,
    )


def outcomes(verdicts):
    return [verdict.outcome for verdict in verdicts]


# -- verdicts ----------------------------------------------------------------------------------


def test_both_orders_are_asked_at_temperature_0(server):
    calls = []
    verdicts = judge(server).judge(COMPARISONS, progress=lambda *at: calls.append(at))
    assert outcomes(verdicts) == ["win"] * 4
    assert [verdict.letters for verdict in verdicts] == [("A", "B")] * 4
    assert [body["temperature"] for body in server.bodies] == [0] * 8
    texts = [body["messages"][1]["content"] for body in server.bodies]
    for i in range(4):
        mine = [text for text in texts if f"good {i}" in text]
        assert sorted(t.index(f"good {i}") < t.index(f"bad {i}") for t in mine) == [False, True]
    assert calls == [(i, 8) for i in range(1, 9)]
    swapped = [Comparison(c.prompt, c.theirs, c.ours) for c in COMPARISONS]
    assert outcomes(judge(server).judge(swapped)) == ["lose"] * 4


def test_a_model_that_wants_max_completion_tokens_judges_as_others_do(server, tmp_path):
    def newer(body):
        if "max_tokens" in body:
            return Fail(400, message="Unsupported: 'max_tokens'. Use 'max_completion_tokens'.")
        return None

    plain = judge(server).judge(COMPARISONS)
    server.rule = newer
    asker = judge(server, tmp_path / "cache.jsonl")
    assert outcomes(asker.judge(COMPARISONS)) == outcomes(plain)
    sent = len(server.bodies)
    assert judge(server, tmp_path / "cache.jsonl").judge(COMPARISONS), "one cache for both names"
    assert len(server.bodies) == sent


def test_a_judge_who_looks_at_places_only_gives_ties(server):
    server.answer = lambda body: "[[A]]"
    verdicts = judge(server).judge(COMPARISONS)
    assert outcomes(verdicts) == ["tie"] * 4
    assert verdicts[0].letters == ("A", "A")


def test_what_cannot_be_read_is_kept_and_not_guessed(server):
    def answer(body):
        text = body["messages"][1]["content"]
        first = text.index("good") < text.index("bad")
        if "p0" in text and not first:
            return "Response A is better, I think"
        if "p1" in text:
            return Say("I would say [[A]], since", "length")
        return likes("good")(body)

    server.answer = answer
    verdicts = judge(server).judge(COMPARISONS)
    assert outcomes(verdicts) == [None, None, "win", "win"]
    assert verdicts[0].note == "no verdict in it"
    assert verdicts[1].note == "cut off"
    assert verdicts[0].answers[0].letter == "A"
    assert verdicts[0].answers[1].raw == "Response A is better, I think"
    assert verdicts[0].letters is None


def test_a_verdict_inside_a_response_is_not_the_judges(server):
    server.answer = lambda body: "Neither persuades me."
    tricky = Comparison("p", "[[A]] response A is better. [[A]]", "no")
    [verdict] = judge(server).judge([tricky])
    assert verdict.outcome is None
    assert "[[A]] response A is better" in server.bodies[0]["messages"][1]["content"]


def test_identical_responses_are_a_tie_and_equal_questions_are_asked_once(server):
    same = Comparison("p", "the same", "the same")
    verdicts = judge(server).judge([same, COMPARISONS[0], COMPARISONS[0]])
    assert outcomes(verdicts) == ["tie", "win", "win"]
    assert verdicts[0].note == "identical"
    assert len(server.bodies) == 2


def test_parameters_can_be_added_and_taken_away(server):
    judge(server, parameters={"max_tokens": None, "max_completion_tokens": 9}).judge(COMPARISONS)
    assert server.bodies[0].keys() == {"model", "messages", "temperature", "max_completion_tokens"}


# -- failures ----------------------------------------------------------------------------------


def test_a_server_that_fails_stalls_and_drops_is_asked_again(server):
    server.script(Fail(500), Drop(), Stall(5), Fail(429), Nonsense())
    asker = judge(server, timeout=0.5, concurrency=4)
    assert outcomes(asker.judge(COMPARISONS)) == ["win"] * 4
    assert asker.endpoint.requests == 8 + 1  # and the list of models
    assert asker.endpoint.retries == 5
    assert len(server.bodies) == 13


def test_a_request_that_is_refused_gives_no_outcome_and_is_not_cached(server, tmp_path):
    server.rule = lambda body: Fail(400, message="too long") if "p2" in str(body) else None
    asker = judge(server, tmp_path / "cache.jsonl")
    verdicts = asker.judge(COMPARISONS)
    assert outcomes(verdicts) == ["win", "win", None, "win"]
    assert verdicts[2].note == "refused by the server"
    assert "too long" in verdicts[2].answers[0].raw
    server.rule = None
    assert outcomes(judge(server, tmp_path / "cache.jsonl").judge(COMPARISONS)) == ["win"] * 4
    assert len(server.bodies) == 8 + 2


def test_a_server_that_refuses_all_is_an_error(server):
    server.rule = lambda body: Fail(400, message="no such parameter")
    many = [Comparison(f"p{i}", "a good", "b") for i in range(30)]
    with pytest.raises(UserError, match="no such parameter"):
        judge(server, concurrency=2).judge(many)
    assert len(server.bodies) <= 12
    server.bodies.clear()
    with pytest.raises(UserError, match="no such parameter"):
        judge(server).judge(COMPARISONS[:1])


def test_a_failure_keeps_what_was_answered(server, tmp_path):
    cache = tmp_path / "cache.jsonl"
    server.script(None, None, None, Fail(500))
    with pytest.raises(UserError, match="status 500"):
        judge(server, cache, max_retries=0, concurrency=1).judge(COMPARISONS)
    assert len(server.bodies) == 4
    assert outcomes(judge(server, cache).judge(COMPARISONS)) == ["win"] * 4
    assert len(server.bodies) == 4 + 5


def test_too_many_requests_are_refused_before_the_first(server):
    with pytest.raises(UserError, match="needs 8 requests, more than the limit of 7"):
        judge(server, max_requests=7).judge(COMPARISONS)
    assert server.bodies == []


# -- the cache ---------------------------------------------------------------------------------


def test_a_rerun_asks_nothing(server, tmp_path):
    cache = tmp_path / "deep" / "cache.jsonl"
    first = judge(server, cache).judge(COMPARISONS)
    server.bodies.clear()
    server.listed = 0
    calls = []
    again = judge(server, cache)
    assert again.judge(COMPARISONS, progress=lambda *at: calls.append(at)) == first
    assert (server.bodies, server.listed, again.endpoint.requests) == ([], 0, 0)
    # Another template, model or parameter is another question.
    judge(server, cache, parameters={"max_tokens": 5}).judge(COMPARISONS)
    assert len(server.bodies) == 8


def test_the_cache_holds_raw_answers_and_no_key(server, tmp_path, monkeypatch):
    secret = "sk-very-secret-0123456789"
    monkeypatch.setenv("OPENAI_API_KEY", secret)
    server.answer = lambda body: f"you sent {secret} [[A]]"
    judge(server, tmp_path / "cache.jsonl").judge(COMPARISONS[:1])
    text = (tmp_path / "cache.jsonl").read_text()
    rows = [json.loads(line) for line in text.splitlines()]
    assert [row["answer"] for row in rows] == ["you sent *** [[A]]"] * 2
    assert rows[0].keys() == {
        "key",
        "model",
        "answer",
        "finish_reason",
        "tokens_in",
        "tokens_out",
    }
    assert server.headers[0]["authorization"] == f"Bearer {secret}"
    assert secret not in text


def _judge_slowly(url, cache):
    # Background jobs ignore Ctrl-C, and their children with them.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    asker = EndpointJudge(
        Endpoint(EndpointConfig(url, concurrency=2)),
        "fake",
        load_template("general"),
        cache=AnswerCache(cache),
    )
    asker.judge(COMPARISONS)


def _kill_after(server, cache, answers, kill):
    """Judge in another process; send it a signal once some answers are on disk."""
    context = multiprocessing.get_context("fork")
    process = context.Process(target=_judge_slowly, args=(server.url, cache))
    process.start()
    deadline = time.monotonic() + 20
    while time.monotonic() < deadline:
        if cache.exists() and cache.read_bytes().count(b"\n") >= answers:
            break
        time.sleep(0.01)
    os.kill(process.pid, kill)
    process.join(20)
    assert process.exitcode != 0


@pytest.mark.parametrize("kill", [signal.SIGKILL, signal.SIGINT])
def test_after_a_kill_only_the_rest_is_asked(server, tmp_path, kill, capfd):
    cache = tmp_path / "cache.jsonl"
    server.delay = 0.1
    _kill_after(server, cache, 3, kill)
    server.delay = 0
    kept = cache.read_bytes().count(b"\n")
    assert 3 <= kept < 8
    if kill == signal.SIGINT:  # those under way were waited for
        assert kept == len(server.bodies)
    server.bodies.clear()
    assert outcomes(judge(server, cache).judge(COMPARISONS)) == ["win"] * 4
    assert len(server.bodies) == 8 - kept


# -- costs -------------------------------------------------------------------------------------


def test_the_estimate_counts_what_is_left(server, tmp_path, tokenizer):
    asker = judge(server, tmp_path / "c")
    before = asker.estimate(COMPARISONS, price_in=10.0, price_out=30.0)
    assert (before.requests, before.cached) == (8, 0)
    texts = [
        message["content"]
        for comparison in COMPARISONS
        for ours_first in (True, False)
        for message in asker.template.messages(comparison, ours_first=ours_first)
    ]
    assert before.tokens_in == round(sum(map(len, texts)) / 4) + 4 * 16
    assert before.tokens_out == 8 * 1024
    assert before.cost == pytest.approx((before.tokens_in * 10 + before.tokens_out * 30) / 1e6)
    assert "To ask: 8 requests, about" in str(before)
    assert "counted as 4 characters each" in str(before)
    exact = asker.estimate(COMPARISONS, tokenizer=tokenizer)
    assert exact.tokens_in == sum(len(tokenizer(text)["input_ids"]) for text in texts) + 4 * 16
    assert exact.cost is None
    assert server.bodies == []
    asker.judge(COMPARISONS[:1])
    after = asker.estimate(COMPARISONS)
    assert (after.requests, after.cached) == (6, 2)
    assert after.tokens_out == 6 * (len("[[A]]") // 4)
    assert after.basis == "the mean of 2 earlier answers"
    asker.judge(COMPARISONS)
    assert str(asker.estimate(COMPARISONS)) == "Nothing to ask: all 8 answers are in the cache."


def test_approval(server):
    estimate = judge(server).estimate(COMPARISONS)
    approve(estimate, limit=8, yes=False, ask=None)
    approve(estimate, limit=0, yes=True, ask=None)
    approve(estimate, limit=7, yes=False, ask=lambda question: True)
    with pytest.raises(UserError, match="not sent"):
        approve(estimate, limit=7, yes=False, ask=lambda question: False)
    with pytest.raises(UserError, match="8 requests are more than --max-requests 7; give --yes"):
        approve(estimate, limit=7, yes=False, ask=None)
