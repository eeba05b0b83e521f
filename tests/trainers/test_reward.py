"""Our RewardTrainer against TRL's, and the contract on what a row becomes."""

import copy
import logging
import math

import pytest
import torch
import torch.nn.functional as F
import trl
from datasets import Dataset
from peft import LoraConfig
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BloomConfig,
    BloomForSequenceClassification,
)
from trl import RewardTrainer as TRLRewardTrainer

from shiftrm.errors import UserError
from shiftrm.models.loading import load_reward_model
from shiftrm.trainers.metarm import MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer
from tests.trainers.conftest import logs_of, same_weights

FROM_FOLDER = {"processing_class": None}
META = {RewardTrainer: {}, MetaRMTrainer: {"meta_batch_size": 4}}

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
    same_weights(ours[0], theirs[0], rtol=1e-5, atol=1e-6)
    for mine, other in zip(ours[1], theirs[1], strict=True):
        assert set(mine) >= set(other), "TRL's metric names, and more"
        for key in ("loss", "accuracy", "margin", "mean_reward", "num_tokens", "eval_loss"):
            if key in other:
                assert mine[key] == pytest.approx(other[key], abs=1e-4), key


def test_pad_equal_to_eos_reads_the_right_token(make_trainer, reward_model, tokenizer, pairs):
    """The last real token is EOS; with pad == EOS, transformers pools the token before it."""
    from shiftrm.models.rewards import pad_right, sequence_rewards

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
    with pytest.raises(UserError, match=r"no pair of the train data is left .*; raise max_length"):
        make_trainer(reward_model, RewardTrainer, train=pairs, max_length=2)


TINY = {
    "vocab_size": 32, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "intermediate_size": 32, "num_labels": 1, "pad_token_id": 0,
}  # fmt: skip


def with_context(name):
    """A reward model for texts of at most 12 tokens; RoBERTa's first position is the second."""
    positions = 13 if name == "roberta" else 12
    config = AutoConfig.for_model(name, **TINY, max_position_embeddings=positions)
    return AutoModelForSequenceClassification.from_config(config)


@pytest.mark.parametrize("trainer", [RewardTrainer, MetaRMTrainer])
@pytest.mark.parametrize("max_length", [None, 500])
@pytest.mark.parametrize("name", ["bert", "roberta", "gpt2", "llama"])
def test_texts_beyond_the_context_are_dropped(
    make_trainer, pairs, groups, name, max_length, trainer, caplog
):
    """The last text that is kept fills the context, and the model can read it."""
    fits = {"prompt": "the", "chosen": " red" * 10, "rejected": " blue"}  # with EOS 12 tokens
    long = {**fits, "rejected": " blue" * 11}
    meta = [*groups, {"prompt": "the", "responses": [" red" * 10, " cat", " red" * 11]}]
    trained = make_trainer(
        with_context(name), trainer, train=[*pairs, fits, long], meta=meta,
        max_length=max_length, max_steps=4, per_device_train_batch_size=13,
        gradient_accumulation_steps=1, **META[trainer],
    )  # fmt: skip
    context = "longer than the model's context of 12 tokens"
    assert trained.dropped_pairs["train"][context] == 1
    assert len(trained.train_dataset) == len(pairs) + 1
    assert max(map(len, trained.train_dataset["chosen_ids"])) == 12
    if trainer is MetaRMTrainer:
        assert f"dropped 1 responses {context}" in caplog.text
    trained.train()
    for rows in ([long], [long, long]):
        with pytest.raises(
            UserError, match=rf"after dropping {len(rows)} {context}.*; shorten the"
        ):
            make_trainer(with_context(name), trainer, train=rows, max_length=max_length)


def test_equal_sides_are_refused_with_the_row(make_trainer, reward_model):
    rows = [{"prompt": "the", "chosen": " red", "rejected": " red"}]
    with pytest.raises(UserError, match=r"train data, row 0.*chosen and rejected are equal"):
        make_trainer(reward_model, RewardTrainer, train=rows)


def test_streaming_data_set(make_trainer, reward_model, pairs):
    stream = Dataset.from_list(pairs).to_iterable_dataset()
    trainer = make_trainer(
        reward_model, RewardTrainer, train=stream, config_class=trl.RewardConfig, max_steps=2
    )
    trainer.train()
    assert trainer.state.global_step == 2


def by_hand(model, rows):
    """Rewards of chosen and rejected, [N, 2], each sequence alone."""
    with torch.no_grad():
        return torch.tensor(
            [
                [
                    float(model(torch.tensor([row[f"{side}_ids"]])).logits)
                    for side in ("chosen", "rejected")
                ]
                for row in rows
            ],
            dtype=torch.float64,
        )


