"""The reward server against calling the model directly, and a soak with bad clients.

Speed: responses and tokens per CPU second of the server process and of `Scorer` in this process,
for the same responses, and latency at 1, 8 and 64 clients. Wall-clock times count only on an idle
machine. Every reward is compared with the direct one.

Soak: good clients, clients that leave, huge and broken requests, and a change of the model every
few seconds, for `--soak` seconds. Fails if an answer is wrong or if memory keeps growing.

    python benchmarks/serve.py                       # both; the soak takes ten minutes
    python benchmarks/serve.py --soak 0              # speed only
    python benchmarks/serve.py --no-speed --soak 20  # a short soak
    python benchmarks/serve.py --model FOLDER        # a reward model of one's own
"""

import argparse
import contextlib
import http.client
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

os.environ.setdefault("HF_HUB_OFFLINE", "1")

WORDS = [f"w{i}" for i in range(2000)]
TOKEN = "a-token-of-the-benchmark"
HEADERS = {"Content-Type": "application/json", "Authorization": f"Bearer {TOKEN}"}
NEAR = 1e-5
"""Allowed difference from the direct reward: fp32 rounding for rewards of about 1."""

GROWTH = 1.10
"""Allowed memory at the end of a soak, relative to the end of its first quarter."""


def make_model(folder: Path, *, hidden: int, layers: int, seed: int) -> Path:
    """Write a reward model with random weights and a tokenizer of one token per word."""
    import torch
    from transformers import LlamaConfig, LlamaForSequenceClassification

    from shiftrm.world.world import word_tokenizer

    tokenizer = word_tokenizer(WORDS, model_max_length=2048)
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden,
        intermediate_size=3 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        num_labels=1,
    )
    model = LlamaForSequenceClassification(config)
    with torch.no_grad():
        model.score.weight.mul_(5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def rows(count: int, prompt: int, response: int, responses: int) -> list[dict[str, Any]]:
    """Return requests of random words; prompts and responses have unequal lengths."""
    rng = random.Random(0)

    def text(mean: int) -> str:
        return " ".join(rng.choices(WORDS, k=rng.randint(max(1, mean // 2), mean * 3 // 2)))

    return [
        {"prompt": text(prompt), "responses": [f" {text(response)}" for _ in range(responses)]}
        for _ in range(count)
    ]


@contextlib.contextmanager
def server(model: Path | str, *words: str) -> Iterator[tuple[int, psutil.Process]]:
    """Run `shiftrm serve`; yields its port and process."""
    command = [sys.executable, "-u", "-m", "shiftrm", "serve", "--model", str(model), "--port", "0"]
    process = subprocess.Popen(
        [*command, *words],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "SHIFTRM_TOKEN": TOKEN},
    )
    assert process.stdout is not None
    reading = None
    try:
        for line in process.stdout:
            if line.startswith("serving at "):
                break
        else:
            raise SystemExit("the server did not start")
        reading = threading.Thread(target=process.stdout.read)
        reading.start()
        yield int(line.strip().rpartition(":")[2]), psutil.Process(process.pid)
    finally:
        process.terminate()
        status = process.wait(60)
        if reading is not None:
            reading.join()
        process.stdout.close()
    if status:
        raise SystemExit(f"the server ended with status {status}")


def post(line: http.client.HTTPConnection, path: str, content: Any) -> tuple[int, Any]:
    """Send JSON; return the status and the JSON of the answer."""
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    line.request("POST", path, raw, HEADERS)
    answer = line.getresponse()
    return answer.status, json.loads(answer.read())


# -- speed -----------------------------------------------------------------------------------------


def asked(form: str, row: dict[str, Any], eos: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the requests for a row: one, or one for each response as OpenRLHF sends them."""
    if form == "score":
        return [("/score", row)]
    whole = [f"{row['prompt']}{response} {eos}" for response in row["responses"]]
    return [("/get_reward", {"query": [text], "prompts": [], "labels": []}) for text in whole]


def ask_all(port: int, requests: list[Any], clients: int) -> tuple[list[Any], list[float]]:
    """Send all requests from so many clients, each with its own connection.

    Returns:
        The rewards and the seconds of each request.
    """
    found: list[Any] = [None] * len(requests)
    seconds = [0.0] * len(requests)
    waiting = iter(range(len(requests)))
    lock = threading.Lock()

    def work() -> None:
        line = http.client.HTTPConnection("127.0.0.1", port, timeout=600)
        while True:
            with lock:
                number = next(waiting, None)
            if number is None:
                line.close()
                return
            start = time.perf_counter()
            status, answer = post(line, *requests[number])
            seconds[number] = time.perf_counter() - start
            assert status == 200, answer
            found[number] = answer["rewards"]

    threads = [threading.Thread(target=work) for _ in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found, seconds


def direct(
    model: Path | str, data: list[dict[str, Any]]
) -> tuple[list[float], dict[str, Any], int]:
    """Score everything in this process, 64 responses and one request at a time.

    Returns:
        The rewards, CPU seconds by way, and the number of tokens.
    """
    from shiftrm.models.responses import group_responses
    from shiftrm.models.scoring import Scorer

    scorer = Scorer.from_pretrained(model)
    groups = [group_responses(row) for row in data]
    scorer.score(groups[0])
    times, rewards = {}, []
    for name, parts in (
        ("direct, 64 at once", [[r for group in groups for r in group]]),
        ("direct, request by request", groups),
    ):
        start = time.process_time()
        rewards = [reward for part in parts for reward in scorer.score(part)]
        times[name] = time.process_time() - start
    tokens = sum(len(scorer.encode_response(r)) for group in groups for r in group)
    return rewards, times, tokens


def cpu(process: psutil.Process) -> float:
    """Return the CPU seconds of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


def measure_speed(args: argparse.Namespace, model: Path | str) -> list[dict[str, Any]]:
    """Print and return one row per way of asking."""
    from transformers import AutoTokenizer

    data = rows(args.requests, args.prompt, args.response, args.responses)
    expected, times, tokens = direct(model, data)
    count = len(expected)
    base = times["direct, 64 at once"]
    table = [
        {"way": way, "cpu": s, "ratio": base / s, "responses": count / s, "tokens": tokens / s}
        for way, s in times.items()
    ]
    eos = AutoTokenizer.from_pretrained(model).eos_token
    with server(model) as (port, process):
        for form in ("score", "get_reward"):
            requests = [request for row in data for request in asked(form, row, eos)]
            for clients in args.clients:
                ask_all(port, requests[:4], 1)
                before, start = cpu(process), time.perf_counter()
                found, seconds = ask_all(port, requests, clients)
                used, wall = cpu(process) - before, time.perf_counter() - start
                flat = [reward for rewards in found for reward in rewards]
                apart = max(abs(a - b) for a, b in zip(flat, expected, strict=True))
                assert apart < NEAR, f"{form}, {clients} clients: rewards differ by {apart}"
                cuts = statistics.quantiles(seconds, n=100)
                table.append(
                    {
                        "way": f"/{form}, {clients} client{'s' * (clients > 1)}",
                        "cpu": used,
                        "ratio": base / used,
                        "responses": count / used,
                        "tokens": tokens / used,
                        "requests_a_second": len(requests) / wall,
                        "cpu_ms_a_request": 1000 * used / len(requests),
                        "p50_ms": 1000 * cuts[49],
                        "p99_ms": 1000 * cuts[98],
                        "apart": apart,
                    }
                )
    for row in table:
        print("  ".join(f"{k} {v:.4g}" if isinstance(v, float) else str(v) for k, v in row.items()))
    return table


# -- soak ------------------------------------------------------------------------------------------


class Soak:
    """Clients of all kinds at one server, and what they met."""

    def __init__(self, port: int, expected: dict[str, list[Any]], data: list[Any]) -> None:
        self.port, self.expected, self.data = port, expected, data
        self.over = threading.Event()
        self.counts: Counter[str] = Counter()
        self.wrong: list[str] = []
        self._lock = threading.Lock()

    def count(self, what: str) -> None:
        with self._lock:
            self.counts[what] += 1

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)

    def good(self, seed: int) -> None:
        """Ask, and compare with the rewards of the model that the answer names."""
        rng, line = random.Random(seed), self.connect()
        while not self.over.is_set():
            number = rng.randrange(len(self.data))
            status, answer = post(line, "/score", self.data[number])
            self.count(f"good: {status}")
            if status != 200:
                self.wrong.append(str(answer))
                continue
            known = self.expected[answer["model"]][number]
            apart = max(abs(a - b) for a, b in zip(answer["rewards"], known, strict=True))
            if apart > NEAR:
                self.wrong.append(f"{answer['version']}: request {number} differs by {apart}")
        line.close()

    def leaving(self, seed: int) -> None:
        """Close the connection in the middle of a request, or before its answer."""
        rng = random.Random(seed)
        raw = json.dumps({"rows": self.data}).encode()
        head = f"POST /score HTTP/1.1\r\nHost: a\r\nAuthorization: Bearer {TOKEN}\r\n"
        while not self.over.wait(0.02):
            with socket.create_connection(("127.0.0.1", self.port)) as line:
                line.sendall(f"{head}Content-Length: {len(raw)}\r\n\r\n".encode())
                line.sendall(raw[: rng.choice([0, 10, len(raw) // 2, len(raw)])])
                time.sleep(rng.choice([0, 0.01, 0.1]))
            self.count("left")

    def odd(self, seed: int) -> None:
        """Send what must be refused."""
        rng = random.Random(seed)
        bodies = [
            b"", b"{", b"\xff", b"[" * 100_000, b'{"rows": [' + b"9" * 9000 + b"]}",
            {"prompt": "w1", "responses": [" w2" * 5000]}, {"prompt": 3, "responses": ["a"]},
            {"response_ids": [[10**9]]}, b'{"prompt": "' + b"x" * 3_000_000 + b'"}',
        ]  # fmt: skip
        while not self.over.wait(0.05):
            try:
                with contextlib.closing(self.connect()) as line:
                    status, answer = post(line, "/score", rng.choice(bodies))
            except (OSError, http.client.HTTPException):  # closed while a huge one was being sent
                self.count("odd: closed")
                continue
            self.count(f"odd: {status}")
            if status not in (400, 413) or list(answer) != ["error"] or "\n" in answer["error"]:
                self.wrong.append(f"an odd request got {status}: {answer}")

    def swapping(self, folders: list[Path]) -> None:
        turn = 0
        while not self.over.wait(3):
            turn += 1
            folder = folders[turn % len(folders)]
            with contextlib.closing(self.connect()) as line:
                status, answer = post(line, "/reload", {"model": str(folder)})
            self.count(f"reload: {status}")
            if (status == 200) != (folder.name in self.expected):
                self.wrong.append(f"reload of {folder}: {status} {answer}")


def soak(seconds: float, folder: Path) -> dict[str, Any]:
    """Run a soak; return counts, memory and wrong answers."""
    from shiftrm.models.scoring import Scorer, score_rows

    folders = [make_model(folder / f"m{i}", hidden=64, layers=2, seed=i) for i in range(2)]
    data = rows(40, 40, 20, 4)
    expected = {f.name: score_rows(Scorer.from_pretrained(f), data) for f in folders}
    (folder / "empty").mkdir()
    memory: list[float] = []
    with server(folders[0], "--max-megabytes", "1", "--timeout", "600") as (port, process):
        run = Soak(port, expected, data)
        threads = [threading.Thread(target=run.good, args=(i,)) for i in range(8)]
        threads += [threading.Thread(target=run.leaving, args=(i,)) for i in range(2)]
        threads += [threading.Thread(target=run.odd, args=(i,)) for i in range(2)]
        threads.append(threading.Thread(target=run.swapping, args=([*folders, folder / "empty"],)))
        for thread in threads:
            thread.start()
        end = time.monotonic() + seconds
        while time.monotonic() < end and all(thread.is_alive() for thread in threads):
            time.sleep(min(1.0, seconds / 20))
            memory.append(process.memory_info().rss / 2**20)
        alive = all(thread.is_alive() for thread in threads)
        run.over.set()
        for thread in threads:
            thread.join()
        descriptors = process.num_fds()
    quarter = memory[len(memory) // 4]
    # The mean of the last quarter: a change of the model holds two for a moment.
    last = statistics.mean(memory[-max(1, len(memory) // 4) :])
    found = {
        "seconds": seconds, "counts": dict(sorted(run.counts.items())), "wrong": len(run.wrong),
        "memory_first_quarter": quarter, "memory_last_quarter": last,
        "memory_most": max(memory), "open_files": descriptors,
    }  # fmt: skip
    print(json.dumps(found, indent=1))
    for line in run.wrong[:5]:
        print(f"wrong: {line}")
    if run.wrong or not alive:
        raise SystemExit("the soak met wrong answers")
    if last > GROWTH * quarter:
        raise SystemExit("the server's memory grew")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="reward model; by default one with random weights")
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--requests", type=int, default=128)
    parser.add_argument("--prompt", type=int, default=150, help="mean words")
    parser.add_argument("--response", type=int, default=70, help="mean words")
    parser.add_argument("--responses", type=int, default=4, help="to each prompt")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 64])
    parser.add_argument("--soak", type=float, default=600.0, help="seconds; 0 for none")
    parser.add_argument("--no-speed", action="store_true")
    parser.add_argument("--threads", type=int, default=1, help="of torch, here and in the server")
    parser.add_argument("--output", help="JSON of all numbers")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(args.threads)
    import torch

    torch.set_num_threads(args.threads)
    found: dict[str, Any] = {"torch": torch.__version__}
    with tempfile.TemporaryDirectory() as folder:
        if not args.no_speed:
            model = args.model or make_model(
                Path(folder) / "model", hidden=args.hidden, layers=args.layers, seed=0
            )
            found["speed"] = measure_speed(args, model)
        if args.soak:
            found["soak"] = soak(args.soak, Path(folder))
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
