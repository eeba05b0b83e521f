"""shiftrm meta-train and meta-test on a user's folder of domains."""

import shutil

import pytest
import torch
from transformers import AutoModelForCausalLM

from shiftrm.files import read_jsonl
from shiftrm.models.scoring import Scorer
from shiftrm.records import read_records
from tests.oodpl.domains import interrupt_training, write_animals

TRAIN = ["meta-train", "--model", "policy", "--domains", "domains", "--output", "out"]
SMALL = ["max_steps=4", "support_batch_size=3", "query_batch_size=2", "inner_learning_rate=0.05"]
TEST = ["meta-test", "--policy", "policy", "--reward", "reward", "--domains", "domains"]
TEST += ["--output", "test", "evaluation.sampling.max_new_tokens=4"]


@pytest.fixture
def folder(files, reward_model, tokenizer):
    """Checkpoints, and four domains of which one is held out and one is watched."""
    write_animals(files / "domains")
    reward_model.save_pretrained(files / "reward")
    tokenizer.save_pretrained(files / "reward")
    return files


def weights(folder):
    return dict(Scorer.from_pretrained(folder).model.named_parameters())


def test_meta_train_writes_a_reward_model_with_its_card(shiftrm, folder):
    status, said = shiftrm(*TRAIN, *SMALL, "beta=0.7")
    assert status == 0, said.err
    assert "2 source domains, 4 outer steps of 1 tasks, D = 1, beta = 0.7" in said.out
    assert "A_PL on 1 validation domains" in said.out
    card = (folder / "out" / "README.md").read_text()
    assert "- beta: 0.7" in card
    assert "shiftrm" in card
    [reward] = Scorer.from_pretrained(folder / "out")(["the red"], [" cat"])
    assert reward == pytest.approx(reward)
    assert not (folder / ".out.work").exists()
    status, said = shiftrm(*TRAIN, *SMALL)
    assert (status, said.out) == (2, "")
    assert "already there and not empty" in said.err


def test_an_interrupted_meta_training_continues_to_the_same_weights(shiftrm, folder, monkeypatch):
    settings = [*SMALL, "save_steps=1", "learning_rate=0.01"]
    assert shiftrm(*TRAIN, *settings)[0] == 0
    straight = weights(folder / "out")
    shutil.rmtree(folder / "out")
    steps = interrupt_training(monkeypatch, at=3)
    status, said = shiftrm(*TRAIN, *settings)
    assert status == 130
    assert "give the same command again to continue" in said.err
    assert shiftrm(*TRAIN, *settings)[0] == 0
    assert steps == [0, 1, 2, 2, 3]
    for name, weight in weights(folder / "out").items():
        assert torch.equal(weight, straight[name])


def test_options_and_settings_from_a_file(shiftrm, folder):
    (folder / "recipe.yaml").write_text(
        "model: policy\nheld_out: [dogs]\nvalidation: []\nmax_steps: 9\nbeta: 2e-1\n"
        "support_batch_size: 3\nquery_batch_size: 2\n"
    )
    status, said = shiftrm(
        "meta-train --config recipe.yaml --domains domains max_steps=1 --output out"
    )
    assert status == 0, said.err
    assert "1 source domains, 1 outer steps" in said.out, "the other one is held out now"
    assert "beta = 0.2" in said.out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["beta=0"], "beta is 0.0; it must be above 0"),
        (["inner_step=2"], "unknown setting 'inner_step'; did you mean 'inner_steps'?"),
        (["output_dir=x"], "unknown setting 'output_dir'; this command sets it"),
        (["support_batch_size=9"], "domain 'cats': 8 fine-tuning rows, but a batch takes 9"),
        (["--held-out", "fish"], "no held-out domain 'fish'; did you mean 'fishes'?"),
        (["--held-out", ""], "no held-out domain; name at least one"),
        (["--model", "nowhere"], "nowhere: no such folder"),
        (["beta"], "'beta' is not a setting"),
    ],
)
def test_bad_input_is_one_line_and_nothing_is_written(shiftrm, folder, words, message):
    settings = SMALL[:1] + SMALL[2:] if words[0].startswith("support") else SMALL
    status, said = shiftrm(*TRAIN, *settings, *words)
    assert (status, said.out) == (2, "")
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert not (folder / "out").exists()
    assert not (folder / ".out.work").exists()


