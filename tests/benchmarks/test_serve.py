"""The benchmark of the server runs, compares every reward, and notices a wrong one."""

import json
import sys

import pytest

import serve as benchmark

SMALL = ["--requests", "6", "--hidden", "32", "--layers", "1", "--prompt", "12", "--response", "6"]


@pytest.mark.slow
def test_a_small_run(tmp_path, monkeypatch, capsys):
    output = tmp_path / "numbers.json"
    words = [*SMALL, "--clients", "1", "3", "--soak", "6", "--output", str(output)]
    monkeypatch.setattr(sys, "argv", ["serve.py", *words])
    benchmark.main()
    found = json.loads(output.read_text())
    ways = [row["way"] for row in found["speed"]]
    assert ways[2:] == [
        *("/score, 1 client", "/score, 3 clients"),
        *("/get_reward, 1 client", "/get_reward, 3 clients"),
    ]
    assert max(row.get("apart", 0) for row in found["speed"]) < 1e-6
    soak = found["soak"]
    assert soak["wrong"] == 0
    assert soak["counts"]["good: 200"] > 0
    assert soak["counts"]["left"] > 0
    assert soak["counts"]["odd: 400"] > 0


def test_a_wrong_reward_is_noticed(monkeypatch):
    answers = iter([{"model": "m", "version": "v", "rewards": [0.5, 0.6]}] * 3)

    def post(*_):
        answer = next(answers, None)
        if answer is None:
            run.over.set()
            return 500, {"error": "x"}
        return 200, answer

    monkeypatch.setattr(benchmark, "post", post)
    run = benchmark.Soak(0, {"m": [[0.5, 0.6]]}, [{}])
    run.good(0)
    assert run.wrong == ["{'error': 'x'}"]
    answers = iter([{"model": "m", "version": "v", "rewards": [0.5, 0.7]}])
    run = benchmark.Soak(0, {"m": [[0.5, 0.6]]}, [{}])
    run.good(0)
    assert len(run.wrong) == 2
    assert "differs by 0.0999" in run.wrong[0]
