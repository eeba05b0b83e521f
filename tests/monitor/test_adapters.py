"""The adapters, called exactly as OpenRLHF and verl call a reward function.

`call_as_openrlhf` and `call_as_verl` do what the code of the trainers does at the commits named in
`adapters`: one text at a time, in threads or awaited, and the reading of what comes back.
"""

import asyncio
import inspect
import threading
from dataclasses import replace
from functools import partial

import pytest
import torch

from shiftrm.errors import UserError
from shiftrm.files import read_jsonl
from shiftrm.monitor.adapters import openrlhf, openrlhf_reward, verl, verl_reward
from shiftrm.monitor.monitor import DriftMonitor
from shiftrm.monitor.settings import MonitorConfig
from shiftrm.monitor.signals import SIGNALS

SMALL = MonitorConfig(
    threshold=0.7, budget=60, audit_pairs=20, audit_every=1, baseline=2, window=2, sight_pairs=8
)
ALL = replace(SMALL, signals=tuple(SIGNALS.names()))
EOS = "</s>"
SAMPLES = [
    (f"question {p}?", f" answer {p} in a few words" + " so" * k, f"label {p}")
    for p in range(3)
    for k in range(4)
]


def by_length(prompts, responses, *, finished):
    return [float(len(r)) for r in responses]


def call_as_openrlhf(reward_func, samples):
    """`SingleTurnExecutor`: chunks of one in threads, all samples of a step at once."""

    async def one(prompt, response, label):
        [info] = await asyncio.gather(
            asyncio.to_thread(reward_func, [prompt + response + EOS], [prompt], [label])
        )
        scores = info.get("scores")
        scores = info.get("rewards") if scores is None else scores
        logs = {}
        for key, value in (info.get("extra_logs") or {}).items():
            if isinstance(value, torch.Tensor):
                value = value.flatten()[0].item()
            logs[key] = torch.tensor([value])
        return torch.tensor([info.get("rewards")]), torch.tensor([scores]), logs

    async def all_of_them():
        return await asyncio.gather(*(one(*sample) for sample in samples))

    return asyncio.run(all_of_them())


def test_openrlhf_with_a_reward_model(tmp_path):
    monitor = DriftMonitor(by_length, tmp_path, SMALL, answers=lambda p: ["win"] * len(p))
    reward_func = openrlhf_reward(monitor, step_size=len(SAMPLES), end_of_text=EOS)
    for _ in range(2):
        found = call_as_openrlhf(reward_func, SAMPLES)
        assert [float(r) for r, _, _ in found] == [float(len(text)) for _, text, _ in SAMPLES]
        assert {tuple(logs) for _, _, logs in found} == {
            ("drift_evidence", "drift_accuracy_bound", "drift_labels", "drift_alarm")
        }
    steps = read_jsonl(tmp_path / "steps.jsonl")
    assert [row["step"] for row in steps] == [1, 2]
    probe = read_jsonl(tmp_path / "probe.jsonl")
    assert sorted(row["prompt"] for row in probe[:3]) == [f"question {p}?" for p in range(3)]
    assert all(len(row["responses"]) == 4 and row["finished"] == [True] * 4 for row in probe)
    assert not any(EOS in text for row in probe for text in row["responses"])


def test_openrlhf_with_the_users_function(tmp_path):
    asked = []

    def mine(queries, prompts, labels, **kwargs):
        asked.append((queries[0], prompts[0], labels[0]))
        score = torch.tensor([float(len(queries[0]))])
        return {"rewards": score, "scores": score, "extra_logs": {"mine": score}}

    monitor = DriftMonitor(openrlhf(mine), tmp_path, ALL)
    reward_func = openrlhf_reward(monitor, step_size=len(SAMPLES), end_of_text=EOS)
    found = call_as_openrlhf(reward_func, SAMPLES)
    for (reward, score, logs), (prompt, response, _) in zip(found, SAMPLES, strict=True):
        assert float(reward) == float(score) == len(prompt + response + EOS)
        assert float(logs["mine"]) == float(reward)
    (step,) = read_jsonl(tmp_path / "steps.jsonl")
    assert {"spread", "sight_other_prompt", "sight_cut"} <= step["signals"].keys()
    own = {(prompt + text + EOS, prompt, label) for prompt, text, label in SAMPLES}
    changed = [query for query in asked if query not in own]
    assert changed  # texts of the sight tests, with the label of their prompt
    assert {query[1:] for query in changed} <= {query[1:] for query in own}


