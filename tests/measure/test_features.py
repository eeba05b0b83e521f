"""Text features by hand, in several scripts, on chats and on nothing."""

import math

import pytest

from shiftrm.measure.features import (
    FEATURES,
    Reading,
    TextFeature,
    measure_text,
    reading,
    words_of,
)
from shiftrm.models.responses import Response


def measured(text, prompt="", finished=True):
    return measure_text(Reading(prompt, text, finished))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("It's 3.5 km: snake_case -- ok", ["it's", "3", "5", "km", "snake", "case", "ok"]),
        ("Isn\u2019t it?", ["isn\u2019t", "it"]),
        ("Das schöne Haus", ["das", "schöne", "haus"]),
        ("नमस्ते दुनिया", ["नमस्ते", "दुनिया"]),
        ("cafe\u0301 au lait", ["cafe\u0301", "au", "lait"]),
        ("我喜欢 AI模型。", ["我", "喜", "欢", "ai", "模", "型"]),
        ("مرحبا بالعالم؟", ["مرحبا", "بالعالم"]),
        ("안녕 세계", ["안녕", "세계"]),
        ("🙂 !?", []),
        ("", []),
    ],
)  # fmt: skip
def test_words(text, words):
    assert words_of(text) == words


def test_repetition_by_hand():
    """the cat sat the cat ran the: 7 words, 4 different; 6 pairs, one of them twice."""
    found = measured("The cat sat. The cat ran the")
    assert found["length"] == 7
    assert found["repeated_words"] == pytest.approx(3 / 7)
    assert found["repeated_pairs"] == pytest.approx(1 / 6)
    assert found["word_length"] == pytest.approx(21 / 7)


def test_overlap_with_the_prompt_counts_content_words():
    """Of `roses`, `garden`, `describe` two occur; of the four content words three are from it."""
    found = measured("The roses! Roses in your garden grow", "Describe the roses in the garden")
    assert found["prompt_used"] == pytest.approx(2 / 3)
    assert found["from_prompt"] == pytest.approx(3 / 4)
    chinese = measured("花园很美", "描写花园")
    assert chinese["prompt_used"] == pytest.approx(2 / 4)


def test_marks_by_hand():
    found = measured("Look:\n\n- One 12\n2) TWO?\nthree!!")
    assert found["list_lines"] == pytest.approx(2 / 4)
    assert found["digits"] == pytest.approx(3 / 24)
    assert found["questions"] == pytest.approx(100 / 6)
    assert found["exclamations"] == pytest.approx(200 / 6)
    assert found["capitals"] == pytest.approx(5 / 15)
    assert measured("no - list, -5 or 3.5 here")["list_lines"] == 0
    assert measured("¿Qué? 什么\uff1f ماذا؟")["questions"] == pytest.approx(300 / 4)


def test_phrases_and_ends():
    assert measured("Perhaps it might rain")["hedges"] == pytest.approx(50)
    for text in ("I'm sorry, but no.", "As an AI language model", "I cannot help with that"):
        assert measured(text)["refusals"] == 1, text
    for text in ("Sorry is a word", "I can help with that", "An AI wrote it", "I won't lie"):
        assert measured(text)["refusals"] == 0, text
    assert measured("and then", finished=False)["unfinished"] == 1
    assert measured("and then")["unfinished"] == 0


@pytest.mark.parametrize("text", ["", " ", "\n\n", "\u200d", "!", "\ud800", "\u0301", "-", "1."])
@pytest.mark.parametrize("prompt", ["", "?", "a prompt"])
def test_any_text_has_finite_features(text, prompt):
    found = measured(text, prompt, finished=False)
    assert list(found) == FEATURES.names()
    assert all(math.isfinite(value) for value in found.values())
    assert all(isinstance(value, float) for value in found.values())


def test_chats_and_whole_dialogues_are_read_from_the_last_turn():
    question = [{"role": "system", "content": "x"}, {"role": "user", "content": "Why?"}]
    answer = {"role": "assistant", "content": "So."}
    assert reading(Response(question, [answer])) == Reading("Why?", "So.")
    assert reading(Response(None, [*question, answer], False)) == Reading("Why?", "So.", False)
    assert reading(Response([], [answer])) == Reading("", "So.")
    assert reading(Response("Why?", [answer])) == Reading("Why?", "So.")
    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image"}]}
    assert reading(Response([parts], "b")) == Reading("a\n", "b")
    assert reading(Response([{"role": "user", "tool_calls": []}], "b")) == Reading("", "b")
    whole = "\n\nHuman: Why?\n\nAssistant: No.\n\nHuman: Why not?\n\nAssistant: So."
    found = reading(Response(None, whole))
    assert found.text == " So."
    assert found.prompt.endswith("Why not?")
    assert reading(Response(None, "So.")) == Reading("", "So.")


def test_a_feature_is_one_entry(monkeypatch):
    monkeypatch.setattr(FEATURES, "_entries", dict(FEATURES._entries))
    FEATURES.register("commas")(TextFeature("commas", "number", lambda r: r.text.count(",")))
    assert measured("a, b, c")["commas"] == 2
