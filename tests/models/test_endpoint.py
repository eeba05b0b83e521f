"""The layer over the openai client, against a server that fails as servers do."""

import logging
import socket
import threading
import time
import traceback

import pytest

from shiftrm.concurrency import map_bounded
from shiftrm.errors import UserError
from shiftrm.models.endpoint import Endpoint, EndpointConfig, RefusedRequest
from tests.fake_endpoint import Drop, Fail, FakeEndpoint, Nonsense, Say, Stall

KEY = "sk-very-secret-0123456789"
HELLO = [{"role": "user", "content": "hello"}]


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_ORG_ID", "OPENAI_PROJECT_ID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def server():
    with FakeEndpoint() as fake:
        yield fake


def endpoint(server, **options):
    return Endpoint(EndpointConfig(server.url, **options))


def test_a_chat_sends_what_it_is_given_and_reads_the_answer(server):
    server.answer = lambda body: "good day"
    asked = endpoint(server)
    answer = asked.chat("fake", HELLO, temperature=0, max_tokens=7, top_k=5)
    assert (answer.text, answer.finish_reason) == ("good day", "stop")
    assert (answer.tokens_in, answer.tokens_out) == (len(str(HELLO)) // 4, 2)
    assert server.bodies == [
        {"model": "fake", "messages": HELLO, "temperature": 0, "max_tokens": 7, "top_k": 5}
    ]
    assert server.paths == ["/v1/chat/completions"]
    assert (asked.requests, asked.retries) == (1, 0)


def newer(body):
    """What OpenAI's models that reason say to a request of the older kind."""
    if "max_tokens" in body:
        return Fail(
            400,
            message="Unsupported parameter: 'max_tokens' is not supported with this model. Use "
            "'max_completion_tokens' instead.",
        )
    if body.get("temperature") == 0:
        return Fail(
            400,
            message="Unsupported value: 'temperature' does not support 0 with this model. Only "
            "the default (1) value is supported.",
        )
    return None


def test_models_that_want_other_parameters_get_them(server, caplog):
    server.rule, server.answer = newer, lambda body: "yes"
    asked = endpoint(server)
    for _ in range(2):
        assert asked.chat("fake", HELLO, temperature=0, max_tokens=7).text == "yes"
    sent = [
        {k: v for k, v in body.items() if k not in ("model", "messages")} for body in server.bodies
    ]
    assert sent == [
        {"temperature": 0, "max_tokens": 7},
        {"temperature": 0, "max_completion_tokens": 7},
        {"max_completion_tokens": 7},
        {"max_completion_tokens": 7},
    ]
    assert len([r for r in caplog.records if "takes no temperature" in r.message]) == 1


def test_other_refusals_are_not_asked_again(server):
    server.rule = lambda body: Fail(
        400, message="'max_tokens' or 'max_completion_tokens' is too large: 9"
    )
    with pytest.raises(RefusedRequest, match="too large"):
        endpoint(server).chat("fake", HELLO, max_tokens=9)
    server.rule = lambda body: Fail(
        400, message="max_tokens unsupported, max_completion_tokens too"
    )
    with pytest.raises(RefusedRequest, match="unsupported"):
        endpoint(server).chat("fake", HELLO, max_tokens=9)
    assert len(server.bodies) == 3


@pytest.mark.parametrize("prompt", ["the red", [5, 6, 7]])
def test_completions_come_in_order(server, prompt):
    server.answer = lambda body: " cat"
    answers = endpoint(server).complete("fake", prompt, n=3, top_k=-1)
    assert [answer.text for answer in answers] == [" cat"] * 3
    assert server.bodies == [{"model": "fake", "prompt": prompt, "n": 3, "top_k": -1}]
    assert server.paths == ["/v1/completions"]


def test_completions_are_sorted_by_index(server):
    choice = '{"index": %d, "text": "%s", "finish_reason": "length"}'
    server.script(Nonsense('{"choices": [' + choice % (1, "b") + "," + choice % (0, "a") + "]}"))
    answers = endpoint(server).complete("fake", "x", n=2)
    assert [(a.text, a.finish_reason, a.tokens_in) for a in answers] == [
        ("a", "length", None),
        ("b", "length", None),
    ]


def test_no_content_is_an_empty_answer(server):
    server.script(Say(None, "content_filter"))
    answer = endpoint(server).chat("fake", HELLO)
    assert (answer.text, answer.finish_reason) == ("", "content_filter")


# -- retries -----------------------------------------------------------------------------------


def test_failures_are_tried_again_and_counted(server):
    server.script(Fail(500), Fail(429), Fail(503), Nonsense())
    asked = endpoint(server)
    assert asked.chat("fake", HELLO).text == "[[C]]"
    assert len(server.bodies) == 5
    assert (asked.requests, asked.retries) == (1, 4)


def test_a_lost_connection_is_tried_again(server):
    server.script(Drop())
    asked = endpoint(server)
    assert asked.chat("fake", HELLO).text == "[[C]]"
    assert (len(server.bodies), asked.retries) == (2, 1)


def test_retry_after_is_waited_for(server):
    server.script(Fail(429, after=1))
    start = time.monotonic()
    endpoint(server).chat("fake", HELLO)
    assert 0.95 < time.monotonic() - start < 3


def test_a_stalled_server_times_out_and_is_asked_again(server):
    server.script(Stall(5))
    start = time.monotonic()
    asked = endpoint(server, timeout=0.2)
    assert asked.chat("fake", HELLO).text == "[[C]]"
    assert time.monotonic() - start < 3
    assert asked.retries == 1


def test_patience_ends(server):
    server.rule = lambda body: Stall(5)
    message = r"silent for 0.1 s in each of 1 attempts"
    with pytest.raises(UserError, match=message):
        endpoint(server, timeout=0.1, max_retries=0).chat("fake", HELLO)
    server.rule = lambda body: Fail(429, message="slow down")
    asked = endpoint(server, max_retries=2)
    with pytest.raises(UserError, match=r"after 3 attempts \(status 429: slow down\)"):
        asked.chat("fake", HELLO)
    assert (asked.requests, asked.retries) == (1, 2)
    server.rule = lambda body: Fail(429, after=500)  # too long to wait for: asked once
    with pytest.raises(UserError, match=r"after 1 attempts \(status 429"):
        asked.chat("fake", HELLO)
    server.rule = lambda body: Fail(500)
    with pytest.raises(UserError, match=r"fails \(status 500: no\); look at the server's log"):
        endpoint(server, max_retries=1).chat("fake", HELLO)


@pytest.mark.parametrize(
    "body",
    [
        "<html>hello</html>",
        "",
        "null",
        '{"choices": []}',
        '{"choices": [3]}',
        '{"choices": [{"message": null}]}',
        '{"choices": [{"message": {"content": 4}}]}',
        '{"choices": "many"}',
        '["choices"]',
    ],
)
def test_nonsense_is_no_answer(server, body, monkeypatch):
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    server.rule = lambda _: Nonsense(body)
    asked = endpoint(server)
    with pytest.raises(UserError, match="3 times with something that is not a completion"):
        asked.chat("fake", HELLO)
    assert (asked.requests, asked.retries, len(server.bodies)) == (1, 2, 3)


def test_a_refused_request_is_told_apart(server):
    server.script(Fail(400, message="too long"))
    asked = endpoint(server)
    with pytest.raises(RefusedRequest, match=r"refuses the request \(status 400: too long\)"):
        asked.chat("fake", HELLO)
    assert asked.chat("fake", HELLO).text == "[[C]]"


# -- wrong address, key, model -----------------------------------------------------------------


def test_nobody_listens():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached \(.*refused.*\); check the address"):
        Endpoint(EndpointConfig(url)).check("fake")
    assert time.monotonic() - start < 2


def test_a_wrong_key(server, monkeypatch):
    server.key = "right"
    with pytest.raises(UserError, match=r"requests without a key \(OPENAI_API_KEY is not set\)"):
        endpoint(server).check("fake")
    monkeypatch.setenv("MY_KEY", KEY)
    asked = endpoint(server, key_variable="MY_KEY")
    for ask in (lambda: asked.check("fake"), lambda: asked.chat("fake", HELLO)):
        with pytest.raises(UserError, match=r"refuses the key \(status 401.*check MY_KEY"):
            ask()
    monkeypatch.setenv("MY_KEY", "right")
    assert endpoint(server, key_variable="MY_KEY").chat("fake", HELLO).text == "[[C]]"


def test_openai_needs_a_key(monkeypatch):
    with pytest.raises(UserError, match="set the environment variable OPENAI_API_KEY"):
        Endpoint()
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    assert Endpoint().base_url == "https://api.openai.com/v1"
    monkeypatch.setenv("OPENAI_BASE_URL", "http://elsewhere/v1/")
    assert Endpoint().base_url == "http://elsewhere/v1"
    monkeypatch.setenv("OPENAI_API_KEY", "sk-\n\x1b[31m")
    with pytest.raises(UserError, match="characters that a key cannot have"):
        Endpoint()


def test_an_unknown_model(server):
    server.models = ["llama-3", "judge-large"]
    with pytest.raises(UserError, match=r"no model 'judge-larg'; it has llama-3, judge-large; did"):
        endpoint(server).chat("judge-larg", HELLO)
    endpoint(server).check("judge-larg")  # servers may know more than they list
    assert endpoint(server).models() == ["llama-3", "judge-large"]


def test_a_wrong_path(server):
    server.rule = lambda body: Fail(404)
    server.models = None
    with pytest.raises(UserError, match="or the address is wrong"):
        endpoint(server).chat("fake", HELLO)
    endpoint(server).check("fake")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("localhost:8000", "not an address"),
        ("ftp://x/v1", "not an address"),
        ("http://user:secret@host/v1", "the address of host holds a user, a password"),
        ("http://host/v1?key=secret", "the address of host holds"),
    ],
)
def test_addresses(url, message):
    with pytest.raises(UserError, match=message) as caught:
        Endpoint(EndpointConfig(url))
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "option", [{"timeout": 0.0}, {"max_retries": -1}, {"concurrency": 0}], ids=str
)
def test_options(option):
    with pytest.raises(UserError, match=next(iter(option))):
        EndpointConfig(**option)


