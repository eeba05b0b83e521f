"""Measurable features of a response's text. To add one, add a line to `_OWN`.

They cost no model and no labels. None of them is good or bad by itself: they serve to say what a
reward model pays for (`measure.diagnosis.pays`).

Words are runs of letters and digits of any script, in small letters; in Chinese and Japanese every
character counts as a word, since these scripts have no spaces (Thai, Lao, Khmer and Burmese have
none either: there a phrase counts as one word). The word lists (`phrases.py`) are English; in other
languages the features that need one are 0, and all words of three letters are content words.

The share of different words is one minus the share of repeated ones, so it is not a feature of its
own.
"""

import re
import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from itertools import pairwise
from typing import Any

import numpy as np

from shiftrm.core.discrimination import Floats
from shiftrm.measure.phrases import FUNCTION_WORDS, HEDGES, REFUSAL
from shiftrm.models.rendering import Text
from shiftrm.models.responses import Response
from shiftrm.registry import Registry

__all__ = [
    "FEATURES",
    "Reading",
    "TextFeature",
    "measure_all",
    "measure_text",
    "reading",
    "words_of",
]


@dataclass(frozen=True)
class Reading:
    """A response as the features read it.

    Attributes:
        prompt: text of the prompt; of a chat, of its last message.
        text: text of the response.
        finished: False if a limit cut it off.
    """

    prompt: str
    text: str
    finished: bool = True

    @cached_property
    def words(self) -> list[str]:
        return words_of(self.text)

    @cached_property
    def content(self) -> list[str]:
        """Return the response's words without function words."""
        return _content(self.words)

    @cached_property
    def asked(self) -> frozenset[str]:
        """Return the prompt's words without function words."""
        return frozenset(_content(words_of(self.prompt)))


@dataclass(frozen=True)
class TextFeature:
    """A number of a response's text.

    Attributes:
        label: what there is more of, as in "more repeated words".
        meaning: what is measured, for tables.
        measure: computes it; any response, also an empty one, has a finite value.
    """

    label: str
    meaning: str
    measure: Callable[[Reading], float]


FEATURES = Registry[TextFeature]("text feature", TextFeature)


def measure_text(read: Reading) -> dict[str, float]:
    """Return every feature of a response by name, in the order of `FEATURES`."""
    return {name: float(FEATURES.get(name).measure(read)) for name in FEATURES.names()}


def measure_all(responses: Sequence[Response]) -> dict[str, Floats]:
    """Return the values of every feature, one for each response."""
    found = [measure_text(reading(response)) for response in responses]
    return {
        name: np.array([values[name] for values in found], dtype=np.float64)
        for name in FEATURES.names()
    }


def reading(response: Response) -> Reading:
    """Return a response as text.

    Without a prompt, what stands before the last turn of the response is the prompt: a message, or
    what follows the last "Assistant:" of a dialogue written as in HH-RLHF.
    """
    prompt, text, finished = response.prompt, response.text, response.finished
    if not isinstance(text, str):
        return Reading(_text(prompt or text[:-1]), _text(text), finished)
    if prompt:
        return Reading(_text(prompt), text, finished)
    before, marker, after = text.rpartition(_TURN)
    return Reading(before if marker else "", after, finished)


_TURN = "\n\nAssistant:"
_QUESTION = "?\uff1f\u061f\u037e"  # also of Chinese, Arabic and Greek


def _text(messages: Text) -> str:
    """Return a string, or the text of the last message."""
    if isinstance(messages, str):
        return messages
    content: Any = messages[-1].get("content") if messages else None
    if isinstance(content, list):  # parts of a message
        return "\n".join(part.get("text") or "" for part in content if isinstance(part, dict))
    return content if isinstance(content, str) else ""


# -- words -------------------------------------------------------------------------------------

_SINGLE = "\u3040-\u30ff\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
"""Kana and Chinese characters."""


