"""Contrast in a trainer: what does not fit is left out before the rows are counted and drawn."""

import copy

import pytest
from datasets import Dataset

from shiftrm.data.groups import read_groups
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.models.rendering import encode
from shiftrm.trainers.contrast import (
    ContrastConfig,
    ContrastMetaConfig,
    ContrastMetaTrainer,
    ContrastTrainer,
)

PROMPTS = [f"the {colour} {who}" for colour in ("red", "blue") for who in ("cat", "dog", "bird")]
SHORT, LONG = " runs the fish", " flies" * 30


def mixed_groups(long=(LONG,), prompts=PROMPTS):
    """Each prompt has one short answer of its own, and long ones."""
    words = ("runs", "sits", "flies", "swims", "fish", "small")
    return [
        {"prompt": p, "responses": [f" {word} the large fish", *long]}
        for p, word in zip(prompts, words, strict=False)
    ]


@pytest.fixture
def train(reward_model, pairs, options, tokenizer):
    """A function that makes a trainer of a method on 12 short pairs."""

    def made(groups, *, meta=False, rows=pairs, **settings):
        config, cls = (
            (ContrastMetaConfig, ContrastMetaTrainer) if meta else (ContrastConfig, ContrastTrainer)
        )
        return cls(
            copy.deepcopy(reward_model),
            config(**{**options, "max_length": 20, **settings}),
            train_dataset=Dataset.from_list(rows),
            meta_dataset=groups,
            processing_class=tokenizer,
        )

    return made


def contrasted(trainer):
    """The tokens of the sides of the rows behind the 12 pairs."""
    return [
        row[f"{side}_ids"]
        for row in trainer.train_dataset.to_list()
        if row["row_index"] >= 12
        for side in ("chosen", "rejected")
    ]


@pytest.mark.parametrize(("share", "made"), [(0.25, 4), (0.5, 12), (0.75, 36)])
@pytest.mark.parametrize("kinds", [["other_prompt"], ["other_prompt", "repeated"]])
def test_what_does_not_fit_is_left_out_before_the_rows_are_drawn(
    train, tokenizer, caplog, share, made, kinds
):
    trainer = train(mixed_groups(), contrast_share=share, contrast_negatives=kinds)
    sides = contrasted(trainer)
    assert len(sides) == 2 * made
    assert len(trainer.train_dataset) == 12 + made
    assert max(map(len, sides)) <= 20
    assert trainer.dropped_pairs == {
        "train": {"longer than max_length=20 tokens": 0, "whose two sides are the same tokens": 0}
    }
    assert (
        "contrast: left out 6 of the 12 responses of the groups, longer than max_length=20 tokens "
        "with their prompts"
    ) in caplog.text
    own = {tuple(encode(tokenizer, g["prompt"], g["responses"][0])) for g in mixed_groups()}
    assert {tuple(ids) for ids in sides[0::2]} <= own


def test_a_fault_that_makes_a_response_too_long_is_drawn_again(train, tokenizer):
    """The answers have just the length that is allowed: a part said again must replace one."""
    groups = mixed_groups(long=())
    groups = [{**g, "responses": [f"{g['responses'][0]} swims small dog"]} for g in groups]
    longest = max(len(encode(tokenizer, g["prompt"], g["responses"][0])) for g in groups)
    trainer = train(
        groups, max_length=longest, contrast_share=0.75, contrast_negatives=["repeated"]
    )
    lengths = [len(ids) for ids in contrasted(trainer)]
    assert len(lengths) == 2 * 36
    assert set(lengths) == {longest}


def test_the_share_is_of_the_pairs_that_are_kept(train, pairs):
    """Of 12 pairs 6 are too long; a share of one half of all is then 6."""
    rows = [{**row, "chosen": LONG} if n < 6 else row for n, row in enumerate(pairs)]
    trainer = train(mixed_groups(long=()), rows=rows, contrast_share=0.5)
    found = trainer.train_dataset["row_index"]
    assert list(found) == [*range(6, 12), *range(12, 18)]
    assert trainer.dropped_pairs["train"]["longer than max_length=20 tokens"] == 6