# -- the key -----------------------------------------------------------------------------------


def test_the_key_is_sent_and_shown_nowhere(server, monkeypatch, caplog, capsys):
    """Not in errors, their causes, logs or answers, even where the server repeats it."""
    caplog.set_level(logging.DEBUG)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server.answer = lambda body: f"your key is {KEY}"
    asked = endpoint(server, max_retries=0)
    shown = [repr(asked), repr(asked.config), repr(asked.chat("fake", HELLO))]
    assert server.headers[0]["authorization"] == f"Bearer {KEY}"
    assert "your key is ***" in shown[-1]
    for step in (Fail(401, message=KEY), Fail(400, message=KEY), Fail(500, message=KEY), Drop()):
        server.script(step)
        with pytest.raises(UserError) as caught:
            asked.chat("fake", HELLO)
        assert caught.value.__context__ is None
        assert caught.value.__cause__ is None
        shown.append("".join(traceback.format_exception(caught.value)) + repr(vars(caught.value)))
    shown += [caplog.text, *capsys.readouterr()]
    assert KEY not in "".join(shown)


def test_a_servers_message_cannot_command_a_terminal(server):
    server.script(Fail(400, message="\x1b[2Jgone\nnext line" + "x" * 500))
    with pytest.raises(UserError) as caught:
        endpoint(server).chat("fake", HELLO)
    assert str(caught.value).isprintable()
    assert len(str(caught.value)) < 400