@cache
def _pattern() -> re.Pattern[str]:
    """Return the pattern of a word: marks (vowel signs, accents) belong to it, unlike in `\\w`."""
    marks = "".join(c for c in map(chr, range(0x10000)) if unicodedata.category(c)[0] == "M")
    letters = rf"[^\W_{_SINGLE}]"
    part = rf"{letters}+(?:[{marks}\u200c\u200d]+{letters}*)*"
    return re.compile(rf"[{_SINGLE}]|{part}(?:['\u2019]{part})*")


def words_of(text: str) -> list[str]:
    """Return the words of a text, in small letters."""
    return _pattern().findall(text.lower())


def _content(words: Sequence[str]) -> list[str]:
    return [w for w in words if w not in FUNCTION_WORDS and (len(w) > 2 or w >= "\u3040")]


_LIST_LINE = re.compile(r"\s*(?:[-*+•‣◦・]|\d{1,3}[.):、])\s*\S")


# -- features ----------------------------------------------------------------------------------


def _share(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def _repeated(items: Sequence[object]) -> float:
    """Return the share of items that occurred before."""
    return _share(len(items) - len(set(items)), len(items))


def _used(read: Reading) -> float:
    return _share(len(read.asked & set(read.content)), len(read.asked))


def _copied(read: Reading) -> float:
    return _share(sum(word in read.asked for word in read.content), len(read.content))


def _list_lines(read: Reading) -> float:
    lines = [line for line in read.text.splitlines() if line.strip()]
    return _share(sum(_LIST_LINE.match(line) is not None for line in lines), len(lines))


def _digits(read: Reading) -> float:
    marks = "".join(read.text.split())
    return _share(sum(map(str.isdecimal, marks)), len(marks))


def _capitals(read: Reading) -> float:
    upper = sum(map(str.isupper, read.text))
    return _share(upper, upper + sum(map(str.islower, read.text)))


def _marks(characters: str) -> Callable[[Reading], float]:
    """Return the number of these characters for each hundred words."""
    return lambda read: (
        100 * _share(sum(read.text.count(c) for c in characters), max(1, len(read.words)))
    )


_OWN: dict[str, TextFeature] = {
    "length": TextFeature("words", "number of words", lambda r: len(r.words)),
    "repeated_words": TextFeature(
        "repeated words", "share of the words that occurred before", lambda r: _repeated(r.words)
    ),
    "repeated_pairs": TextFeature(
        "repeated word pairs",
        "share of the neighbouring pairs of words that occurred before",
        lambda r: _repeated([*pairwise(r.words)]),
    ),
    "prompt_used": TextFeature(
        "of the prompt's words", "share of the prompt's content words that occur", _used
    ),
    "from_prompt": TextFeature(
        "words from the prompt", "share of the content words that stand in the prompt", _copied
    ),
    "list_lines": TextFeature("list items", "share of the lines with a list mark", _list_lines),
    "digits": TextFeature("digits", "share of the characters", _digits),
    "questions": TextFeature(
        "question marks", "for each hundred words", _marks("?\uff1f\u061f\u037e")
    ),
    "exclamations": TextFeature("exclamation marks", "for each hundred words", _marks("!\uff01")),
    "capitals": TextFeature("capital letters", "share of the letters that have a case", _capitals),
    "word_length": TextFeature(
        "letters in a word",
        "mean length of the words",
        lambda r: _share(sum(map(len, r.words)), len(r.words)),
    ),
    "hedges": TextFeature(
        "hedging",
        "hedges (perhaps, probably, ...) for each hundred words",
        lambda r: 100 * _share(sum(word in HEDGES for word in r.words), len(r.words)),
    ),
    "refusals": TextFeature(
        "refusals",
        "whether it holds a phrase such as “I can't help”",
        lambda r: float(REFUSAL.search(r.text) is not None),
    ),
    "unfinished": TextFeature(
        "cut-off endings", "whether a limit cut it off", lambda r: float(not r.finished)
    ),
}
for _name, _feature in _OWN.items():
    FEATURES.register(_name)(_feature)
