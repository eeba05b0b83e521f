"""`shiftrm serve` as a process: signals, ports, logs, and what it says."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import httpx2
import pytest

from shiftrm.cli import main
from shiftrm.models.scoring import Scorer
from tests.serve.conftest import KEY

pytestmark = pytest.mark.slow

ROW = {"prompt": "the red", "responses": [" cat", " dog runs"]}


class Process:
    """The command, started, and ready to answer."""

    def __init__(self, *words, **environment):
        self.process = subprocess.Popen(
            [sys.executable, "-u", "-m", "shiftrm", "serve", *map(str, words)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        )
        self.lines = []
        for line in self.process.stdout:
            self.lines.append(line.strip())
            found = re.fullmatch(r"serving at (http://\S+)", line.strip())
            if found:
                self.url = found[1]
                return
        raise AssertionError(self.process.stderr.read())

    def end(self, kind):
        """Send a signal; return status, output and errors."""
        self.process.send_signal(kind)
        out, err = self.process.communicate(timeout=60)
        err = re.sub(r"serve, .* so far\n", "", err)  # on a busy machine, loading takes long
        return self.process.returncode, out, err


@pytest.fixture
def start():
    started = []

    def begin(*words, **environment):
        started.append(Process(*words, **environment))
        return started[-1]

    yield begin
    for one in started:
        one.process.kill()
        one.process.communicate()


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_after_the_running_requests(start, model, tmp_path, kind):
    """A request of many passes is under way when the signal comes; it is answered in full."""
    server = start("--model", model, "--port", 0, "--batch-tokens", 1)
    body = {"input": [[4 + i % 16, 4 + j % 16, 4 + i // 16] for i in range(100) for j in range(16)]}
    answers = []
    asking = threading.Thread(
        target=lambda: answers.append(httpx2.post(f"{server.url}/classify", json=body, timeout=60))
    )
    asking.start()
    deadline = time.monotonic() + 30
    while "shiftrm_requests_running 2.0" not in httpx2.get(f"{server.url}/metrics").text:
        assert time.monotonic() < deadline
    status, out, err = server.end(kind)
    asking.join()
    assert (status, err) == (0, "")
    assert out.splitlines()[-1] == "stopped"
    assert answers[0].status_code == 200
    found = [d["probs"][0] for d in answers[0].json()["data"]]
    scorer = Scorer.from_pretrained(model)
    assert found == pytest.approx(scorer.score_ids(body["input"]), abs=1e-6)


def test_what_it_says_and_writes(start, model, other, tmp_path):
    log, requests = tmp_path / "log", tmp_path / "requests.jsonl"
    server = start(
        "--model", model, "--port", 0, "--log", log, "--log-requests", requests,
        SHIFTRM_TOKEN=KEY,
    )  # fmt: skip
    headers = {"Authorization": f"Bearer {KEY}"}
    answer = httpx2.post(f"{server.url}/score", json=ROW, headers=headers).json()
    httpx2.post(f"{server.url}/reload", json={"model": str(other)}, headers=headers, timeout=60)
    httpx2.post(f"{server.url}/reload", json={"model": str(tmp_path)}, headers=headers, timeout=60)
    httpx2.get(f"{server.url}/%1b[31m", headers=headers)
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as line:
        line.sendall(b"the secret is no HTTP\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 400")
    status, out, err = server.end(signal.SIGTERM)
    assert (status, err) == (0, "")
    said = "\n".join(server.lines) + "\n" + out
    version = answer["version"]
    assert re.fullmatch(
        rf"model {version} from {model} \(prefixes are shared\)\n"
        rf"serving at {server.url}\n"
        rf"model other@\w+ from {other} \(prefixes are shared\)\n"
        rf"the model stays as it is: {tmp_path}: cannot be loaded [^\n]*\n"
        r"stopped\n",
        said,
    )
    logged = (log / "progress.log").read_text().splitlines()
    assert [line[20:] for line in logged if " so far" not in line] == said.splitlines()
    (row,) = map(json.loads, requests.read_text().splitlines())
    assert row["request"] == ROW
    assert row["rewards"] == answer["rewards"]


def test_nobody_reads_its_output(start, model, other, tmp_path):
    """As with `| head -2`: the pipe is closed after the first lines."""
    server = start("--model", model, "--port", 0, "--log", tmp_path, SHIFTRM_TOKEN=KEY)
    server.process.stdout.close()
    headers = {"Authorization": f"Bearer {KEY}"}
    for folder in (other, model):
        url = f"{server.url}/reload"
        found = httpx2.post(url, json={"model": str(folder)}, headers=headers, timeout=60)
        assert found.status_code == 200
    server.process.send_signal(signal.SIGTERM)
    assert server.process.wait(60) == 0
    assert "Error" not in server.process.stderr.read()
    logged = (tmp_path / "progress.log").read_text()
    assert logged.endswith("stopped\n")
    assert "model other@" in logged


def run(capsys, *words):
    capsys.readouterr()
    status = main(["serve", *map(str, words)])
    return status, capsys.readouterr()


def one_line(output, says):
    assert says in output.err
    assert output.err.count("\n") == 1
    assert output.out == ""


def test_a_port_in_use(capsys, model):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        status, output = run(capsys, "--model", model, "--port", port)
    assert status == 2
    one_line(output, f"127.0.0.1:{port}: cannot listen there (Address already in use)")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--host", "0.0.0.0"], "set SHIFTRM_TOKEN"),
        (["--port", "70000"], "65535"),
        (["--timeout", "0"], "--timeout"),
        (["--max-megabytes", "inf"], "--max-megabytes"),
        (["--log-requests", "requests.jsonl.gz"], "leave out .gz"),
        (["--batch-tokens", "0"], "--batch-tokens"),
        (["--log-requests", "requests.txt"], "JSON lines"),
    ],
)
def test_bad_options(capsys, model, monkeypatch, tmp_path, words, says):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("SHIFTRM_TOKEN", raising=False)
    status, output = run(capsys, "--model", model, *words)
    assert status == 2
    one_line(output, says)
    assert os.listdir(tmp_path) == []


def test_bad_models(capsys, tmp_path):
    for folder in (tmp_path / "missing", tmp_path):
        status, output = run(capsys, "--model", folder, "--port", 0)
        assert status == 2
        one_line(output, str(folder))


def test_without_the_packages(capsys, model, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    status, output = run(capsys, "--model", model)
    assert status == 2
    one_line(output, "serving needs the package uvicorn: pip install 'shiftrm[serve]'")
