"""Demonstrations and pairs as tokens: TRL's, and by hand where TRL has none."""

import pytest
import trl
from datasets import Dataset

from shiftrm.errors import UserError
from shiftrm.policies.tokens import drop, encode_demonstration, encode_preference

USER = {"role": "user", "content": "the red cat"}
ANSWER = {"role": "assistant", "content": "runs"}
DEMONSTRATIONS = {
    "text": [
        {"prompt": "the red", "completion": " cat runs"},
        {"prompt": "a dog", "completion": " sits </s>"},  # it brings its EOS
    ],
    "chat": [
        {"prompt": [USER], "completion": [ANSWER]},
        {"prompt": [USER, ANSWER, USER], "completion": [{**ANSWER, "content": "a small fish"}]},
    ],
}
PAIRS = {
    "text": [{"prompt": "the red", "chosen": " cat runs", "rejected": " dog"}],
    "chat": [{"prompt": [USER], "chosen": [ANSWER], "rejected": [{**ANSWER, "content": "sits"}]}],
    "without prompt": [
        {"chosen": [USER, ANSWER], "rejected": [USER, {**ANSWER, "content": "sits"}]}
    ],
}


@pytest.mark.parametrize("kind", DEMONSTRATIONS)
def test_demonstrations_are_trls_tokens(kind, policy, tokenizer, arguments):
    rows = DEMONSTRATIONS[kind]
    theirs = trl.SFTTrainer(
        policy,
        arguments(trl.SFTConfig),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train_dataset
    for row, expected in zip(rows, theirs, strict=True):
        ours = encode_demonstration(row, tokenizer)
        assert ours["input_ids"] == expected["input_ids"]
        learnt = [label != -100 for label in expected["labels"]]
        assert [bool(bit) for bit in ours["completion_mask"]] == learnt


@pytest.mark.parametrize("kind", PAIRS)
def test_pairs_are_trls_tokens(kind, policy, tokenizer, arguments):
    rows = PAIRS[kind]
    policy.name_or_path = "unused"
    theirs = trl.DPOTrainer(
        policy,
        type(policy)(policy.config),
        arguments(trl.DPOConfig),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    ).train_dataset
    for row, expected in zip(rows, theirs, strict=True):
        ours = encode_preference(row, tokenizer)
        assert ours == {key: expected[key] for key in ours}


def test_a_plain_answer_to_a_chat_is_the_assistants(tokenizer):
    plain = encode_demonstration({"prompt": [USER], "completion": "runs"}, tokenizer)
    assert plain == encode_demonstration({"prompt": [USER], "completion": [ANSWER]}, tokenizer)


def test_every_answer_of_a_conversation_is_learnt(tokenizer):
    """By hand: `<s> ROLE WORDS </s>` a message, of the assistant's the words and `</s>`."""
    messages = [USER, ANSWER, {**USER, "content": "a dog"}, {**ANSWER, "content": "sits"}]
    found = encode_demonstration({"messages": messages}, tokenizer)
    words = "<s> user the red cat </s> <s> assistant runs </s> <s> user a dog </s>"
    words += " <s> assistant sits </s>"
    assert found["input_ids"] == tokenizer.convert_tokens_to_ids(words.split())
    expected = [0] * 6 + [0, 0, 1, 1] + [0] * 5 + [0, 0, 1, 1]
    assert found["completion_mask"] == expected


def test_what_is_no_answer_is_not_learnt(tokenizer):
    system = {"role": "system", "content": "small"}
    found = encode_demonstration({"messages": [system, USER, ANSWER, USER]}, tokenizer)
    assert sum(found["completion_mask"]) == 2
    assert encode_demonstration({"messages": [ANSWER]}, tokenizer)["completion_mask"][-2:] == [1, 1]


def test_an_earlier_answer_that_the_template_rewrites_is_not_learnt(tokenizer):
    """As templates do that leave the reasoning out of the history."""
    tokenizer = type(tokenizer)(
        tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>", pad_token="<pad>"
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{% if m.role == 'assistant' %}"
        "{{ 'small ' + m.content if loop.last else m.content }} </s> "
        "{% else %}{{ m.content }} {% endif %}{% endfor %}"
        "{% if add_generation_prompt %}small {% endif %}"
    )
    messages = [USER, ANSWER, USER, {**ANSWER, "content": "sits"}]
    found = encode_demonstration({"messages": messages}, tokenizer)
    words = "the red cat runs </s> the red cat small sits </s>"
    assert found["input_ids"] == tokenizer.convert_tokens_to_ids(words.split())
    assert found["completion_mask"] == [0] * 9 + [1, 1]


def test_a_side_that_was_cut_off_is_left_open(tokenizer):
    row = {**PAIRS["text"][0], "chosen_finished": False, "rejected_finished": True}
    found = encode_preference(row, tokenizer)
    assert found["chosen_ids"][-1] != tokenizer.eos_token_id
    assert found["rejected_ids"][-1] == tokenizer.eos_token_id


def test_nothing_left():
    with pytest.raises(UserError, match=r"nothing is left of the rows after dropping 2 odd; do so"):
        drop(
            Dataset.from_dict({"x": [1, 3]}), "rows", {"odd": lambda r: r["x"] == 2}, advice="do so"
        )
