"""A row's `tools` and `chat_template_kwargs`: read in training, in scoring and in between."""

import json

import pytest
from transformers import LlamaForSequenceClassification

from shiftrm.data.groups import read_groups
from shiftrm.data.negatives import NEGATIVES, negative_pairs, two_way_pairs
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.measure.diagnosis.findings import encode_data, read_data
from shiftrm.measure.judges.comparing import match_rows
from shiftrm.measure.sight import sight_tests
from shiftrm.models.rendering import encode, option_columns, template_options
from shiftrm.models.responses import encode_response, group_responses
from shiftrm.models.rope import LengthLimit
from shiftrm.models.scoring import Scorer, row_responses
from shiftrm.trainers.contrast import ContrastConfig, ContrastTrainer
from shiftrm.trainers.contrast_rows import FitsLimit, as_groups
from shiftrm.trainers.meta_groups import MetaGroups
from shiftrm.trainers.pair_batches import encode_pair
from shiftrm.trainers.self_labelled import best_and_worst
from tests.byte_level import OPTIONS_TEMPLATE, byte_level
from tests.conftest import llama_config

TOKENIZER = byte_level(OPTIONS_TEMPLATE)
TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
GIVEN = [
    {"tools": TOOLS},
    {"chat_template_kwargs": {"style": "short", "other": None}},
    {"tools": TOOLS, "chat_template_kwargs": {"style": None}},
    {},
]
"""Columns of four prompts."""

WORDS = "the quick brown fox jumps over the lazy dog and says that it was here before"


def user(words):
    return [{"role": "user", "content": words}]


def said(words):
    return [{"role": "assistant", "content": words}]


GROUPS = [
    {"prompt": user(f"What of the {n}, and why is it so?"), "responses": texts, **given}
    for n, given in enumerate(GIVEN)
    for texts in [[said(f"{n} {WORDS}"), said(f"{WORDS} {n} {n}")]]
]
OF_PROMPT = {json.dumps(row["prompt"]): given for row, given in zip(GROUPS, GIVEN, strict=True)}
PAIRS = [
    {"prompt": row["prompt"], "chosen": row["responses"][0], "rejected": row["responses"][1]}
    | given
    for row, given in zip(GROUPS, GIVEN, strict=True)
]


def columns_of(row):
    return {name: row[name] for name in ("tools", "chat_template_kwargs") if name in row}


def scorer():
    config = llama_config(len(TOKENIZER), num_labels=1, max_position_embeddings=2048)
    return Scorer(LlamaForSequenceClassification(config).eval(), TOKENIZER)


class Recorded:
    """A reward function that reads responses, and keeps them."""

    def __init__(self):
        self.responses = []

    def score(self, responses):
        self.responses += responses
        return [float(len(str(one.text))) for one in responses]


@pytest.mark.parametrize("given", GIVEN)
def test_options_and_columns_are_each_others_reverse(given):
    assert option_columns(template_options(given)) == given
    nulls = {"tools": None, "chat_template_kwargs": None, **given}
    assert option_columns(template_options(nulls)) == given
    as_text = given | ({"tools": json.dumps(TOOLS)} if "tools" in given else {})
    assert template_options(as_text) == template_options(given)


def test_what_is_scored_is_what_is_trained_on():
    for pair, group in zip(PAIRS, GROUPS, strict=True):
        trained = encode_pair(pair, 0, TOKENIZER, "train")
        both = [trained["chosen_ids"], trained["rejected_ids"]]
        one = {"prompt": pair["prompt"], "response": pair["chosen"], **columns_of(pair)}
        for row, ids in ((pair, both), (group, both), (one, both[:1])):
            assert [encode_response(TOKENIZER, r) for r in row_responses(row, "")] == ids
        assert [encode_response(TOKENIZER, r) for r in group_responses(group)] == both
        [ours] = match_rows([group], [one])
        assert [encode_response(TOKENIZER, r) for r in ours.sides] == [both[0], both[0]]
    texts = [TOKENIZER.decode(encode_pair(row, 0, TOKENIZER, "")["chosen_ids"]) for row in PAIRS]
    assert len({text.partition("user")[0] for text in texts}) == len(GIVEN)


