"""Rows on their way to the trainers: no column and no value of any row is lost or added."""

import json

import pytest
import torch
from datasets import Dataset, DatasetDict
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from shiftrm.data.demonstrations import COLUMNS as DEMONSTRATION_COLUMNS
from shiftrm.data.demonstrations import read_demonstrations
from shiftrm.data.pairs import COLUMNS, read_pairs
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.policies.configs import DPOConfig, SFTConfig
from shiftrm.policies.tokens import encode_demonstration, encode_preference
from shiftrm.policies.trl_trainers import DPOTrainer, SFTTrainer
from shiftrm.trainers.contrast import ContrastConfig, ContrastTrainer
from shiftrm.trainers.contrast_rows import rows_of
from shiftrm.trainers.ocrm import OCRMConfig, OCRMTrainer
from shiftrm.trainers.pair_batches import ROW, PairCollator, encode_pair, table
from shiftrm.trainers.reward import RewardConfig, RewardTrainer, read_dataset
from tests.byte_level import OPTIONS_TEMPLATE, byte_level
from tests.conftest import llama_config

USER = [{"role": "user", "content": "q"}]


def reader_of(tokenizer):
    config = llama_config(len(tokenizer), num_labels=1, max_position_embeddings=1024)
    return LlamaForSequenceClassification(config)


def said(words):
    return [{"role": "assistant", "content": words}]


def tool(name, argument):
    kinds = {argument: {"type": "string"}}
    return [{"type": "function", "function": {"name": name, "parameters": {"properties": kinds}}}]


CHAT = {"prompt": USER, "chosen": said("a"), "rejected": said("b")}


def called(**arguments):
    function = {"name": "f", "arguments": arguments}
    return [{"role": "assistant", "content": "", "tool_calls": [{"function": function}]}]


PART = [{"type": "text", "text": "in a part"}]
EXACT = {"a": 0.30000000000000004, "b": 2**70, "c": None, "d": {}, "e": [], "f": [1, "x", None]}
"""Values that a table of columns cannot hold beside others, or only inexactly."""

NESTED = {
    "tools": [{"tools": tool("weather", "city")}, {"tools": tool("add", "x")}],
    "tools as JSON": [{"tools": tool("add", "x")}, {"tools": json.dumps(tool("weather", "city"))}],
    "options": [{"chat_template_kwargs": {"style": o}} for o in ({"a": 1}, {"b": True}, None)],
    "no options": [{"chat_template_kwargs": {"style": 1}}, {}, {"chat_template_kwargs": {}}],
    "arguments": [{"chosen": called(city="Rome")}, {"chosen": called(x=1)}],
    "kinds": [{"chosen": called(x=x)} for x in ("1", 1, [1], {"a": 1}, None)],
    "exact": [{"chosen": called(**EXACT)}, {"rejected": called(x=EXACT)}],
    "prompt": [{"prompt": USER + called(x=1)}, {"prompt": [*USER, *called(y=1), *USER]}],
    "parts": [{"prompt": [{"role": "user", "content": PART}]}, {"chosen": said(PART)}],
}
"""Rows whose objects have different fields."""


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


@pytest.mark.parametrize("kind", NESTED)
def test_the_fields_of_other_rows_objects_are_not_rendered(kind, tmp_path):
    """What is trained on is what a row alone gives, whatever rows are in the same table."""
    tokenizer = byte_level(OPTIONS_TEMPLATE)
    rows = [{**CHAT, **more} for more in NESTED[kind]]
    alone = [encode_pair(row, n, tokenizer, "train") for n, row in enumerate(rows)]
    path = write_jsonl(tmp_path / "f", rows)
    found = [encode_pair(r, n, tokenizer, "f") for n, r in enumerate(read_dataset(path))]
    assert found == alone
    texts = [tokenizer.decode(pair["chosen_ids"] + pair["rejected_ids"]) for pair in found]
    assert len(set(texts)) > 1  # the template writes what differs
    preferences = [encode_preference(row, tokenizer) for row in rows]
    assert [encode_preference(row, tokenizer) for row in read_dataset(path)] == preferences
    chats = [{**row, "messages": row["prompt"] + row["chosen"]} for row in rows]
    table_of_chats = table("f", chats, DEMONSTRATION_COLUMNS)
    for row, chat in zip(table_of_chats, chats, strict=True):
        assert encode_demonstration(row, tokenizer) == encode_demonstration(chat, tokenizer)