def test_openrlhf_truncated(tmp_path):
    monitor = DriftMonitor(by_length, tmp_path, SMALL)
    reward_func = openrlhf_reward(monitor, step_size=2, end_of_text=EOS)
    reward_func(["q one", "q two" + EOS], ["q", "q"], [None, None])
    (row,) = read_jsonl(tmp_path / "probe.jsonl")
    assert (row["responses"], row["finished"]) == ([" one", " two"], [False, True])


def call_as_verl(function, samples):
    """`get_custom_reward_fn` and `NaiveRewardManager.run_single` of the reward loop."""

    def with_more(raw, extra, *args, **kwargs):
        return raw(*args, **{**kwargs, **extra})

    async def with_more_later(raw, extra, *args, **kwargs):
        return await raw(*args, **{**kwargs, **extra})

    later = inspect.iscoroutinefunction(function)
    compute_score = partial(with_more_later if later else with_more, function, {})

    async def one(prompt, response, label):
        given = {
            "data_source": "set",
            "solution_str": response,
            "ground_truth": label,
            "extra_info": {"prompt": prompt, "num_turns": None, "rollout_reward_scores": {}},
        }
        if inspect.iscoroutinefunction(compute_score):
            result = await compute_score(**given)
        else:
            loop = asyncio.get_running_loop()
            result = await loop.run_in_executor(None, lambda: compute_score(**given))
        return result["score"] if isinstance(result, dict) else result

    async def all_of_them():
        return await asyncio.gather(*(one(*sample) for sample in samples))

    return asyncio.run(all_of_them())


def test_verl_with_a_reward_model(tmp_path):
    monitor = DriftMonitor(by_length, tmp_path, SMALL)
    found = call_as_verl(verl_reward(monitor, step_size=len(SAMPLES)), SAMPLES)
    assert found == [float(len(text)) for _, text, _ in SAMPLES]
    assert len(read_jsonl(tmp_path / "steps.jsonl")) == 1


def plain(data_source, solution_str, ground_truth, extra_info=None):
    return float(len(solution_str) + len(ground_truth))


def mapping(data_source, solution_str, ground_truth, extra_info=None):
    return {"score": float(len(solution_str)), "acc": 1.0}


async def awaited(data_source, solution_str, ground_truth, extra_info=None):
    await asyncio.sleep(0)
    return float(len(solution_str))


@pytest.mark.parametrize("function", [plain, mapping, awaited])
def test_verl_with_the_users_function(function, tmp_path):
    monitor = DriftMonitor(verl(function), tmp_path, ALL)
    watched = verl_reward(monitor, step_size=len(SAMPLES))
    assert inspect.iscoroutinefunction(watched) == inspect.iscoroutinefunction(function)
    assert call_as_verl(watched, SAMPLES) == call_as_verl(function, SAMPLES)
    (step,) = read_jsonl(tmp_path / "steps.jsonl")
    assert {"spread", "sight_other_prompt", "sight_cut"} <= step["signals"].keys()
    assert monitor.errors == 0


def test_verl_without_a_prompt(tmp_path):
    nothing = {"data_source": "set", "solution_str": "x", "ground_truth": "y", "extra_info": {}}
    with pytest.raises(UserError, match="extra_info has no prompt"):
        verl_reward(DriftMonitor(by_length, tmp_path / "a", SMALL), step_size=2)(**nothing)
    # The user's function needs none: its run goes on, with a warning.
    watched = verl_reward(DriftMonitor(verl(plain), tmp_path / "b", SMALL), step_size=2)
    with pytest.warns(UserWarning, match="extra_info has no prompt"):
        assert watched(**nothing) == 2.0
    named = verl_reward(
        DriftMonitor(verl(plain), tmp_path / "c", SMALL), step_size=1, prompt_of=lambda _: "p"
    )
    assert named(**nothing) == 2.0
    assert read_jsonl(tmp_path / "c" / "probe.jsonl")[0]["prompt"] == "p"


def test_many_threads_lose_nothing(tmp_path):
    monitor = DriftMonitor(by_length, tmp_path, MonitorConfig(budget=0, signals=("length",)))
    reward_func = openrlhf_reward(monitor, step_size=25)
    threads = [
        threading.Thread(target=lambda: [reward_func(["q a"], ["q"], [0]) for _ in range(50)])
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [row["step"] for row in read_jsonl(tmp_path / "steps.jsonl")] == list(range(1, 17))


@pytest.mark.parametrize("make", [openrlhf_reward, verl_reward])
def test_step_size(make, tmp_path):
    with pytest.raises(UserError, match="step_size is 0"):
        make(DriftMonitor(by_length, tmp_path, SMALL), step_size=0)
