"""Rows on their way to the trainers: no column and no value of any row is lost or added."""

import pytest
import torch
from datasets import Dataset

from shiftrm.data.demonstrations import COLUMNS as DEMONSTRATION_COLUMNS
from shiftrm.data.demonstrations import read_demonstrations
from shiftrm.data.pairs import COLUMNS, read_pairs
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.policies.tokens import encode_demonstration
from shiftrm.trainers.contrast import ContrastConfig, ContrastTrainer
from shiftrm.trainers.ocrm import OCRMConfig, OCRMTrainer
from shiftrm.trainers.pair_batches import ROW, PairCollator, table
from shiftrm.trainers.reward import RewardConfig, RewardTrainer
from tests.byte_level import byte_level

USER = [{"role": "user", "content": "q"}]


def said(words):
    return [{"role": "assistant", "content": words}]


def tool(name, argument):
    kinds = {argument: {"type": "string"}}
    return [{"type": "function", "function": {"name": name, "parameters": {"properties": kinds}}}]


CHAT = {"prompt": USER, "chosen": said("a"), "rejected": said("b")}


def test_a_column_that_only_later_rows_have_is_kept(tmp_path, make_trainer, reward_model):
    words = {"chosen": " cat runs", "rejected": " dog"}
    whole = {"chosen": "the red cat runs", "rejected": "the red cat sits"}
    path = write_jsonl(tmp_path / "f", [whole, {"prompt": "the red", **words}])
    nulls = tmp_path / "f.parquet"
    Dataset.from_list([whole | {"prompt": None}, {"prompt": "the red", **words}]).to_parquet(nulls)
    for rows in (path, nulls):
        trainer = make_trainer(reward_model, RewardTrainer, train=rows, config_class=RewardConfig)
        read = trainer.processing_class.decode
        found = {read(row["chosen_ids"]) for row in trainer.train_dataset}
        assert found == {"the red cat runs </s>"}
        found = {read(row["rejected_ids"]) for row in trainer.train_dataset}
        assert found == {"the red cat sits </s>", "the red dog </s>"}


@pytest.mark.parametrize(
    "more", [{"tools": tool("f", "x")}, {"chat_template_kwargs": {"style": "short"}}]
)
def test_options_that_only_later_rows_have_are_kept(tmp_path, more):
    path = write_jsonl(tmp_path / "f", [CHAT, {**CHAT, **more}])
    [column] = more
    assert table("f", read_pairs(path), COLUMNS)[column] == [None, more[column]]
    chats = [{"messages": [*USER, *said("a")]}, {"messages": [*USER, *said("a")], **more}]
    write_jsonl(path, chats)
    found = table("f", read_demonstrations(path), DEMONSTRATION_COLUMNS)
    assert found[column] == [None, more[column]]


def test_demonstrations_that_were_cut_off_are_not_closed(tmp_path):
    tokenizer = byte_level()
    text, chat = {"prompt": "x", "completion": "y"}, {"messages": [*USER, *said("a")]}
    for row, closing in ((text, "<eos>"), (chat, "<|im_end|>")):
        path = write_jsonl(tmp_path / "f", [row, {**row, "finished": False}])
        rows = table("f", read_demonstrations(path), DEMONSTRATION_COLUMNS)
        whole, cut = (encode_demonstration(one, tokenizer) for one in rows)
        assert whole["input_ids"] == [*cut["input_ids"], tokenizer.convert_tokens_to_ids(closing)]
        assert whole["completion_mask"] == [*cut["completion_mask"], 1]
        assert sum(cut["completion_mask"]) == 1
    write_jsonl(tmp_path / "f", [{**text, "finished": [True]}])
    with pytest.raises(UserError, match=r"f:1: .*'finished' is \[True\]; expected true or false"):
        read_demonstrations(tmp_path / "f")


def test_a_weight_or_margin_of_null_is_that_of_a_row_without(make_trainer, reward_model):
    pairs = [
        {"prompt": "the", "chosen": " cat", "rejected": " dog", "weight": None, "margin": None},
        {"prompt": "a", "chosen": " bird", "rejected": " fish", "weight": 0.0, "margin": 0.5},
    ]
    for rows in (pairs, pairs[::-1]):
        trainer = make_trainer(
            reward_model, ContrastTrainer, train=rows, config_class=ContrastConfig,
            more={"train_dataset": rows}, contrast_source="pairs", contrast_share=0.5,
        )  # fmt: skip
        own = sorted(trainer.train_dataset, key=lambda row: row[ROW])[:2]
        batch = PairCollator(0)(own)
        order = [rows.index(row) for row in pairs]
        assert batch["weight"][order].tolist() == [1.0, 0.0]
        assert batch["margin"][order].tolist() == [0.0, 0.5]
        made = PairCollator(0)(list(trainer.train_dataset)[2:])
        assert made["weight"].tolist() == [1.0, 1.0]
        assert made["margin"].tolist() == [0.0, 0.0]


def test_rows_given_to_ocrm_keep_their_columns(monkeypatch, make_trainer, reward_model):
    weights = torch.tensor([0.5, 1.5], dtype=torch.float64)
    monkeypatch.setattr("shiftrm.trainers.ocrm.pair_weights", lambda *args, **more: weights)
    rows = [
        {"prompt": "the", "chosen": " cat", "rejected": " dog"},
        {"prompt": "a", "chosen": " bird", "rejected": " fish", "weight": 4.0, "margin": 0.5},
    ]
    trainer = make_trainer(
        reward_model, OCRMTrainer, config_class=OCRMConfig,
        more={"train_dataset": rows, "policy": "today", "reference": "sft"},
    )  # fmt: skip
    batch = PairCollator(0)(list(trainer.train_dataset))
    assert batch["weight"].tolist() == [0.5, 6.0]
    assert batch["margin"].tolist() == [0.0, 0.5]
