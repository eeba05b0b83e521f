"""Who is served, and how much: tokens, limits, time-outs, clients that leave."""

import itertools
import resource
import socket
import threading
import time
from base64 import b64encode

import httpx2
import pytest

from shiftrm.errors import UserError
from shiftrm.serve.listening import raise_open_files
from shiftrm.serve.settings import Settings, bound_socket, token_matches
from tests.serve.conftest import KEY

ROW = {"prompt": "the", "responses": [" cat"]}


@pytest.mark.parametrize(
    ("header", "right"),
    [
        (f"Bearer {KEY}", True),
        (f"bearer {KEY}", True),
        (f"Basic {b64encode(f'any:{KEY}'.encode()).decode()}", True),
        (f"Basic {b64encode(KEY.encode()).decode()}", False),
        ("Basic %%%", False),
        (f"Bearer {KEY}x", False),
        ("Bearer ", False),
        (KEY, False),
        ("", False),
        (None, False),
        ("Bearer t\xf6ken", False),
    ],
)
def test_tokens(header, right):
    assert token_matches(header, KEY) is right


@pytest.mark.parametrize(
    ("method", "path"),
    [("POST", "/score"), ("POST", "/classify"), ("POST", "/reload"), ("GET", "/metrics")],
)
def test_nothing_without_the_token(server, method, path):
    for headers in ({}, {"Authorization": "Bearer wrong-token"}):
        answer = httpx2.request(method, server.url + path, headers=headers)
        assert answer.status_code == 401
        assert "SHIFTRM_TOKEN" in answer.json()["error"]
        assert KEY not in answer.text
    assert httpx2.get(f"{server.url}/health").json()["status"] == "ok"


@pytest.mark.parametrize("host", ["0.0.0.0", "::"])
def test_other_machines_only_with_a_token(host):
    with pytest.raises(UserError, match="can be reached from other machines"):
        Settings(host=host)
    Settings(host=host, token=KEY)


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost", "127.0.0.9"])
def test_this_machine_without_one(host):
    Settings(host=host)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"token": "short"}, "at least 8"),
        ({"token": "with a space"}, "no spaces"),
        ({"token": "t\xf6ken-t\xf6ken"}, "ASCII"),
        ({"port": 70000}, "65535"),
        ({"timeout": float("nan")}, "between 0 and"),
        ({"timeout": float("inf")}, "between 0 and"),
        ({"host": "no such host"}, "no such host"),
        ({"host": ""}, "give an address"),
    ],
)
def test_bad_settings(options, says):
    with pytest.raises(UserError, match=says):
        Settings(**options)


def test_a_port_in_use():
    with bound_socket(Settings(port=0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"{port}: cannot listen there"):
            bound_socket(Settings(port=port))


def test_reload_is_off_without_a_token(serving, model):
    error = serving(model).post("/reload", {"model": str(model)}, status=403)
    assert "SHIFTRM_TOKEN" in error["error"]


@pytest.mark.parametrize("chunked", [False, True])
def test_large_requests(server, chunked):
    raw = b'{"input": "' + b"a " * 60_000 + b'"}'
    content = (raw[i : i + 1000] for i in range(0, len(raw), 1000)) if chunked else raw
    try:
        answer = server.http.post("/classify", content=content)
    except httpx2.TransportError:  # the server closed while we were still sending
        return
    assert answer.status_code == 413
    assert "100000 bytes" in answer.json()["error"]


def test_unknown_paths(server):
    answer = server.http.post("/scores", json=ROW)
    assert answer.status_code == 404
    assert answer.json()["error"] == "no such path; did you mean '/score'?"
    assert server.http.get("/score").status_code == 405
    assert "GET" in server.http.get("/score").json()["error"]
    assert server.http.get("/docs").status_code == 404
    answer = server.http.post("/score/", json=ROW)
    assert answer.status_code == 404
    assert answer.json()["error"] == "no such path; did you mean '/score'?"


def test_health_by_its_header_alone(server):
    answer = httpx2.head(f"{server.url}/health")
    assert (answer.status_code, answer.content) == (200, b"")


def slow(server, monkeypatch, seconds):
    """Make every pass take so long."""
    from shiftrm.serve import batching

    plain = batching.compute

    def compute(*args):
        time.sleep(seconds)
        return plain(*args)

    monkeypatch.setattr(batching, "compute", compute)


def test_time_out(serving, model, monkeypatch):
    server = serving(model, timeout=0.3)
    slow(server, monkeypatch, 1.0)
    assert server.post("/score", ROW, status=504)["error"] == "not done within 0.3 s"
    monkeypatch.undo()
    time.sleep(1)
    server.post("/score", ROW)


def test_a_body_that_does_not_come(serving, model):
    server = serving(model, timeout=0.3)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as line:
        line.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
        line.settimeout(5)
        assert line.recv(100).startswith(b"HTTP/1.1 504")


def connect(server):
    return socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2])), timeout=10)