def test_evaluation_is_exact_over_an_unequal_last_batch(make_trainer, reward_model, pairs):
    """Seven pairs in batches of four: means over pairs, not over batches, under each set's name."""
    trainer = make_trainer(reward_model, RewardTrainer, evaluation=pairs[:7])
    trainer.eval_dataset = {
        "one": trainer.eval_dataset,
        "two": trainer.train_dataset.select([0, 5]),
    }
    metrics = trainer.evaluate()
    for name, rows in (("one", pairs[:7]), ("two", [pairs[0], pairs[5]])):
        table = by_hand(reward_model, trainer.eval_dataset[name])
        assert len(table) == len(rows)
        difference = table[:, 0] - table[:, 1]
        expected = {
            "loss": float(-F.logsigmoid(difference).mean()),
            "accuracy": float((difference > 0).double().mean()),
            "margin": float(difference.mean()),
            "mean_reward": float(table.mean()),
            "std_reward": float(table.std(unbiased=False)),
            "min_reward": float(table.min()),
            "auc": float((table[:, :1] > table[:, 1]).double().mean()),
        }
        for key, value in expected.items():
            assert metrics[f"eval_{name}_{key}"] == pytest.approx(value, abs=1e-6), key
        lengths = [
            len(r[f"{s}_ids"]) for r in trainer.eval_dataset[name] for s in ("chosen", "rejected")
        ]
        related = torch.corrcoef(torch.stack([table.flatten(), torch.tensor(lengths).double()]))[
            0, 1
        ]
        assert metrics[f"eval_{name}_length_correlation"] == pytest.approx(float(related), abs=1e-5)


def test_training_metrics_are_over_all_pairs_since_the_last_log(make_trainer, reward_model, pairs):
    trainer = make_trainer(
        reward_model,
        RewardTrainer,
        learning_rate=0.0,
        num_train_epochs=1,
        max_steps=-1,
        per_device_train_batch_size=5,
        logging_steps=3,
    )
    table = by_hand(reward_model, trainer.train_dataset)
    trainer.train()
    [log] = logs_of(trainer, "auc")
    assert log["accuracy"] == pytest.approx(float((table[:, 0] > table[:, 1]).double().mean()))
    assert log["mean_reward"] == pytest.approx(float(table.mean()), abs=1e-6)
    assert log["num_tokens"] == sum(
        len(row[f"{side}_ids"]) for row in trainer.train_dataset for side in ("chosen", "rejected")
    )


@pytest.mark.parametrize("shared", [True, False])
def test_shared_prefixes_change_nothing(make_trainer, reward_model, pairs, shared):
    """Training with and without shared prefixes, and with TRL's collator, is the same."""
    from trl.trainer.reward_trainer import DataCollatorForPreference

    models = []
    for options in ({"shared_prefixes": shared}, {"collator": DataCollatorForPreference(0)}):
        model = copy.deepcopy(reward_model)
        collator = options.pop("collator", None)
        trainer = make_trainer(model, RewardTrainer, max_steps=3, **options)
        if collator is not None:
            trainer.data_collator = collator
        trainer.train()
        models.append(model)
    same_weights(*models, rtol=1e-5, atol=1e-6)


