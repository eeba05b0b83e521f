"""What a meta-test refuses, and what it leaves in the output folder."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.oodpl.fine_tuning import FineTuningConfig, fine_tune
from shiftrm.oodpl.meta_test import EvaluationConfig
from shiftrm.oodpl.preference import preference_accuracy
from shiftrm.records import read_records
from shiftrm.world.domain_gold import HELD_OUT, TABLE
from tests.cli.conftest import files, shiftrm  # noqa: F401 - fixtures
from tests.conftest import llama_config
from tests.oodpl.domains import make_domain, make_models, write_animals

TEST = ["meta-test", "--policy", "policy", "--domains", "domains", "--output", "test"]
TEST += ["evaluation.sampling.max_new_tokens=3", "evaluation.responses_per_prompt=2"]
TEST += ["weighted.updates=1", "weighted.batch_size=4"]
GUIDED = [*TEST, "--reward", "reward"]
PLAIN = [*TEST, "--way", "plain"]
AS_IT_IS = [*TEST, "--way", "none"]
LONG = " small" * 80


@pytest.fixture
def folder(files, reward_model, tokenizer):  # noqa: F811
    write_animals(files / "domains")
    reward_model.save_pretrained(files / "reward")
    tokenizer.save_pretrained(files / "reward")
    return files


def refused(shiftrm, words, message):  # noqa: F811
    """One line and status 2."""
    status, said = shiftrm(*words)
    assert status == 2, said
    assert message in said.err
    lines = [line for line in said.err.splitlines() if not line.startswith("[")]
    assert len(lines) == 1


def edit(model, part, change):
    path = model / "model.safetensors"
    weights = load_file(path)
    changed = {name: change(w) if part in name else w for name, w in weights.items()}
    save_file(changed, path, metadata={"format": "pt"})


def append(path, row):
    write_jsonl(path, [*read_jsonl(path), row])


def rename(folder, old, new):
    (folder / "domains" / old).rename(folder / "domains" / new)
    path = folder / "domains" / "splits.json"
    path.write_text(path.read_text().replace(f'"{old}"', json.dumps(new)))


def test_a_folder_that_is_not_a_meta_tests_is_left_alone(shiftrm, folder):  # noqa: F811
    (folder / "test").mkdir()
    (folder / "test" / "records.jsonl").write_text("mine\n")
    refused(shiftrm, GUIDED, "test: not empty and not a run's folder; choose another --output")
    assert (folder / "test" / "records.jsonl").read_text() == "mine\n"
    assert len(list((folder / "test").iterdir())) == 1


def test_another_domain_adds_its_records_to_the_folder(shiftrm, folder, in_process):  # noqa: F811
    assert shiftrm(*AS_IT_IS)[0] == 0
    first = read_records(folder / "test" / "records.jsonl")
    status, said = shiftrm(*AS_IT_IS, "--only", "birds")
    assert status == 0, said.err
    assert "fishes" not in said.out
    both = read_records(folder / "test" / "records.jsonl")
    assert {record.stage for record in both} == {"evaluate/birds", "evaluate/fishes"}
    assert [record for record in both if record.stage == "evaluate/fishes"] == first
    refused(shiftrm, [*PLAIN, "--only", "birds", "seed=1"], "made with another configuration")


def test_a_retrained_reward_model_is_not_taken_for_the_old_one(
    shiftrm,  # noqa: F811
    folder,
    in_process,
):
    assert shiftrm(*GUIDED)[0] == 0
    edit(folder / "reward", "score", lambda weight: weight + 1)
    refused(shiftrm, GUIDED, "made with another configuration (models.reward")


def test_a_changed_policy_or_reference_is_noticed(shiftrm, folder, in_process):  # noqa: F811
    shutil.copytree(folder / "policy", folder / "other")
    words = [*AS_IT_IS, "--reference", "other"]
    assert shiftrm(*words)[0] == 0
    edit(folder / "policy", "lm_head", lambda weight: weight * 2)
    refused(shiftrm, words, "stage fishes was made with another configuration (models.policy")
    edit(folder / "other", "lm_head", lambda weight: weight * 2)
    refused(shiftrm, words, "stage reference/fishes was made with another configuration (models")


def test_a_changed_table_of_gold_weights_is_noticed(shiftrm, folder, in_process):  # noqa: F811
    table = folder / "weights.json"
    words = [*AS_IT_IS, "--judge", "weights.json"]
    table.write_text(json.dumps({"domains": {"cats": {"weights": {}}}}))
    refused(shiftrm, words, "domain 'fishes': not in the gold world")
    assert not (folder / "test").exists()
    rename(folder, "fishes", HELD_OUT[0])
    weights = dict(TABLE[HELD_OUT[0]])
    table.write_text(json.dumps({"domains": {HELD_OUT[0]: {"weights": weights}}}))
    assert shiftrm(*words)[0] == 0
    weights["toxic"] += 1
    table.write_text(json.dumps({"domains": {HELD_OUT[0]: {"weights": weights}}}))
    refused(shiftrm, words, "made with another configuration (models.judge")


def test_a_policy_with_nan_weights_is_not_measured(shiftrm, folder, in_process):  # noqa: F811
    edit(folder / "policy", "q_proj", lambda weight: weight * float("nan"))
    refused(shiftrm, AS_IT_IS, "holds NaN or infinite numbers")


def test_preferences_of_a_broken_policy_are_refused(tokenizer):
    policy, _ = make_models()
    pairs = make_domain("cats").eval_pairs
    with torch.no_grad():
        policy.lm_head.weight.fill_(float("nan"))
    with pytest.raises(UserError, match=r"preference pair 1: .* not finite"):
        preference_accuracy(policy, tokenizer, pairs)


def test_a_policy_broken_by_the_last_update_is_refused(tokenizer):
    torch.manual_seed(0)
    policy = LlamaForCausalLM(llama_config())
    config = FineTuningConfig(
        updates=1, batch_size=4, learning_rate=3e38, optimizer="sgd", max_grad_norm=0.0
    )
    rows = [{"prompt": "the cat", "response": " small" * 40} for _ in range(4)]
    with pytest.raises(UserError, match=r"update 1, the last: .*; lower learning"):
        fine_tune(policy, tokenizer, rows, config)


@pytest.mark.parametrize("name", ["pairs", "batch_size", "responses_per_prompt"])
def test_evaluation_needs_at_least_one(shiftrm, folder, name):  # noqa: F811
    with pytest.raises(UserError, match=f"{name} is -1; it must be at least 1"):
        EvaluationConfig(**{name: -1})
    refused(shiftrm, [*GUIDED, f"evaluation.{name}=0"], f"{name} is 0; it must be at least 1")
    assert not (folder / "test").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "fishes,fishes"], "--only names 'fishes' twice"),
        (["--only", ""], "--only"),
        (["--only", "fishes/"], "no domain 'fishes/'; did you mean 'fishes'?"),
        (["--only", "../domains/fishes"], "no domain '../domains/fishes'"),
        (["--only", "."], "no domain '.'"),
        (["--domains", "nowhere", "--only", "fishes"], "nowhere"),
        (["--reward", "runs/rewrad"], "runs/rewrad: no such folder"),
        (["--reward", "nowhere/weights.json"], "nowhere/weights.json: no such folder"),
        (["--reward", "policy"], "policy: is not a reward model"),
        (["--policy", "reward"], "reward: is a reward model"),
        (["--judge", "nowhere/weights.json"], "nowhere/weights.json: no such file"),
        (["weighted.seed=5"], "weighted.seed is 5, but it follows from seed; set seed"),
        (["ppo.seed=5"], "ppo.seed is 5"),
        (["rloo.seed=5"], "rloo.seed is 5"),
        (["evaluation.seed=5"], "evaluation.seed is 5"),
    ],
)
def test_refused_before_anything_is_written(shiftrm, folder, words, message):  # noqa: F811
    refused(shiftrm, [*GUIDED, *words], message)
    assert not (folder / "test").exists()


@pytest.mark.parametrize("name", ["reference", "records.jsonl", "config.yaml"])
def test_a_domain_called_as_the_output_folders_own_files(shiftrm, folder, name):  # noqa: F811
    rename(folder, "fishes", name)
    refused(shiftrm, GUIDED, f"a domain called {name!r} cannot be tested")
    assert not (folder / "test").exists()


def test_a_hidden_folder_is_no_domain(shiftrm, folder):  # noqa: F811
    rename(folder, "fishes", ".fishes")
    refused(shiftrm, GUIDED, "no held-out domain '.fishes'; known: birds, cats, dogs")
    assert not (folder / "test").exists()


def test_only_refuses_an_evaluation_prompt_that_is_trained_on(shiftrm, folder):  # noqa: F811
    append(folder / "domains" / "fishes" / "prompts.jsonl", {"prompt": "the red cat"})
    refused(shiftrm, [*GUIDED, "--only", "fishes"], "also trained on in domain 'cats'")
    assert not (folder / "test").exists()


@pytest.mark.parametrize("how", ["other words", "another size"])
def test_a_reference_with_another_vocabulary(shiftrm, folder, tokenizer, how):  # noqa: F811
    shutil.copytree(folder / "policy", folder / "other")
    if how == "another size":
        LlamaForCausalLM(llama_config(vocabulary=24)).save_pretrained(folder / "other")
    else:
        path = folder / "other" / "tokenizer.json"
        path.write_text(path.read_text().replace('"cat"', '"cow"'))
        assert "cow" in PreTrainedTokenizerFast.from_pretrained(folder / "other").get_vocab()
    refused(shiftrm, [*AS_IT_IS, "--reference", "other"], "other: has another vocabulary")
    assert not (folder / "test").exists()


@pytest.mark.parametrize("option", ["--policy", "--reference"])
def test_an_adapter_is_refused(shiftrm, folder, tokenizer, option):  # noqa: F811
    peft = pytest.importorskip("peft")
    model = LlamaForCausalLM.from_pretrained(folder / "policy")
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj"])
    peft.get_peft_model(model, config).save_pretrained(folder / "adapter")
    tokenizer.save_pretrained(folder / "adapter")
    refused(shiftrm, [*GUIDED, option, "adapter"], "adapter: is an adapter")
    assert not (folder / "test").exists()


def learned_positions(folder):
    sizes = {"n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    GPT2LMHeadModel(GPT2Config(vocab_size=32, **sizes, **ids)).save_pretrained(folder / "policy")


def test_a_fine_tuning_row_over_the_context_is_named(shiftrm, folder, in_process):  # noqa: F811
    learned_positions(folder)
    row = {"prompt": "the red fish", "response": LONG}
    append(folder / "domains" / "fishes" / "finetune.jsonl", row)
    message = "domain 'fishes': fine-tuning row 9: prompt and response have more tokens than"
    refused(shiftrm, PLAIN, message)


def test_an_evaluation_pair_over_the_context_is_named(shiftrm, folder, in_process):  # noqa: F811
    learned_positions(folder)
    row = {"prompt": "a large fish", "chosen": " a", "rejected": LONG}
    append(folder / "domains" / "fishes" / "eval_pairs.jsonl", row)
    message = "domain 'fishes', eval_pairs.jsonl: preference pair 6: prompt and response have more"
    refused(shiftrm, PLAIN, message)


def test_long_and_odd_names_keep_the_columns_apart(shiftrm, folder, in_process):  # noqa: F811
    name = "Tools_and_Home_Improvement"
    rename(folder, "fishes", name)
    rename(folder, "birds", "b\x1bds")
    status, said = shiftrm(*AS_IT_IS, "--only", f"{name},b\x1bds")
    assert status == 0, said.err
    rows = [line.split()[:2] for line in said.out.splitlines()[1:3]]
    assert rows == [[name, "reference"], ["b\\x1bds", "reference"]]


def test_a_huge_learning_rate_is_one_line(shiftrm, folder, in_process):  # noqa: F811
    refused(shiftrm, [*PLAIN, "weighted.learning_rate=1e38"], "learning_rate is 1e+38, too large")


def test_rloo_takes_chats_beside_strings_and_lone_surrogates(
    shiftrm,  # noqa: F811
    folder,
    in_process,
):
    rows = folder / "domains" / "fishes" / "finetune.jsonl"
    chat = [{"role": "user", "content": "the red fish"}]
    append(rows, {"prompt": chat, "response": " swims"})
    with open(rows, "a", encoding="utf-8") as handle:
        handle.write('{"prompt": "the \\ud83d fish", "response": " swims"}\n')
    small = ["steps=1", "prompts_per_step=5", "rollouts_per_prompt=2", "minibatch_size=10"]
    small += ["sampling.max_new_tokens=3"]
    status, said = shiftrm(*GUIDED, "--way", "rloo", *(f"rloo.{word}" for word in small))
    assert status == 0, said.err
