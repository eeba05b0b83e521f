"""Edits that make a text worse: by hand, and what holds for every text and every draw."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from shiftrm.data.edits import cut, repeated, sentences_of, shuffled, words_of

STORY = " One day we left. Two of us got lost!  Three came\nback (late)."
WORDS = " a b c d e f g h"
ODD = [
    "",
    " ",
    "\n",
    "x",
    "🙂",
    "🙂🙂 🙂",
    "e\u0301 o\u0308 u",
    "...",
    "1. 2. 3.",
    "?!",
    "no " * 50,
]
ODD += [
    "\ud800 \x00",
    "你好。我很好。谢谢",
    "- a\n- b\n- c\n",
    "\u200b" * 5,
    "a" * 9000,
    "no " * 50,
]


def many(edit, text, count=200):
    return [edit(text, random.Random(seed)) for seed in range(count)]


def test_parts_hold_the_whole_text():
    assert sentences_of(STORY).parts == [
        "One day we left.",
        "Two of us got lost!",
        "Three came",
        "back (late).",
    ]
    assert sentences_of(STORY).gaps == [" ", "  ", "\n", ""]
    assert sentences_of("1. Yes.\n2. No.\n").parts == ["1. Yes.", "2. No."]
    assert sentences_of("At 3.5 e.g. it works. Good").parts == ["At 3.5 e.g.", "it works.", "Good"]
    assert words_of("\n a  b ").parts == ["a", "b"]
    for text in [STORY, WORDS, *ODD]:
        assert words_of(text).text() == (text if words_of(text).parts else words_of(text).lead)
        assert not sentences_of(text).parts or sentences_of(text).text() == text


def test_repeated_says_a_span_of_words_again():
    added = replaced = 0
    for text in many(repeated, WORDS):
        old, new = WORDS.split(), text.split()
        assert text == " " + " ".join(new)
        counts = Counter(new)
        said_again = sum(n - 1 for n in counts.values())
        assert 2 <= said_again <= 5
        assert max(counts.values()) == 2
        if len(new) == len(old):  # as many words are gone
            replaced += 1
            assert len(set(old) - set(new)) == said_again
        else:
            added += 1
            assert set(new) == set(old)
            assert len(new) == len(old) + said_again
    assert added > 60
    assert replaced > 40


def test_repeated_says_a_sentence_again():
    text = "A one. B two. C three."
    found = set(many(repeated, text))
    inserted = {
        "A one. A one. B two. C three.",
        "A one. B two. A one. C three.",
        "A one. B two. C three. A one.",
        "A one. B two. B two. C three.",
        "A one. B two. C three. B two.",
        "A one. B two. C three. C three.",
    }
    replaced = {
        "A one. A one. C three.",
        "A one. B two. A one.",
        "B two. B two. C three.",
        "A one. B two. B two.",
        "C three. B two. C three.",
        "A one. C three. C three.",
    }
    assert found == inserted | replaced


def test_cut_keeps_a_beginning_that_ends_no_sentence():
    kept = Counter(len(text.split()) for text in many(cut, WORDS))
    assert set(kept) == {2, 3, 4, 5, 6}  # of 8 words
    for text in many(cut, "a b c d. e f g h"):
        assert text in ("a b", "a b c", "a b c d. e", "a b c d. e f")
    assert cut("a. b. c. d. e. f.", random.Random(0)) is None
    assert cut("a\nb\nc\nd\ne\nf", random.Random(0)) is None
    assert cut("a b c d e", random.Random(0)) is None


def test_shuffled_keeps_words_and_white_space():
    text = " one two  three\nfour five six\tseven"
    for new in many(shuffled, text):
        assert Counter(new.split()) == Counter(text.split())
        assert len(new) == len(text)
        assert new.startswith(" ")
        assert sum(a != b for a, b in zip(new.split(), text.split(), strict=True)) >= 4
    assert shuffled("a a a a b b c d", random.Random(0)) is None


def test_shuffled_keeps_words_of_a_sentence_together():
    for new in many(shuffled, "a1 a2 a3 a4. b1 b2 b3. c1 c2"):
        letters = [word[0] for word in new.split()]
        assert len([x for x, y in pairwise(letters) if x != y]) == 2


@pytest.mark.parametrize("edit", [repeated, cut, shuffled])
@pytest.mark.parametrize("text", ODD)
def test_odd_text_is_changed_or_refused(edit, text):
    for new in many(edit, text, 30):
        assert new is None or isinstance(new, str)
        if new is not None and edit is shuffled:
            assert Counter(new.split()) == Counter(text.split())


@pytest.mark.parametrize(
    ("text", "sentences"),
    [
        ("「魚です。」と言った。「肉です。」", ["「魚です。」", "と言った。", "「肉です。」"]),
        ("（小さい。）大きい！』そう。", ["（小さい。）", "大きい！』", "そう。"]),  # noqa: RUF001
        ('他说。"你好。"是的。', ["他说。", '"你好。', '"是的。']),  # a straight mark may open
        ('"One." Two. (Three.) Four', ['"One."', "Two.", "(Three.)", "Four"]),
    ],
)
def test_marks_that_close_a_sentence_stay_with_it(text, sentences):
    assert sentences_of(text).parts == sentences
    assert sentences_of(text).text() == text


def test_a_word_that_ends_in_a_closed_sentence_is_no_place_to_cut():
    assert cut("「a。」 「b。」 「c。」 「d。」 「e。」 「f。」", random.Random(0)) is None
