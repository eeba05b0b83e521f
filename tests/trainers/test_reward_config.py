"""Defaults that fit the machine and the way of training, and what else a TRL user expects."""

import numpy as np
import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig

from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.models.loading import to_accelerator
from shiftrm.trainers import machine
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
from shiftrm.trainers.reward import RewardConfig, RewardTrainer
from shiftrm.trainers.settings import command_defaults


def cuda(*, there):
    """Return what stands for `torch.accelerator.current_accelerator` in a build for CUDA."""

    def current_accelerator(check_available=False):
        return torch.device("cuda") if there or not check_available else None

    return current_accelerator


@pytest.mark.parametrize(
    "accelerator", [lambda check_available=False: None, cuda(there=False)], ids=["cpu", "cuda"]
)
def test_defaults_on_a_machine_without_accelerator(tmp_path, monkeypatch, accelerator):
    """Also with a CUDA build of torch, which pip installs whether or not there is a GPU."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", accelerator)
    assert command_defaults(tmp_path)["use_cpu"]
    assert to_accelerator(torch.nn.Linear(1, 1)).weight.device.type == "cpu"
    for config in (RewardConfig, MetaRMConfig):
        args = config(str(tmp_path))
        assert (args.use_cpu, args.bf16, args.device.type) == (True, False, "cpu")
        assert config(str(tmp_path), bf16=True).bf16, "what was set stays"


@pytest.mark.parametrize("has_bf16", [True, False])
def test_defaults_with_an_accelerator(tmp_path, monkeypatch, has_bf16):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", cuda(there=True))
    monkeypatch.setattr(machine, "is_torch_bf16_gpu_available", lambda: has_bf16)

    class Args:
        use_cpu, bf16, fp16 = False, None, False

    machine.fit_machine(Args)
    assert (Args.use_cpu, Args.bf16) == (False, has_bf16)


def test_the_learning_rate_is_that_of_the_way_of_training(
    reward_model, tokenizer, pairs, groups, tmp_path
):
    data = {"train_dataset": Dataset.from_list(pairs), "processing_class": tokenizer}
    lora = {"peft_config": LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["q_proj"])}
    trainers = [
        (RewardTrainer, RewardConfig, {}, 1e-5),
        (RewardTrainer, RewardConfig, {"learning_rate": 3e-4}, 3e-4),
        (MetaRMTrainer, MetaRMConfig, {}, 1e-5),
    ]
    for trainer, config, given, rate in trainers:
        for options in ({}, lora):
            meta = {"meta_dataset": groups} if trainer is MetaRMTrainer else {}
            made = trainer(reward_model, config(str(tmp_path), **given), **data, **meta, **options)
            expected = 1e-4 if options and not given else rate
            assert made.args.learning_rate == expected
            if meta:
                assert made.args.meta_learning_rate == expected, "the paper: eta = alpha"
            reward_model = made.accelerator.unwrap_model(made.model)
            reward_model = reward_model.unload() if options else reward_model
    args = MetaRMConfig(str(tmp_path), meta_learning_rate=0.5)
    args.fit_lora()
    assert (args.learning_rate, args.meta_learning_rate) == (1e-4, 0.5)


def test_checkpointing_where_activations_do_not_fit(make_trainer, reward_model, monkeypatch):
    def checkpointing(free, **config):
        monkeypatch.setattr(machine, "free_memory", lambda device: free)
        trainer = make_trainer(reward_model, RewardTrainer, activation_checkpointing=None, **config)
        trainer.choose_checkpointing()
        return trainer.args.activation_checkpointing

    assert not checkpointing(10**9)
    assert checkpointing(10**5)
    assert checkpointing(None), "nothing is known: as TRL"
    weights = 3 * 4 * sum(p.numel() for p in reward_model.parameters())
    longest = max(len(i) for i in make_trainer(reward_model).train_dataset["chosen_ids"])
    # Hidden states alone, in fp32, of 8 sequences (4 pairs).
    least = 8 * longest * reward_model.config.hidden_size * 4 * 2
    assert checkpointing((weights + least) / 0.8)
    assert not checkpointing((weights + 60 * least) / 0.8)
    assert checkpointing((weights + 60 * least) / 0.8, per_device_train_batch_size=4000)
    monkeypatch.setattr(machine, "free_memory", lambda device: 10**5)
    plain = make_trainer(reward_model, RewardTrainer, activation_checkpointing=False)
    plain.choose_checkpointing()
    assert not plain.args.activation_checkpointing, "what was set stays"


def test_what_a_pass_keeps_by_hand():
    """exp keeps its result; a linear layer its input; weights do not count."""
    layer = torch.nn.Linear(10, 20, bias=False)
    x = torch.zeros(3, 10)
    kept = machine.activation_bytes(lambda: layer(x.exp()).exp().sum(), layer.parameters())
    assert kept == 4 * (30 + 60)


def test_compute_metrics_gets_what_trl_gives(reward_model, tokenizer, pairs, options):
    """Batches of 2, 2 and, left out of TRL's by itself, none shorter: the same rows in order."""
    seen = {}

    def evaluate(lib, config, rows, **more):
        def metrics(prediction, compute_result=True):
            found = seen.setdefault(lib, [])
            found.append((np.asarray(prediction.predictions), prediction.label_ids))
            return {"calls": float(len(found))}

        trainer = lib(
            reward_model,
            config(**{**options, "per_device_eval_batch_size": 2, **more}),
            train_dataset=Dataset.from_list(pairs),
            eval_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            compute_metrics=metrics,
        )
        assert trainer.evaluate()["eval_calls"] == len(seen[lib])
        return trainer

    # TRL adds EOS to the text, which this tokenizer then reads as an unknown word: chats.
    chats = [
        {
            side: [
                {"role": "user", "content": "the cat"},
                {"role": "assistant", "content": " ".join(["runs"] * (k + n))},
            ]
            for n, side in ((1, "chosen"), (2, "rejected"))
        }
        for k in range(4)
    ]
    for batch_eval in (False, True):
        seen.clear()
        evaluate(trl.RewardTrainer, trl.RewardConfig, chats, batch_eval_metrics=batch_eval)
        evaluate(RewardTrainer, RewardConfig, chats, batch_eval_metrics=batch_eval)
        theirs, ours = seen[trl.RewardTrainer], seen[RewardTrainer]
        assert len(theirs) == len(ours) == (2 if batch_eval else 1)
        for (their_rows, their_labels), (our_rows, our_labels) in zip(theirs, ours, strict=True):
            assert our_rows.shape == their_rows.shape == (4 if batch_eval else 8, 1)
            np.testing.assert_allclose(our_rows, their_rows, atol=1e-6)
            assert our_labels == their_labels == ()
    seen.clear()
    trainer = evaluate(RewardTrainer, RewardConfig, chats[:3])
    [(rows, _)] = seen[RewardTrainer]
    by_pair = trainer.predict(trainer.eval_dataset).predictions
    assert by_pair.shape == (3, 2)
    assert rows[:, 0].tolist() == [*by_pair[:2, 0], *by_pair[:2, 1], *by_pair[2]]


