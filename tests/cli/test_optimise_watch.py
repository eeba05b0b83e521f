"""`shiftrm optimise --watch`: a second reward model that is logged and trains nothing."""

import pytest

from shiftrm.files import read_jsonl
from shiftrm.models.sampling import Sample
from shiftrm.models.scoring import Scorer
from shiftrm.policies.ppo import PPOTrainer, Rollouts
from shiftrm.policies.text_rewards import Watch, with_gold
from tests.cli.conftest import refused
from tests.cli.test_optimise import run  # noqa: F401 - a fixture
from tests.cli.test_sft import equal

ROLLOUTS = Rollouts(
    ["a"] * 2,
    ["x", "yyy"],
    [True, False],
    [0.0, 0.0],
    [Sample([1], [2], True), Sample([1], [3, 3], False)],
    "the policy's",
)


def lengths(prompts, responses, *, finished):
    assert finished == [True, False]
    return [float(len(text)) for text in responses]


def test_what_was_seen_outlives_an_interruption(tmp_path):
    watch = Watch(lengths, tmp_path)
    watch.see(1, ROLLOUTS)
    watch.see(2, ROLLOUTS)
    with open(tmp_path / "watched.jsonl", "a") as file:
        file.write('\n{"step": 3, "gold_m')  # killed here
    again = Watch(lengths, tmp_path)
    assert again.beside({"step": 2, "reward": 5.0}) == {"step": 2, "reward": 5.0, "gold_mean": 2.0}
    assert again.beside({"step": 3}) == {"step": 3}
    again.see(3, ROLLOUTS)
    assert Watch(lengths, tmp_path).beside({"step": 3})["gold_mean"] == 2.0


def test_trls_name_for_it():
    row = {"step": 1, "rewards/gold/mean": 2.0, "rewards/gold/std": 1.0, "reward": 0.5}
    assert with_gold(row) == {"step": 1, "reward": 0.5, "gold_mean": 2.0}
    assert with_gold({"step": 2}) == {"step": 2}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo"])
def test_the_policy_is_the_same_as_without(run, method):  # noqa: F811
    status, output = run(method, "--watch", "reward", output="watched")
    assert status == 0, output.err
    assert run(method, output="plain")[0] == 0
    assert equal("watched", "plain")
    log = read_jsonl("watched/training_log.jsonl")
    assert len(log) == 4
    for row in log:  # the same model watches and rewards
        assert row["gold_mean"] == pytest.approx(row["reward"], abs=1e-5)
    assert "gold_mean" not in read_jsonl("plain/training_log.jsonl")[0]


@pytest.mark.slow
def test_ppo_continues_with_what_it_saw(run, monkeypatch):  # noqa: F811
    assert run("ppo", "--watch", "reward", output="straight")[0] == 0
    plain = PPOTrainer.step

    def stopping(self, step):
        if step == 4:
            raise KeyboardInterrupt
        return plain(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(PPOTrainer, "step", stopping)
        assert run("ppo", "--watch", "reward")[0] == 130
    loaded = []
    score = Scorer.score
    monkeypatch.setattr(Scorer, "score", lambda *a, **k: loaded.append(1) or score(*a, **k))
    assert run("ppo", "--watch", "reward")[0] == 0
    rows = [read_jsonl(f"{name}/training_log.jsonl") for name in ("out", "straight")]
    assert rows[0] == rows[1]
    assert len(loaded) <= 2 * 2 + 1, "two steps were done again, not four"


def test_bad_watches(run, shiftrm):  # noqa: F811
    base = ["optimise", "ppo", "--policy", "policy", "--reward", "reward"]
    base += ["--prompts", "prompts.jsonl", "--output", "out"]
    refused(shiftrm, [*base, "--watch", "policy"], "policy: is not a reward model")
    refused(shiftrm, [*base, "--watch", "gone"], "gone: no such folder; give --watch")
    words = ["optimise", "dpo", "--policy", "policy", "--pairs", "pairs.jsonl", "--output", "out"]
    refused(shiftrm, [*words, "--watch", "reward"], "leave out --watch")
