"""Ways to make a text worse: a part said again, the end cut off, the order of words shuffled.

A text is read as sentences, or as words between white space; the white space stays where it is. A
script without spaces between words (Chinese, Thai) therefore has sentences only.
"""

import random
import re
from dataclasses import dataclass

CLOSED = "”’»)]」』）】》〉］"  # noqa: RUF001
CLOSING = "\"'" + CLOSED
"""Marks that may follow a full stop and belong to its sentence."""

# Behind a stop without a space, a straight quotation mark may as well open the next sentence.
_SPACED, _WIDE = rf"[.!?…]+[{re.escape(CLOSING)}]*(?=\s)", rf"[。！？]+[{re.escape(CLOSED)}]*"  # noqa: RUF001
SENTENCE_END = re.compile(rf"(?:{_SPACED}|{_WIDE}|\n)\s*")
STOPS = tuple(".!?…。！？:;")  # noqa: RUF001

SPAN = (2, 5)
"""Fewest and most words of a span that is said again."""

LEAST_TO_CUT = 6
LEAST_TO_SHUFFLE = 5
"""In words, and for shuffling in different words. Shorter texts may be as good in another order."""

TRIES = 8
"""Shuffles tried until half of the words have moved."""


@dataclass
class Parts:
    """A text in parts (words or sentences): `lead + parts[0] + gaps[0] + parts[1] + ...`.

    Attributes:
        lead: white space before the first part.
        parts: each without white space around it.
        gaps: white space behind each part; may be empty.
    """

    lead: str
    parts: list[str]
    gaps: list[str]

    def text(self) -> str:
        pieces = (part + gap for part, gap in zip(self.parts, self.gaps, strict=True))
        return self.lead + "".join(pieces)


def words_of(text: str) -> Parts:
    """Return the words of a text, divided by white space."""
    return _parts(re.findall(r"\S+\s*", text), text)


def sentences_of(text: str) -> Parts:
    """Return the sentences of a text; a line's end ends one, a part without letters does not."""
    pieces, begun, waiting = [], 0, ""
    for end in [*(found.end() for found in SENTENCE_END.finditer(text)), len(text)]:
        waiting += text[begun:end]
        begun = end
        if any(c.isalpha() for c in waiting):
            pieces.append(waiting.lstrip())
            waiting = ""
    if waiting and pieces:
        pieces[-1] += waiting
    return _parts(pieces, text)


def _parts(pieces: list[str], text: str) -> Parts:
    parts = [piece.rstrip() for piece in pieces]
    gaps = [piece[len(part) :] for piece, part in zip(pieces, parts, strict=True)]
    return Parts(text[: len(text) - len(text.lstrip())], parts, gaps)


def repeated(text: str, rng: random.Random) -> str | None:
    """Return the text with a sentence said again; with one sentence, a span of 2 to 5 words.

    One time in two, where there is room, what is said again replaces another part of as many
    sentences or words, so that length does not give it away; else it is added at a later place.
    Returns None for fewer than three words.
    """
    found, size = sentences_of(text), 1
    if len(found.parts) < 2:
        found = words_of(text)
        if len(found.parts) <= SPAN[0]:
            return None
        size = rng.randint(SPAN[0], min(SPAN[1], len(found.parts)))
    count = len(found.parts)
    start = rng.randrange(count - size + 1)
    span = found.parts[start : start + size]
    others = [at for at in range(count - size + 1) if abs(at - start) >= size]
    if others and rng.random() < 0.5:
        at = rng.choice(others)
        found.parts[at : at + size] = span
        return found.text()
    at = rng.randint(start + size, count)
    gaps = [*found.gaps[start : start + size - 1], found.gaps[0]]
    found.parts[at:at] = span
    if at == count:  # behind the last part, whose gap stays last
        gaps = [gaps[-1], *gaps[:-1]]
        at -= 1
    found.gaps[at:at] = gaps
    return found.text()


def cut(text: str, rng: random.Random) -> str | None:
    """Return the text up to a word in its second or third quarter that ends no sentence.

    The result is always shorter. Returns None for fewer than six words, or if every such word ends
    a sentence.
    """
    found = words_of(text)
    count = len(found.parts)
    if count < LEAST_TO_CUT:
        return None
    middle = range(-(-count // 4), 3 * count // 4 + 1)  # words that are kept
    places = [kept for kept in middle if not _ends(found, kept - 1)]
    if not places:
        return None
    kept = rng.choice(places)
    return Parts(found.lead, found.parts[:kept], [*found.gaps[: kept - 1], ""]).text()


def _ends(found: Parts, at: int) -> bool:
    """Whether a sentence or line may end behind this word."""
    return found.parts[at].rstrip(CLOSING).endswith(STOPS) or "\n" in found.gaps[at]


def shuffled(text: str, rng: random.Random) -> str | None:
    """Return the text with its words in another order, of the same length.

    Several sentences change places, and the words inside each. At least half of the words move.
    Returns None for fewer than five different words.
    """
    whole = words_of(text)
    if len(set(whole.parts)) < LEAST_TO_SHUFFLE:
        return None
    for _ in range(TRIES):
        sentences = [words_of(sentence).parts for sentence in sentences_of(text).parts]
        if sum(map(len, sentences)) != len(whole.parts):  # a sentence may end inside a "word"
            sentences = [list(whole.parts)]
        rng.shuffle(sentences)
        for words in sentences:
            rng.shuffle(words)
        order = [word for words in sentences for word in words]
        if sum(a != b for a, b in zip(order, whole.parts, strict=True)) >= len(order) / 2:
            return Parts(whole.lead, order, whole.gaps).text()
    return None
