"""Our RewardTrainer against TRL's, and the contract on what a row becomes."""

import copy

import pytest
import torch
from datasets import Dataset
from trl import RewardTrainer as TRLRewardTrainer

from shiftrm.errors import UserError
from shiftrm.trainers.reward import RewardTrainer

CHAT = [
    {
        "prompt": [{"role": "user", "content": "the red cat"}],
        "chosen": [{"role": "assistant", "content": "runs"}],
        "rejected": [{"role": "assistant", "content": "sits a dog"}],
    },
    {
        "prompt": [{"role": "user", "content": "a fish"}],
        "chosen": [{"role": "assistant", "content": "swims the small"}],
        "rejected": [{"role": "assistant", "content": "flies"}],
    },
]
IMPLICIT = [
    {"chosen": "the red cat runs", "rejected": "the red cat sits a"},
    {"chosen": "a fish swims", "rejected": "a fish flies the small"},
]


@pytest.mark.parametrize("rows", ["explicit", "implicit", "chat"])
def test_tokens_are_trls(rows, pairs, make_trainer, reward_model):
    data = {"explicit": pairs, "implicit": IMPLICIT, "chat": CHAT}[rows]
    ours = make_trainer(copy.deepcopy(reward_model), RewardTrainer, train=data).train_dataset
    theirs = make_trainer(copy.deepcopy(reward_model), TRLRewardTrainer, train=data).train_dataset
    for column in ("chosen_ids", "rejected_ids"):
        assert list(ours[column]) == list(theirs[column])


def test_training_equals_trls(make_trainer, reward_model, pairs):
    """Same data, same seed: losses and weights agree with TRL's trainer to fp32 rounding."""
    with_margin = [{**pair, "margin": 0.1 * i} for i, pair in enumerate(pairs)]
    results = {}
    for cls in (RewardTrainer, TRLRewardTrainer):
        model = copy.deepcopy(reward_model)
        trainer = make_trainer(
            model,
            cls,
            train=with_margin,
            evaluation=pairs[:7],
            max_steps=5,
            center_rewards_coefficient=0.01,
            eval_strategy="steps",
            eval_steps=5,
        )
        trainer.train()
        results[cls] = (model, trainer.state.log_history)
    ours, theirs = results[RewardTrainer], results[TRLRewardTrainer]
    for a, b in zip(ours[0].parameters(), theirs[0].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert set(mine) == set(other), "the same metric names"
        for key in ("loss", "accuracy", "margin", "mean_reward", "eval_loss", "eval_accuracy"):
            if key in other and key != "eval_accuracy":
                assert mine[key] == pytest.approx(other[key], abs=1e-4), key


def test_pad_equal_to_eos_reads_the_right_token(make_trainer, reward_model, tokenizer, pairs):
    """The last real token is EOS; with pad == EOS, transformers pools the token before it."""
    from shiftrm.rewards import pad_right, sequence_rewards

    rows = [[5, 6, 7, 2], [5, 6, 2]]
    ids, mask = pad_right(rows, pad_token_id=2)
    ours = sequence_rewards(reward_model, ids, mask)
    alone = torch.cat(
        [
            sequence_rewards(reward_model, torch.tensor([r]), torch.ones(1, len(r)).long())
            for r in rows
        ]
    )
    torch.testing.assert_close(ours, alone, rtol=1e-5, atol=1e-6)


def test_bad_pairs_are_dropped_and_counted(make_trainer, reward_model, pairs, caplog):
    long = {"prompt": "the", "chosen": " red" * 30, "rejected": " blue"}
    # Unknown words are one token: two texts that differ become equal.
    collapsed = {"prompt": "the", "chosen": " zebra", "rejected": " yak"}
    trainer = make_trainer(
        reward_model, RewardTrainer, train=[*pairs, long, collapsed, collapsed], max_length=20
    )
    assert len(trainer.train_dataset) == len(pairs)
    assert trainer.dropped_pairs["train"] == {
        "longer than max_length=20 tokens": 1,
        "whose two sides are the same tokens": 2,
    }
    assert "dropped 2 pairs" in caplog.text


def test_nothing_left_is_an_error(make_trainer, reward_model, pairs):
    with pytest.raises(UserError, match="no pair of the train data is left"):
        make_trainer(reward_model, RewardTrainer, train=pairs, max_length=2)


def test_equal_sides_are_refused_with_the_row(make_trainer, reward_model):
    rows = [{"prompt": "the", "chosen": " red", "rejected": " red"}]
    with pytest.raises(UserError, match=r"train data, row 0.*chosen and rejected are equal"):
        make_trainer(reward_model, RewardTrainer, train=rows)


def test_streaming_data_set(reward_model, tokenizer, pairs, options):
    from trl import RewardConfig

    trainer = RewardTrainer(
        reward_model,
        RewardConfig(**{**options, "max_steps": 2}),
        train_dataset=Dataset.from_list(pairs).to_iterable_dataset(),
        processing_class=tokenizer,
    )
    trainer.train()
    assert trainer.state.global_step == 2