def test_data_by_the_name_of_its_file(make_trainer, reward_model, pairs, groups, tmp_path):
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    write_jsonl(tmp_path / "groups.jsonl", groups)
    trainer = make_trainer(
        reward_model,
        train=tmp_path / "pairs.jsonl",
        evaluation={"same": str(tmp_path / "pairs.jsonl")},
        meta=str(tmp_path / "groups.jsonl"),
    )
    in_memory = make_trainer(reward_model)
    assert trainer.train_dataset["chosen_ids"] == in_memory.train_dataset["chosen_ids"]
    assert trainer._groups.groups == in_memory._groups.groups
    assert set(trainer.evaluate()) >= {"eval_same_accuracy", "eval_same_accuracy_low"}


def test_no_steps_are_refused(tmp_path):
    with pytest.raises(UserError, match="max_steps is 0; give at least 1, or leave it out"):
        RewardConfig(str(tmp_path), max_steps=0)


@pytest.mark.parametrize("margin", [1e300, float("inf"), float("nan"), True, "1", 10**400])
def test_margins_that_are_no_numbers(make_trainer, reward_model, pairs, margin):
    if margin == 10**400:  # no table holds it, so no tokenised data set
        rows = [dict(row, margin=float(k)) for k, row in enumerate(pairs)]
        trainer = make_trainer(reward_model, RewardTrainer, train=rows)
        with pytest.raises(UserError, match=r"row 0: column 'margin' is 10+\.\.\.; expected"):
            trainer.data_collator([{**trainer.train_dataset[0], "margin": margin}])
        return
    rows = [dict(row, margin=margin) for row in pairs]
    with pytest.raises(
        UserError, match=r"train data, row 0: column 'margin' is .*; expected a num"
    ):
        make_trainer(reward_model, RewardTrainer, train=rows)
    ids = {"chosen_ids": [1, 2], "rejected_ids": [1, 3], "margin": margin}
    with pytest.raises(UserError, match="column 'margin' is"):
        make_trainer(reward_model, RewardTrainer, train=[ids, ids]).train()


@pytest.mark.parametrize("name", ["meta_learning_rate", "meta_effect", "meta_loss_rise"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_lengths_of_a_meta_step_must_be_finite(tmp_path, name, value):
    with pytest.raises(UserError, match=f"{name} is {value}; it must be a finite number"):
        MetaRMConfig(str(tmp_path), preset="by_effect", **{name: value})