@pytest.mark.parametrize("sent", [b"", b"POST /score HTTP/1.1\r\nHost: x\r\n"])
def test_a_header_that_does_not_come(serving, model, sent):
    """Its connection is closed; also when it drips, and when a first request was answered."""
    server = serving(model, timeout=0.5)
    with connect(server) as first, connect(server) as later:
        first.sendall(sent)
        assert is_healthy(later)
        assert closes(first, drip=b"X: y\r\n" if sent else b"")
        assert closes(later, drip=b"GET" if sent else b"")


def is_healthy(line):
    line.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n")
    found = b""
    while not found.endswith(b"}"):
        found += line.recv(10_000)
    return found.startswith(b"HTTP/1.1 200")


def closes(line, drip):
    """Whether the server closes a connection within 5 seconds, while something is sent."""
    line.settimeout(0.1)
    for _ in range(50):
        try:
            line.sendall(drip)
            if not line.recv(10_000):
                return True
        except TimeoutError:
            continue
        except ConnectionError:
            return True
    return False


def test_a_connection_in_use_is_kept(serving, model):
    """The time for a header is no limit on keeping a connection for more requests."""
    server = serving(model, timeout=2.0)
    with connect(server) as line:
        for _ in range(10):
            assert is_healthy(line)
            time.sleep(0.5)


def test_no_file_descriptors_left(serving, model, capfd):
    """One line; those who are connected are answered, and the others once some are free."""
    server = serving(model)
    capfd.readouterr()
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with connect(server) as line:
        assert is_healthy(line)
        waiting = [socket.socket() for _ in range(8)]
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (3, hard))
            for one in waiting:
                one.connect(("127.0.0.1", int(server.url.rpartition(":")[2])))
            time.sleep(0.3)
            assert is_healthy(line)
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
            for one in waiting:
                one.close()
    server.post("/score", ROW)
    assert server.said[1:] == ["connections wait: Too many open files"]
    assert capfd.readouterr().err == ""


def test_as_many_files_as_the_system_allows():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(512, hard), hard))
        raise_open_files()
        assert resource.getrlimit(resource.RLIMIT_NOFILE) == (hard, hard)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_too_many_requests(serving, model, monkeypatch):
    server = serving(model, max_requests=2)
    slow(server, monkeypatch, 0.5)
    statuses = []

    def ask():
        statuses.append(httpx2.post(f"{server.url}/score", json=ROW, timeout=30).status_code)

    threads = [threading.Thread(target=ask) for _ in range(6)]
    for thread in threads:
        thread.start()
    while server.service.running < 2:
        time.sleep(0.01)
    busy = server.http.post("/score", json=ROW)
    assert busy.status_code == 503
    assert busy.headers["Retry-After"] == "1"
    assert server.http.get("/health").status_code == 200
    for thread in threads:
        thread.join()
    assert sorted(set(statuses)) == [200, 503]
    assert statuses.count(200) == 2


def test_a_client_that_leaves_is_dropped(serving, model, monkeypatch):
    server = serving(model, batch_tokens=8)
    scored = []
    from shiftrm.serve import batching

    plain = batching.compute

    def compute(scorer, sequences, rows):
        time.sleep(0.05)
        scored.append(len(rows))
        return plain(scorer, sequences, rows)

    monkeypatch.setattr(batching, "compute", compute)
    words = ["red", "blue", "green", "small", "large", "cat", "dog", "bird"]
    texts = [" ".join(three) for three in itertools.product(words, repeat=3)]
    row = {"prompt": None, "responses": texts}
    with pytest.raises(httpx2.TimeoutException):
        httpx2.post(f"{server.url}/score", json=row, timeout=0.3)
    time.sleep(0.3)
    count = len(scored)
    server.post("/score", ROW)
    assert len(scored) <= count + 3
    assert sum(scored) < 256
    metrics = server.http.get("/metrics").text
    assert 'shiftrm_requests_total{path="/score",status="499"} 1.0' in metrics