def test_a_model_that_cannot_share_says_so_once(make_trainer, tokenizer, pairs, caplog):
    torch.manual_seed(0)
    config = BloomConfig(vocab_size=32, hidden_size=32, n_layer=2, n_head=4, num_labels=1)
    trainer = make_trainer(BloomForSequenceClassification(config), RewardTrainer, max_steps=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    said = [r.message for r in caplog.records if "cannot share prefixes" in r.message]
    assert len(said) == 1
    assert "BloomForSequenceClassification" in said[0]


def test_trls_tokenised_data_is_filtered_and_counted(make_trainer, reward_model):
    rows = [
        {"chosen_ids": [5, 6, 7], "rejected_ids": [5, 6, 8, 9]},
        {"chosen_ids": [5, 6], "rejected_ids": [5, 6]},
        {"chosen_ids": [5] * 30, "rejected_ids": [5, 6]},
    ]
    trainer = make_trainer(reward_model, RewardTrainer, train=rows, max_length=20)
    assert list(trainer.train_dataset["chosen_ids"]) == [[5, 6, 7]]
    assert sum(trainer.dropped_pairs["train"].values()) == 2
    trainer.train()


def test_margin_and_centering_by_hand(make_trainer, reward_model, pairs):
    rows = [{**pair, "margin": 0.25 * i} for i, pair in enumerate(pairs)]
    trainer = make_trainer(
        reward_model, RewardTrainer, train=rows, evaluation=rows, center_rewards_coefficient=0.1
    )
    table = by_hand(reward_model, trainer.eval_dataset)
    margin = torch.tensor([row["margin"] for row in rows])
    expected = -F.logsigmoid(table[:, 0] - table[:, 1] - margin) + 0.1 * table.sum(1) ** 2
    assert trainer.evaluate()["eval_loss"] == pytest.approx(float(expected.mean()), abs=1e-6)


@pytest.mark.parametrize("accumulation", [1, 2])
def test_a_gradient_that_is_not_finite_stops_before_the_weights(
    make_trainer, reward_model, pairs, tmp_path, accumulation
):
    rows = [dict(pair, margin=0.0) for pair in pairs]
    trainer = make_trainer(
        reward_model,
        RewardTrainer,
        train=rows,
        max_steps=4,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=accumulation,
        save_strategy="steps",
        save_steps=1,
    )
    good = {}
    state = reward_model.score.weight

    def poison(module, inputs):
        """What the head is given turns NaN from the third optimizer step on."""
        if trainer.state.global_step == 2:
            good.setdefault("weights", state.detach().clone())
            return (inputs[0] * math.nan,)
        return None

    handle = reward_model.score.register_forward_pre_hook(poison)
    with pytest.raises(UserError) as caught:
        trainer.train()
    handle.remove()
    message = str(caught.value)
    assert message.startswith("step 3: the gradient is not finite (the loss of train rows ")
    assert "checkpoint-1" in message, "the weights of checkpoint-2 gave the loss that is not finite"
    assert torch.equal(state, good["weights"]), "the weights are those of the last good step"
    assert all(p.isfinite().all() for p in reward_model.parameters())


def test_a_new_head_is_small_and_seeded_and_a_trained_one_stays(policy, reward_model, tmp_path):
    policy.save_pretrained(tmp_path / "policy")
    heads = [load_reward_model(tmp_path / "policy", seed=s).score.weight for s in (1, 1, 2)]
    assert torch.equal(heads[0], heads[1])
    assert not torch.equal(heads[0], heads[2])
    assert float(heads[0].detach().std()) == pytest.approx(1 / 32, rel=0.5)
    reward_model.save_pretrained(tmp_path / "rm")
    again = load_reward_model(tmp_path / "rm", seed=5)
    assert torch.equal(again.score.weight, reward_model.score.weight)


def test_the_trainer_loads_that_way(make_trainer, policy, tokenizer, tmp_path):
    policy.save_pretrained(tmp_path / "policy")
    tokenizer.save_pretrained(tmp_path / "policy")
    config = {"seed": 3, "model_init_kwargs": {"dtype": "float64"}}
    trainer = make_trainer(str(tmp_path / "policy"), RewardTrainer, more=FROM_FOLDER, **config)
    expected = load_reward_model(tmp_path / "policy", seed=3, dtype="float64").score.weight
    assert torch.equal(trainer.model.score.weight, expected)
    assert trainer.args.model_init_kwargs == {"dtype": "float64"}


@pytest.mark.parametrize("base", ["policy", "reward model"])
def test_lora_saves_its_head_and_loads_again(
    make_trainer, base, policy, reward_model, tokenizer, pairs, tmp_path
):
    """A saved adapter folder gives the trained scores, head included, whatever is under it."""
    from shiftrm.models.scoring import Scorer

    {"policy": policy, "reward model": reward_model}[base].save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    lora = {"peft_config": LoraConfig(task_type="SEQ_CLS", r=4, init_lora_weights=False)}
    trainer = make_trainer(
        str(tmp_path / "base"), RewardTrainer, max_steps=3, more={**FROM_FOLDER, **lora}
    )
    trainer.train()
    texts = [row["prompt"] for row in pairs], [row["chosen"] for row in pairs]
    before = Scorer(trainer.model, tokenizer)(*texts)
    trainer.save_model(str(tmp_path / "adapter"))
    assert Scorer.from_pretrained(tmp_path / "adapter")(*texts) == pytest.approx(before, abs=1e-6)
    if base == "reward model":
        assert Scorer.from_pretrained(tmp_path / "base")(*texts) != pytest.approx(before, abs=1e-3)


def test_longer_rows_than_the_models_context_are_fine(make_trainer, pairs):
    """Positions restart: a row may hold more tokens than the model has positions."""
    torch.manual_seed(0)
    from transformers import GPT2Config, GPT2ForSequenceClassification

    model = GPT2ForSequenceClassification(
        GPT2Config(vocab_size=32, n_embd=32, n_layer=2, n_head=4, n_positions=12, num_labels=1)
    )
    trainer = make_trainer(model, RewardTrainer, max_steps=2, max_length=12)
    trainer.train()
    assert trainer._sharing is True


def test_without_a_pad_token_others_still_read_the_trained_reward(
    make_trainer, reward_model, tokenizer, pairs, tmp_path
):
    """TRL pads with EOS then; transformers would pool before the EOS that was trained."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    from shiftrm.models.scoring import Scorer

    unpadded = copy.deepcopy(tokenizer)
    unpadded.pad_token = None
    trainer = make_trainer(
        reward_model, RewardTrainer, max_steps=3, more={"processing_class": unpadded}
    )
    trainer.train()
    trainer.save_model(str(tmp_path / "rm"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "rm").eval()
    saved = AutoTokenizer.from_pretrained(tmp_path / "rm")
    texts = [row["prompt"] + row["chosen"] + saved.eos_token for row in pairs]
    inputs = saved(texts, return_tensors="pt", padding=True, padding_side="right")
    with torch.no_grad():
        theirs = model(**inputs).logits[:, 0].tolist()
    ours = Scorer.from_pretrained(tmp_path / "rm")(
        [row["prompt"] for row in pairs], [row["chosen"] for row in pairs]
    )
    assert ours == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize("precision", ["autocast", "pure"])
def test_prefixes_are_shared_in_bf16(make_trainer, reward_model, pairs, precision, caplog):
    """accelerate enters autocast inside `forward`, where the check cannot see it."""
    with torch.no_grad():
        for p in reward_model.parameters():
            p.mul_(4)
    model = reward_model.bfloat16() if precision == "pure" else reward_model
    caplog.set_level(logging.INFO, "shiftrm")
    trainer = make_trainer(model, RewardTrainer, bf16=precision == "autocast", max_steps=2)
    trainer.train()
    assert trainer._sharing is True
    assert "prefixes are shared" in caplog.text
    assert "cannot share" not in caplog.text


def test_a_short_first_batch_does_not_hide_a_window(make_trainer, caplog, monkeypatch):
    """The check also takes a pair as long as max_length: GPT-Neo's window is counted in the row."""
    from transformers import GPTNeoConfig, GPTNeoForSequenceClassification

    torch.manual_seed(0)
    config = GPTNeoConfig(
        vocab_size=32,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        window_size=16,
        attention_types=[[["global", "local"], 1]],
        max_position_embeddings=128,
        num_labels=1,
    )
    monkeypatch.setattr(
        "shiftrm.models.probes.obstacle", lambda config: None
    )  # only the comparison tells
    model = GPTNeoForSequenceClassification(config)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(4)
    trainer = make_trainer(model, RewardTrainer, max_length=100)
    trainer.train()
    assert trainer._sharing is False
    assert "cannot share prefixes" in caplog.text


def test_a_stream_without_known_columns_of_tokenised_pairs(make_trainer, reward_model):
    from datasets import IterableDataset

    def rows():
        for i in range(8):
            yield {"chosen_ids": [5, 6, 7 + i % 3, 2], "rejected_ids": [5, 6, 2]}

    stream = IterableDataset.from_generator(rows)
    trainer = make_trainer(reward_model, RewardTrainer, train=stream, max_steps=2)
    trainer.train()
    assert trainer.state.global_step == 2


def test_a_collator_given_by_position_is_used(make_trainer, reward_model):
    from trl.trainer.reward_trainer import DataCollatorForPreference

    calls = []

    class Mine(DataCollatorForPreference):
        def torch_call(self, examples):
            calls.append(len(examples))
            return super().torch_call(examples)

    make_trainer(reward_model, RewardTrainer, Mine(0)).train()
    assert calls


def test_what_cannot_work_is_refused(make_trainer, reward_model, tokenizer, pairs):
    from peft import PromptTuningConfig, get_peft_model

    with pytest.raises(UserError, match="torch_compile"):
        make_trainer(copy.deepcopy(reward_model), RewardTrainer, torch_compile=True)
    prompt_tuning = PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4)
    with pytest.raises(UserError, match="prompt tuning"):
        make_trainer(get_peft_model(copy.deepcopy(reward_model), prompt_tuning), RewardTrainer)
    empty = {"prompt": "", "chosen": "", "rejected": "a cat", "chosen_finished": False}
    rows = [{**pair, "chosen_finished": True} for pair in pairs]
    with pytest.raises(UserError, match="row 12: the response 'chosen' is empty"):
        make_trainer(copy.deepcopy(reward_model), RewardTrainer, train=[*rows, empty])
