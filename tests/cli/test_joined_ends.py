"""Commands that let a policy answer prompts warn once of ends that the tokenizer joins."""

import logging

import pytest

from shiftrm.files import write_jsonl
from tests.cli.test_optimise import ONLINE, PPO

PROMPTS = [{"prompt": "the red "}, {"prompt": "a dog"}, {"prompt": "a cat"}, {"prompt": "a bird "}]
MODELS = ["--reward", "reward", "--prompts", "prompts.jsonl", "--output", "out"]


@pytest.mark.parametrize(
    "words",
    [
        ["sample", "--policy", "policy", *MODELS[2:], "--max-new-tokens", "3"],
        ["adapt", "--model", "reward", "--pairs", "pairs.jsonl", "--policy", "policy", *MODELS[2:],
         "--responses", "2", "--max-new-tokens", "3", "--holdout", "0.5", "max_steps=1"],
        ["optimise", "ppo", "--policy", "policy", *MODELS, *PPO, "steps=1", "kl_samples=0"],
        ["optimise", "rloo", "--policy", "policy", *MODELS, *ONLINE, "max_steps=1", "kl_samples=0"],
    ],
    ids=["sample", "adapt", "ppo", "rloo"],
)  # fmt: skip
def test_one_warning_with_the_count(
    shiftrm, files, reward_model, tokenizer, monkeypatch, caplog, words
):
    reward_model.save_pretrained("reward")
    tokenizer.save_pretrained("reward")
    write_jsonl("prompts.jsonl", PROMPTS)
    monkeypatch.setattr("shiftrm.report.adaptation.write_page", lambda found, path: None)
    # The tests' tokenizer drops spaces; that others join them is shown in tests/data.
    monkeypatch.setattr(
        "shiftrm.data.prompts.count_joined_ends",
        lambda tokenizer, prompts: sum(prompt.endswith(" ") for prompt in prompts),
    )
    with caplog.at_level(logging.WARNING, logger="shiftrm"):
        status, output = shiftrm(*words)
    assert status == 0, output.err
    said = [r.getMessage() for r in caplog.records if "end in white space" in r.getMessage()]
    assert len(said) == 1
    assert ": 2 of 4 prompts end in white space" in said[0]