def test_a_client_that_leaves_is_not_read(serving, model, monkeypatch):
    """While one request is being read, others wait; those whose clients leave are dropped."""
    server = serving(model)
    plain, read, go_on = server.service._read, [], threading.Event()

    def slowly(raw, form):
        read.append(raw)
        assert go_on.wait(30)
        return plain(raw, form)

    monkeypatch.setattr(server.service, "_read", slowly)
    first = threading.Thread(target=lambda: server.post("/score", ROW))
    first.start()
    while not read:
        time.sleep(0.01)
    for _ in range(5):
        with pytest.raises(httpx2.TimeoutException):
            httpx2.post(f"{server.url}/score", json=ROW, timeout=0.1)
    while server.service.running > 1:
        time.sleep(0.01)
    go_on.set()
    first.join()
    assert len(read) == 1
    server.post("/score", ROW)
    assert len(read) == 2


def test_a_request_that_is_read_without_an_end_shows(serving, model, monkeypatch):
    from shiftrm.serve import app

    server = serving(model, timeout=0.5)
    plain, go_on = app.parsed, threading.Event()

    def endless(raw):
        assert go_on.wait(30)
        return plain(raw)

    monkeypatch.setattr(app, "parsed", endless)
    try:
        error = server.post("/score", ROW, status=504)
        assert error["error"] == "not done within 0.5 s"
        while (health := server.http.get("/health")).status_code == 200:
            time.sleep(0.05)
        assert health.status_code == 503
        assert "read without an end" in health.json()["error"]
    finally:
        go_on.set()
    while server.http.get("/health").status_code == 503:
        time.sleep(0.01)
    while server.http.post("/score", json=ROW).status_code != 200:  # 0.5 s is little under load
        time.sleep(0.01)


def test_one_bad_sequence_fails_alone(serving, model, monkeypatch):
    """A pass that fails is tried in halves, as running out of memory is."""
    from shiftrm.serve import batching

    server = serving(model)
    plain, bad = batching.compute, server.models.current.whole_ids("the red dog")

    def compute(scorer, sequences, rows):
        if any(sequences[i] == tuple(bad) for row in rows for i in row.members):
            raise RuntimeError("no more\nmemory")
        return plain(scorer, sequences, rows)

    expected = server.post("/classify", {"input": ["the red cat", "a dog"]})["data"]
    monkeypatch.setattr(batching, "compute", compute)
    assert server.post("/classify", {"input": ["the red cat", "a dog"]})["data"] == expected
    error = server.post("/classify", {"input": ["the red cat", "the red dog"]}, status=500)
    assert error["error"] == "the model failed (RuntimeError: no more)"
    health = server.http.get("/health")
    assert (health.status_code, health.json()["status"]) == (503, "failing")
    server.post("/classify", {"input": "the red cat"})
    assert server.http.get("/health").status_code == 200


def test_an_error_outside_a_pass_does_not_end_the_server(serving, model, monkeypatch):
    from shiftrm.serve import batching

    server = serving(model)

    def broken(*_, **__):
        raise KeyError("x")

    monkeypatch.setattr(batching, "passes_of", broken)
    assert "the model failed (KeyError" in server.post("/score", ROW, status=500)["error"]
    monkeypatch.undo()
    server.post("/score", ROW)


def test_nothing_of_a_request_is_kept(serving, model, monkeypatch, capfd):
    from shiftrm.serve import formats

    server = serving(model)
    server.post("/score", ROW | {"prompt": "the secret"})
    server.post("/score", {"prompt": "the secret", "responses": [3]}, status=400)

    def broken(*_):
        raise KeyError("the secret")

    monkeypatch.setattr(formats.Question, "__init__", broken)
    error = server.post("/score", ROW | {"prompt": "the secret"}, status=500)
    assert error == {"error": "the server failed (KeyError)"}
    assert "KeyError at " in server.said[1]
    assert "secret" not in str(server.said) + "".join(capfd.readouterr())
