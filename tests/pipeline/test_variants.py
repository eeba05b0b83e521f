"""Runs in other ways: optimisers, LoRA, judges, samplers, trackers, data of one's own."""

import json
import math

import pytest
import torch

from shiftrm.cli import main
from shiftrm.files import read_jsonl
from shiftrm.measure.overoptimisation import overoptimisation, path_from_rows, smoothed
from shiftrm.measure.sight import sight_tests
from shiftrm.metrics import metric
from shiftrm.pipeline import evaluating
from shiftrm.pipeline.engine import random_seed
from shiftrm.pipeline.estimate import estimate
from shiftrm.pipeline.plan import plan
from shiftrm.pipeline.run import read_recipe
from shiftrm.policies.text_rewards import open_watch
from shiftrm.records import read_records
from shiftrm.report import measurements, render_page, summary
from shiftrm.world.gold import gold_reward
from tests.fake_endpoint import Fail, FakeEndpoint
from tests.fake_vllm import continued, make_program
from tests.measure.test_judge_endpoint import likes
from tests.pipeline.gold_world import recipe, write_recipe

pytestmark = pytest.mark.slow

KEY = "sk-very-secret-0123456789"
RLOO = {"num_generations": 2, "num_train_epochs": 1, "beta": 0.05, "logging_steps": 1}


def metrics(records, stage, method):
    """Last values by metric."""
    return {r.metric: r.value for r in records if (r.stage, r.method) == (stage, method)}