def test_the_models_context_is_a_limit(train, reward_model, caplog):
    room = reward_model.config.max_position_embeddings
    trainer = train(mixed_groups(long=(" flies" * room,)), max_length=None)
    assert max(map(len, contrasted(trainer))) <= room
    assert f"longer than the model's context of {room} tokens" in caplog.text


@pytest.mark.parametrize("meta", [False, True])
def test_nothing_that_fits_is_one_line(train, meta):
    groups = [{"prompt": p, "responses": [LONG, LONG + " fish"]} for p in PROMPTS]
    with pytest.raises(UserError, match="all 12 responses of the groups are longer than") as error:
        train(groups, meta=meta)
    assert "max_length=20 tokens with their prompts" in str(error.value)
    assert "\n" not in str(error.value)


def test_too_few_that_fit_say_how_many_are_too_long(train):
    groups = mixed_groups(prompts=PROMPTS[:1])
    groups += [{"prompt": p, "responses": [LONG, LONG + " fish"]} for p in PROMPTS[1:]]
    with pytest.raises(UserError, match="needs responses to at least two prompts") as error:
        train(groups)
    assert "11 of 12 responses are longer than max_length=20 tokens" in str(error.value)


def test_a_meta_step_gets_a_row_for_each_response_that_fits(train, tmp_path):
    write_jsonl(tmp_path / "groups.jsonl", mixed_groups())
    for given in (read_groups(tmp_path / "groups.jsonl"), str(tmp_path / "groups.jsonl")):
        trainer = train(given, meta=True, contrast_negatives=["repeated"])
        found = trainer._groups.groups
        assert len(found) == 6  # and not 12
        assert max(len(ids) for group in found for ids in group) <= 20
    assert len(train(mixed_groups(), meta=True, contrast_groups=9)._groups.groups) == 9


def test_pairs_of_texts_are_contrasted_with_answers_to_chats(train, pairs, tokenizer):
    """Either is encoded as it is; a row of the contrast has the tokens that it has alone."""
    groups = [
        {"prompt": [{"role": "user", "content": g["prompt"]}], "responses": g["responses"]}
        for g in mixed_groups(long=())
    ]
    trainer = train([{**g, "responses": [*g["responses"], SHORT]} for g in groups], max_length=40)
    own = {tuple(encode(tokenizer, g["prompt"], r)) for g in groups for r in g["responses"]}
    own |= {tuple(encode(tokenizer, g["prompt"], SHORT)) for g in groups}
    sides = contrasted(trainer)
    assert len(sides) == 8
    assert {tuple(ids) for ids in sides[0::2]} <= own
    first = trainer.train_dataset[0]
    assert first["chosen_ids"] == encode(tokenizer, pairs[0]["prompt"], pairs[0]["chosen"])


@pytest.mark.parametrize(("column", "given", "of_contrast"), [("margin", 0.5, 0), ("weight", 2, 1)])
def test_contrast_rows_have_no_margin_and_the_weight_of_one_pair(
    train, pairs, column, given, of_contrast
):
    rows = [{**row, column: given} for row in pairs]
    trainer = train(mixed_groups(long=()), rows=rows)
    assert trainer.train_dataset[column][:] == [given] * 12 + [of_contrast] * 4


@pytest.mark.parametrize("meta", [False, True])
def test_a_source_that_cannot_be_used_is_named_with_the_reason(train, pairs, caplog, meta):
    bare = [{**row, "prompt": None} for row in pairs]
    if meta:
        train(mixed_groups(), rows=bare, meta=True, contrast_source="both")
        assert (
            "contrast leaves out other_prompt of the pairs, which needs responses with a prompt of "
            "their own (column 'prompt')"
        ) in caplog.text
        with pytest.raises(UserError, match=r"needs responses with a prompt .*of the pairs"):
            train(mixed_groups(), rows=bare, meta=True, contrast_source="pairs")
    groups = [{"prompt": None, "responses": [" a b c d e f g", " b c d e f g"]}]
    with pytest.raises(UserError, match=r"repeated: .* needs responses with a prompt of their own"):
        train(groups, meta=meta, contrast_negatives=["repeated"])
    groups = [{"prompt": "the", "responses": ["", " "]}]
    with pytest.raises(UserError, match=r"repeated: .* needs responses that are not blank"):
        train(groups, meta=meta, contrast_negatives=["repeated"])