# -- many at once ------------------------------------------------------------------------------


def test_at_most_so_many_at_once(server):
    server.delay = 0.05
    asked = endpoint(server)
    found = dict(map_bounded(lambda i: asked.chat("fake", HELLO, seed=i), range(12), concurrency=3))
    assert sorted(found) == list(range(12))
    assert server.most_at_once == 3
    assert sorted(body["seed"] for body in server.bodies) == list(range(12))


def test_results_belong_to_their_items():
    def slow_first(i):
        time.sleep(0.05 if i == 0 else 0)
        return i * i

    found = list(map_bounded(slow_first, range(5), concurrency=2))
    assert sorted(found) == [(i, i * i) for i in range(5)]
    assert found[-1] == (0, 0)
    assert list(map_bounded(slow_first, [], concurrency=2)) == []


def test_an_error_stops_the_rest_but_lets_the_others_end():
    ended = []

    def work(i):
        if i == 0:
            raise UserError("no")
        time.sleep(0.1)
        ended.append(i)

    with pytest.raises(UserError, match="no"):
        list(map_bounded(work, range(50), concurrency=4))
    assert set(ended) <= {1, 2, 3}


def test_leaving_early_waits_for_those_under_way_but_not_for_ever():
    ended, release = [], threading.Event()

    def work(i):
        if i == 2:
            release.wait(5)  # a server that stalls
        elif i > 0:
            time.sleep(0.1)
        ended.append(i)

    results = map_bounded(work, range(50), concurrency=3, grace=0.5)
    next(results)
    start = time.monotonic()
    results.close()
    assert time.monotonic() - start < 2
    assert 1 in ended
    assert len(ended) < 6
    release.set()