def test_the_trainer_reads_the_rows_of_a_file_as_they_are(tmp_path, options):
    tokenizer = byte_level(OPTIONS_TEMPLATE)
    rows = [{**CHAT, **more} for kind in NESTED for more in NESTED[kind]]
    alone = [encode_pair(row, n, tokenizer, "train") for n, row in enumerate(rows)]
    path = write_jsonl(tmp_path / "f", rows)
    for number in (None, 2):
        trainer = RewardTrainer(
            reader_of(tokenizer),
            RewardConfig(**{**options, "dataset_num_proc": number}),
            train_dataset=path,
            processing_class=tokenizer,
        )
        kept = [pair for pair in alone if pair["chosen_ids"] != pair["rejected_ids"]]
        columns = list(kept[0])
        assert [{c: row[c] for c in columns} for row in trainer.train_dataset] == kept
    trainer.train()


@pytest.mark.parametrize("kind", ["tools", "no options", "arguments", "prompt"])
def test_nulls_that_arrow_added_to_a_given_data_set_are_not_rendered(kind, options):
    """As in a file of columns, which holds the same."""
    tokenizer = byte_level(OPTIONS_TEMPLATE)
    rows = [{**CHAT, **more} for more in NESTED[kind]]
    alone = [encode_pair(row, n, tokenizer, "train") for n, row in enumerate(rows)]
    columns = {name: [row.get(name) for row in rows] for row in rows for name in row}
    given = Dataset.from_dict(columns)
    model, args = reader_of(tokenizer), RewardConfig(**options)
    for data in (given, DatasetDict(held=given)):
        trainer = RewardTrainer(
            model, args, train_dataset=given, eval_dataset=data, processing_class=tokenizer
        )
        read = [trainer.train_dataset, trainer.eval_dataset]
        read[1] = read[1]["held"] if data is not given else read[1]
        for found in read:
            assert [{c: row[c] for c in alone[0]} for row in found] == alone
    listed = rows_of(given, read_pairs)
    assert [{c: v for c, v in row.items() if v is not None} for row in listed] == rows


@pytest.mark.parametrize(
    ("trainer", "config", "encode"),
    [(SFTTrainer, SFTConfig, encode_demonstration), (DPOTrainer, DPOConfig, encode_preference)],
)
def test_policies_are_trained_on_the_rows_as_they_are(trainer, config, encode, options):
    tokenizer = byte_level(OPTIONS_TEMPLATE)
    rows = [{**CHAT, **more, "completion": said("a")} for more in NESTED["tools"]]
    encoded = [encode(row, tokenizer) for row in rows]
    expected = [{c: ids for c, ids in row.items() if c.endswith("ids")} for row in encoded]
    size = llama_config(len(tokenizer), max_position_embeddings=1024)
    model, *rest = (LlamaForCausalLM(size) for _ in range(1 + (trainer is DPOTrainer)))
    model.name_or_path = "unused"
    own = {k: v for k, v in options.items() if k != "activation_checkpointing"}
    args = config(**own, max_length=None)
    for data in (table("f", rows, (*DEMONSTRATION_COLUMNS, *COLUMNS)), Dataset.from_list(rows)):
        found = trainer(model, *rest, args, train_dataset=data, processing_class=tokenizer)
        assert [{c: row[c] for c in expected[0]} for row in found.train_dataset] == expected
    found.train()
