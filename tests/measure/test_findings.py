"""What counts as one prompt, and where a response begins."""

import pytest

from shiftrm.measure.diagnosis.findings import _shared, prompt_key


def dialogue(question, answer):
    return f"\n\nHuman: {question}\n\nAssistant: {answer}"


def test_the_prompt_of_a_transcript_ends_at_the_last_turn_that_both_share():
    """As in HH-RLHF. The answers of one pair begin alike, those of the other do not."""
    first = {"chosen": dialogue("hi", "I can"), "rejected": dialogue("hi", "I cannot")}
    second = {"chosen": dialogue("hi", "yes"), "rejected": dialogue("hi", "no")}
    other = {"chosen": dialogue("bye", "yes"), "rejected": dialogue("bye", "no")}
    assert prompt_key(first) == prompt_key(second) != prompt_key(other)


def test_a_prompt_that_is_given_is_the_prompt():
    one = {"prompt": "p", "chosen": "a", "rejected": "b"}
    assert prompt_key(one) == prompt_key({"prompt": "p", "responses": ["c", "d"]})
    chat = [{"role": "user", "content": "p"}]
    assert prompt_key({**one, "prompt": chat}) != prompt_key(one)
    for nothing in (None, []):
        assert prompt_key({**one, "prompt": nothing}) == ""


@pytest.mark.parametrize(
    ("sequences", "shared"),
    [
        ([(1, 2, 3), (1, 2, 4)], 2),
        ([(1, 2), (1, 2, 4)], 2),
        ([(), (1,)], 0),
        ([(1, 2)], 2),
        ([[{"a": 1}, {"b": 2}], [{"a": 1}]], 1),
    ],
)
def test_shared_beginnings(sequences, shared):
    assert _shared(sequences) == shared