def test_columns_that_are_no_options_are_refused_with_their_row(tmp_path):
    for bad, message in (
        ({"tools": "["}, "column 'tools' is not valid JSON"),
        ({"chat_template_kwargs": []}, "column 'chat_template_kwargs' is .*; expected an object"),
        ({"chat_template_kwargs": {"chat_template": ""}}, "'chat_template_kwargs' has 'chat_te"),
    ):
        path = write_jsonl(tmp_path / "f", [GROUPS[0], {**GROUPS[1], **bad}])
        with pytest.raises(UserError, match=f"f:2: .*{message}"):
            read_groups(path)
        with pytest.raises(UserError, match=f"f:2: .*{message}"):
            row_responses({"prompt": "a", "response": "b", **bad}, "f:2")
        with pytest.raises(UserError, match=f"ours, row 1: .*{message}"):
            match_rows([{"prompt": "a", "response": "b", **bad}], [])


@pytest.mark.parametrize("matching", ["random", "length", "style", "hard"])
@pytest.mark.parametrize("kind", NEGATIVES.names())
def test_made_pairs_have_the_options_of_their_prompt(kind, matching):
    """Also where the worse response comes from another prompt, which has others."""
    reward = Recorded()
    made = negative_pairs(GROUPS, kind, 60, matching=matching, score=reward)
    assert len({json.dumps(row["prompt"]) for row in made}) == len(GROUPS)
    for row in made:
        assert columns_of(row) == OF_PROMPT[json.dumps(row["prompt"])]
    for one in reward.responses:  # that choose the hard ones
        assert option_columns(one.template_options) == OF_PROMPT[json.dumps(one.prompt)]
    assert bool(reward.responses) == (matching == "hard" and NEGATIVES.get(kind).matched)
    assert negative_pairs(as_groups(PAIRS), kind, 60, matching=matching, score=reward) == made


def test_sight_tests_score_the_options_of_the_prompt():
    reward = Recorded()
    sight_tests(reward, GROUPS, count=20)
    assert {json.dumps(one.prompt) for one in reward.responses} == OF_PROMPT.keys()
    for one in reward.responses:
        assert option_columns(one.template_options) == OF_PROMPT[json.dumps(one.prompt)]
    again = [row | {"chat_template_kwargs": {"style": "other"}} for row in GROUPS]
    couples = two_way_pairs(GROUPS + again, 40)  # one prompt, once with each
    found = {json.dumps(columns_of(pair)) for couple in couples for pair in couple}
    assert len(found) == len(GIVEN) + 2


def test_contrast_trains_on_the_options_of_the_prompt(tmp_path):
    args = ContrastConfig(
        str(tmp_path), use_cpu=True, report_to="none", disable_tqdm=True,
        contrast_source="both", contrast_share=0.9,
    )  # fmt: skip
    trainer = ContrastTrainer(
        scorer().model, args, train_dataset=PAIRS, meta_dataset=GROUPS,
        processing_class=TOKENIZER,
    )  # fmt: skip
    texts = [TOKENIZER.decode(row["chosen_ids"]) for row in trainer.train_dataset]
    assert len(texts) == 40
    for text in texts:
        [row] = [row for row in GROUPS if row["prompt"][0]["content"] in text]
        head = encode(TOKENIZER, row["prompt"], "", template_options=template_options(row))
        assert text.startswith(TOKENIZER.decode(head).removesuffix("<|im_end|>"))


def test_own_labels_keep_the_options():
    made = best_and_worst(GROUPS, [[1.0, 0.0]] * len(GROUPS))
    assert [columns_of(row) for row in made] == GIVEN


def test_groups_of_a_meta_step_are_read_with_their_options():
    expected = [[encode_response(TOKENIZER, r) for r in group_responses(row)] for row in GROUPS]
    for rows in (GROUPS, [{"tools": None, **row} for row in GROUPS]):
        found = MetaGroups(rows, TOKENIZER, limit=LengthLimit(None, "too long", ""), seed=0)
        assert found.groups == expected


def test_options_count_for_the_limit_and_not_for_the_length_of_a_response(tmp_path):
    for row, alone in zip(GROUPS, [{**row, "tools": None} for row in GROUPS], strict=True):
        whole, short = (
            len(encode_response(TOKENIZER, group_responses(r)[0])) for r in (row, alone)
        )
        for size in (whole, short):
            fits = FitsLimit(TOKENIZER, LengthLimit(size, "too long", ""))
            assert fits(group_responses(row)[0]) == (size == whole)
    path = write_jsonl(tmp_path / "f", GROUPS)
    lengths = [len(TOKENIZER.encode(f"{WORDS} 0")) + 1, len(TOKENIZER.encode(f"{WORDS} 0 0")) + 1]
    for _, _, found in encode_data(scorer(), read_data(str(path), "f")):
        assert [length for _, length in found] == lengths