def run(path, output, *words):
    status = main(["run", str(path), "--output", str(output), *words])
    return status, read_records(output / "records.jsonl") if status == 0 else None


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")  # TRL's
def test_the_gold_world_judges_and_watches(world, tmp_path, here, capsys):
    """LoRA for all, bf16, rloo and ppo, a retrained arm, best-of-n, TensorBoard."""
    path = write_recipe(
        tmp_path / "mine.yaml",
        world,
        preset="adaptive",
        rounds=2,
        methods={
            "fixed": {"reward": "fixed"},
            "metarm": {"reward": "metarm", "rounds": 1},
            "rloo": {
                "reward": "retrained",
                "policy": "rloo",
                "rounds": 1,
                "policy_settings": {**RLOO, "kl_samples": 4},
            },
        },
        policy={"batch_size": 8, "settings": recipe(world)["policy"]["settings"]},
        lora={"lora_r": 4, "lora_target_modules": ["q_proj", "v_proj"]},
        judge={"kind": "gold"},
        evaluation={"prompts": 12, "judged": 6, "responses": 4, "gold": "gold", "best_of_n": 4},
        execution={"in_process": True, "report_to": "tensorboard"},
    )
    output = tmp_path / "run"
    status, records = run(path, output)
    assert status == 0, capsys.readouterr().err
    policy = output / "methods" / "fixed" / "round-2" / "policy" / "model"
    assert list(policy.glob("runs/**/events.out.tfevents.*")), "TensorBoard's files come along"
    assert (policy / "adapter" / "adapter_model.safetensors").is_file()
    assert (output / "reward_model" / "model" / "adapter").is_dir()

    # What dry runs say of steps is what was done.
    found = read_recipe(path)
    said = {s.stage: s.steps for s in estimate(found, plan(found)).stages if s.steps is not None}
    for stage, steps in said.items():
        log = read_jsonl(output / stage / "model" / "training_log.jsonl")
        assert max(row["step"] for row in log) in (steps, steps - 1), stage
    assert said["methods/rloo/round-1/policy"] > 2

    # Gold by step, and what is recorded of it.
    log = read_jsonl(policy / "training_log.jsonl")
    assert all(math.isfinite(row["gold_mean"]) for row in log)
    steps = [r for r in records if (r.stage, r.method, r.round) == ("ppo", "fixed", 2)]
    assert {r.step for r in steps if r.metric == "gold_mean"} == {1, 2}
    walked = path_from_rows(log, kl="sequence_kl", proxy="standardised_mean", gold="gold_mean")
    expected = overoptimisation(smoothed(walked, 1))
    end = metrics(records, "evaluate", "fixed")
    assert end["overopt_peak_gold"] == pytest.approx(expected.peak_gold, abs=1e-6)
    assert end["overopt_final_kl"] == pytest.approx(log[-1]["sequence_kl"], abs=1e-6)
    assert end["overopt_drop"] >= 0
    assert "overopt_final_gold" in metrics(records, "evaluate", "rloo")
    rloo = output / "methods" / "rloo" / "round-1" / "policy" / "model" / "training_log.jsonl"
    assert all("gold_mean" in row for row in read_jsonl(rloo))

    # The same numbers from the responses themselves.
    rows = read_jsonl(output / "methods" / "fixed" / "round-2" / "responses" / "responses.jsonl")
    golds = [
        gold_reward(row["prompt"], text, finished=done)
        for row in rows
        for text, done in zip(row["responses"], row["finished"], strict=True)
    ]
    assert end["gold_mean"] == pytest.approx(sum(golds) / len(golds), abs=1e-6)
    kept = str(output / "reward_model" / "model")
    for judge, name in (("gold", "gold_sight_{}"), (kept, "sight_{}_after")):
        seed = random_seed(found.seed, "sight")
        for test in sight_tests(open_watch(judge), rows, count=400, seed=seed):
            measured = end.get(name.format(test.kind))
            assert measured == (test.share and pytest.approx(test.share.value)), test.kind
            half = end.get(f"half_width_{name.format(test.kind)}")
            if test.share is None or test.share.low is None or judge == "gold":
                assert half is None
            else:
                assert half == pytest.approx((test.share.high - test.share.low) / 2, abs=1e-7)
    assert "sight_repeated_before" in end
    assert end["win_vs_sft"] + end["tie_vs_sft"] + end["lose_vs_sft"] == pytest.approx(1)
    bon = {(r.metric, r.step): r.value for r in records if r.stage == "best_of_n"}
    assert bon["bon_kl", 4] == pytest.approx(math.log(4) - 3 / 4)
    assert bon["bon_proxy", 4] >= bon["bon_proxy", 1]
    priced = {name.removeprefix("pays_") for name in end if name.startswith("pays_")}
    assert priced > {"explained", "praise_words"}
    assert all(f"overpays_{name}" in end for name in priced - {"explained"})
    compared = {(r.method, r.metric) for r in records if r.stage == "compare"}
    assert {
        ("fixed", "win_vs_rloo"),
        ("rloo", "win_vs_metarm"),
        ("fixed", "win_vs_sft"),
    } <= compared

    # Proxy and gold are of what the page shows.
    assert "Gold" in (output / "report.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tuned(world, tmp_path_factory):
    """A fine-tuned policy and a reward model on it, made by hand as a user would."""
    folder = tmp_path_factory.mktemp("tuned")
    small = ["max_steps=2", "max_length=64", "per_device_train_batch_size=4"]
    assert not main(
        ["sft", "--model", str(world / "base_model"), "--demonstrations", str(world / "sft.jsonl"),
         "--output", str(folder / "sft"), *small]
    )  # fmt: skip
    assert not main(
        ["train", "--model", str(folder / "sft"), "--pairs", str(world / "pairs.jsonl"),
         "--output", str(folder / "reward"), *small]
    )  # fmt: skip
    return folder


class Embedder:
    """Two directions by the length of the text."""

    def __call__(self, texts):
        return torch.tensor([[1.0, 0.1 * len(text)] for text in texts]).numpy()


def test_an_endpoint_judges(world, tuned, tmp_path, here, capsys, monkeypatch):
    """A fine-tuned model, grpo, another reward model as gold, an embedder; nothing asked twice."""
    for name in ("OPENAI_BASE_URL", "OPENAI_ORG_ID"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(evaluating, "load_embedder", lambda name: Embedder())
    path = write_recipe(
        tmp_path / "mine.yaml",
        world,
        model=str(tuned / "sft"),
        sft=None,
        policy={
            "method": "grpo",
            "batch_size": 4,
            "settings": {**RLOO, "max_steps": 2, "learning_rate": 0.05},
        },
        evaluation={
            "prompts": 6,
            "judged": 4,
            "gold": str(tuned / "reward"),
            "embedder": "some/embedder",
        },
    )
    output = tmp_path / "run"
    with FakeEndpoint(answer=likes("the"), key=KEY) as server:
        judge = [f"judge.base_url={server.url}", "judge.kind=endpoint", "judge.model=fake"]
        server.rule = lambda body: Fail(404)
        status, _ = run(path, output, *judge)
        said = capsys.readouterr().err.splitlines()[-1]
        assert status == 2
        assert said.startswith("shiftrm: error: stage methods/fixed/round-1/judgement:")
        server.rule = None
        status, records = run(path, output, *judge)
        assert status == 0, capsys.readouterr().err
        asked = len(server.bodies)
        assert asked
        first = (output / "records.jsonl").read_bytes()
        for stage in ("comparison", "methods/fixed/round-1/judgement"):
            for file in sorted((output / stage).rglob("*")):
                file.unlink()
            (output / stage).rmdir()
        status, _ = run(path, output, *judge)
        assert status == 0, capsys.readouterr().err
        assert len(server.bodies) == asked, "all answers are in the cache"
    assert (output / "records.jsonl").read_bytes() == first
    for file in output.rglob("*"):
        assert not file.is_file() or KEY.encode() not in file.read_bytes(), file
    end = metrics(records, "evaluate", "fixed")
    assert {"gold_mean", "embedding_similarity", "judge_consistency_vs_sft"} <= set(end)
    assert {"unjudged_vs_sft", "win_low_vs_sft", "accuracy_policy_after"} <= set(end)
    assert "overopt_peak_kl" in end
    read, recorded = names_read(records, monkeypatch), {r.metric for r in records}
    assert read - recorded <= {
        *(f"{outcome}_vs_fixed" for outcome in ("win", "tie", "lose")),  # there is one arm alone
        *("sequence_kl", "standardised_mean", "rewards/accuracies"),  # GRPO logs some of them
        "eval_accuracy_final",  # the diamonds are of the evaluation
        "difference_variance",  # GRPO logs none
        "meta_influence",  # that arm adapts nothing
        "demonstrations",  # the model is fine-tuned already
        *("bon_kl", "bon_proxy", "bon_gold", "bon_drop"),  # not asked for
        "pays_explained",  # too few prompts for a fit
    }
    assert recorded - read <= UNREAD


UNREAD = {
    *("loss", "entropy", "empty_responses"),
    "eval_accuracy",  # read where an arm trains reward models
    *("kl_coefficient", "length_mean"),
}
"""What a run records for those who read its records: neither page nor summary shows it."""


def names_read(records, monkeypatch):
    """The metrics that the page and the summary look for."""
    read = set()

    def noted(name):
        read.add(name)
        return metric(name)

    monkeypatch.setattr(measurements, "declared", noted)
    assert summary(records)
    assert render_page(records)
    return read


def test_a_running_server_samples(world, tuned, tmp_path, here, capsys):
    """It has to serve every policy under the name of its folder."""
    output = tmp_path / "run"
    policies = [str(tuned / "sft"), str(output / "methods/dpo/round-1/policy/model")]
    with FakeEndpoint(answer=continued, models=policies) as server:
        path = write_recipe(
            tmp_path / "mine.yaml",
            world,
            model=policies[0],
            sft=None,
            methods={"dpo": {"reward": "fixed", "policy": "dpo"}},
            sampler=server.url,
        )
        status, _ = run(path, output)
        assert status == 0, capsys.readouterr().err
        assert [body["model"] for body in (server.bodies[0], server.bodies[-1])] == policies
        server.models.pop()
        status, _ = run(path, tmp_path / "other")
    assert status == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "stage methods/dpo/round-1/responses: http://" in said
    assert "start vLLM with this policy" in said


def test_a_reward_model_judges(world, tuned, tmp_path, here, capsys, monkeypatch):
    """Of DPO, sampled by servers of vLLM that the run starts."""
    monkeypatch.setenv("PATH", str(make_program(tmp_path / "bin").parent), prepend=":")
    monkeypatch.setenv("FAKE_VLLM_RECORD", str(tmp_path / "served.json"))
    path = write_recipe(
        tmp_path / "mine.yaml",
        world,
        model=str(tuned / "sft"),
        sft=None,
        sampler="vllm",
        methods={"dpo": {"reward": "fixed", "policy": "dpo"}},
        judge={"kind": "reward-model", "model": str(tuned / "reward")},
    )
    status, records = run(path, tmp_path / "run")
    assert status == 0, capsys.readouterr().err
    end = metrics(records, "evaluate", "dpo")
    assert end["win_vs_sft"] + end["tie_vs_sft"] + end["lose_vs_sft"] == pytest.approx(1)
    assert not any(name.startswith("overopt") for name in end), "nobody watched"
    served = json.loads((tmp_path / "served.json").read_text())["words"]
    assert served[1] == str(tmp_path / "run/methods/dpo/round-1/policy/model")