def test_meta_test_makes_and_measures_a_policy_for_the_held_out_domain(shiftrm, folder, in_process):
    settings = ["weighted.updates=3", "weighted.batch_size=4", "weighted.learning_rate=0.01"]
    status, said = shiftrm(*TEST, "--judge", "reward", *settings)
    assert status == 0, said.err
    lines = said.out.splitlines()
    assert [line.split()[:2] for line in lines[1:3]] == [
        ["fishes", "reference"],
        ["fishes", "weighted"],
    ]
    numbers = {
        (r.method, r.metric): r.value for r in read_records(folder / "test" / "records.jsonl")
    }
    assert numbers["reference", "kl"] == 0.0
    assert numbers["weighted", "kl"] > 0.0
    assert numbers["weighted", "judged"] == numbers["weighted", "proxy"]
    AutoModelForCausalLM.from_pretrained(folder / "test" / "fishes" / "policy")
    again = shiftrm(*TEST, "--judge", "reward", *settings)
    assert again[0] == 0
    assert again[1].out == said.out
    prompts = folder / "domains" / "fishes" / "prompts.jsonl"
    asked = prompts.read_text()
    prompts.write_text(asked + '{"prompt": "a red fish"}\n')
    status, said = shiftrm(*TEST, "--judge", "reward", *settings)
    assert (status, "made with another configuration (data" in said.err) == (2, True), said
    prompts.write_text(asked)
    status, said = shiftrm(*TEST, "--judge", "reward", *settings, "weighted.beta=2.0")
    assert status == 2
    assert "made with another configuration" in said.err


def test_a_policy_is_measured_as_it_is(shiftrm, folder, in_process):
    status, said = shiftrm(*TEST, "--way", "none")
    assert status == 0, said.err
    assert [line.split()[:2] for line in said.out.splitlines()[1:-1]] == [["fishes", "reference"]]
    status, said = shiftrm(
        *TEST[:-2], "test2", *TEST[-1:], "--way", "none", "--reference", "policy"
    )
    assert status == 0, said.err
    numbers = {(r.method, r.metric): r.value for r in read_records(folder / "test2/records.jsonl")}
    assert numbers["none", "kl"] == 0.0, "the same policy"
    assert numbers["none", "accuracy_sum"] == numbers["reference", "accuracy_sum"]


def test_a_held_out_domain_can_be_watched(shiftrm, folder):
    status, said = shiftrm(*TRAIN, *SMALL, "--validation", "fishes")
    assert status == 0, said.err
    assert "A_PL on 1 validation domains" in said.out
    log = read_jsonl(folder / "out" / "training_log.jsonl")
    assert "eval_fishes_accuracy" in log[0]
    assert log[0]["step"] == 0


def test_meta_test_by_rloo(shiftrm, folder, in_process):
    settings = ["rloo.steps=2", "rloo.prompts_per_step=2", "rloo.rollouts_per_prompt=3"]
    settings += ["rloo.minibatch_size=6", "rloo.learning_rate=0.01"]
    settings += ["rloo.sampling.max_new_tokens=4"]
    status, said = shiftrm(*TEST, "--way", "rloo", *settings)
    assert status == 0, said.err
    assert said.out.splitlines()[2].split()[:2] == ["fishes", "rloo"]
    records = read_records(folder / "test" / "records.jsonl")
    kls = {r.step: r.value for r in records if r.metric == "rloo_kl"}
    assert kls.keys() == {1, 2}
    assert kls[1] == pytest.approx(0.0, abs=1e-6), "the policy begins as the reference"
    [after] = [r.value for r in records if (r.method, r.metric) == ("rloo", "kl")]
    assert after > 0
    AutoModelForCausalLM.from_pretrained(folder / "test" / "fishes" / "policy")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--way", "dpo"], "--way is 'dpo'; choose one of weighted, ppo, rloo, plain"),
        (["--way", "plain"], "--reward goes with --way weighted, ppo and rloo"),
        (["rloo.rollouts_per_prompt=1"], "rollouts_per_prompt is 1; it must be at least 2"),
        (["rloo.minibatch_size=60"], "minibatch_size is 60; it must divide the 256 sequences"),
        (["weighted.beta=0"], "beta is 0.0; it must be above 0"),
        (["weighted.batch_size=9"], "domain 'fishes': 8 fine-tuning rows, but a batch takes 9"),
        (["ppo.step=3"], "unknown setting 'ppo.step'; did you mean 'steps'?"),
        (["--judge", "nowhere", "weighted.batch_size=2"], "nowhere: no such folder"),
        (["--only", "cows"], "cows"),
    ],
)
def test_meta_test_refuses_in_one_line(shiftrm, folder, words, message):
    status, said = shiftrm(*TEST, *words)
    assert status == 2
    assert message in said.err
    assert len(said.err.splitlines()) == 1
    assert not (folder / "test").exists()
