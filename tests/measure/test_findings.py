"""What counts as one prompt, and where a response begins."""

import pytest

from shiftrm.measure.diagnosis.findings import _shared, prompt_key
from shiftrm.trainers.pair_batches import PROMPT, encode_pair
from tests.byte_level import byte_level


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
        assert prompt_key({**one, "prompt": nothing}) == prompt_key({"responses": ["b", "a"]})


def chat(*turns, system=None):
    before = [] if system is None else [{"role": "system", "content": system}]
    roles = ("user", "assistant")
    return before + [{"role": roles[n % 2], "content": text} for n, text in enumerate(turns)]


INDEPENDENT = [
    {"chosen": "The moon is round.", "rejected": "The sea is dry."},
    {"chosen": "The tax is due in May.", "rejected": "The law says no."},
    {"chosen": "Yes", "rejected": "No"},
    {"chosen": "Cats purr", "rejected": "Dogs bark"},
    {"responses": ["The sun", "The rain", "The snow"]},
    {"chosen": "The moon", "rejected": "The moon is round."},
    {"chosen": chat("a", "b"), "rejected": chat("c", "d")},
    {"chosen": chat("e", "f"), "rejected": chat("g", "h")},
    {"chosen": chat("a", "b", system="s"), "rejected": chat("c", "d", system="s")},
    {"chosen": chat("e", "f", system="s"), "rejected": chat("g", "h", system="s")},
    {"responses": ["a", chat("b")]},
    {"responses": ["a", chat("c")]},
]


def test_sides_that_begin_alike_by_accident_have_no_common_prompt():
    assert len({prompt_key(row) for row in INDEPENDENT}) == len(INDEPENDENT)
    for row in INDEPENDENT[:4]:  # whichever is preferred
        assert prompt_key(row) == prompt_key({"chosen": row["rejected"], "rejected": row["chosen"]})
    numbers = {encode_pair(r, 0, byte_level(), "f")[PROMPT] for r in INDEPENDENT if "chosen" in r}
    assert len(numbers) == sum("chosen" in row for row in INDEPENDENT)


def test_a_chat_without_a_prompt_has_the_turns_that_both_share():
    for system in (None, "s"):
        first = {"chosen": chat("q", "a", system=system), "rejected": chat("q", "b", system=system)}
        second = {"responses": [chat("q", x, system=system) for x in ("c", "d", "e")]}
        other = {"chosen": chat("p", "a", system=system), "rejected": chat("p", "b", system=system)}
        assert prompt_key(first) == prompt_key(second) != prompt_key(other)
        assert prompt_key(first) == prompt_key({**other, "prompt": chat("q", system=system)})


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
