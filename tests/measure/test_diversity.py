"""Diversity against sacrebleu's own sentence scores, plain loops and values worked out by hand."""

import gzip
import itertools
import math
import random
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from shiftrm.measure.diversity import (
    TOKENIZERS,
    compression_ratio,
    distinct_n,
    jackknifed,
    mean_cosine,
    self_bleu,
    set_diversity,
    similarity,
    tokenise,
)

WORDS = ["a", "b", "c", "the", "cat,", "It's", "né", "🙂", "שלום", "3.5"]


def sacrebleu_self_bleu(texts, n):
    bleu = BLEU(max_ngram_order=n, effective_order=True)
    return [
        bleu.sentence_score(text, [*texts[:i], *texts[i + 1 :]]).score / 100
        for i, text in enumerate(texts)
    ]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=9).map(" ".join),
        min_size=2,
        max_size=6,
    )
)
def test_self_bleu_is_sacrebleus_sentence_score(texts):
    found = self_bleu(tokenise(texts), orders=(1, 2, 3, 4, 5))
    for n in (1, 2, 3, 4, 5):
        assert found[n] == pytest.approx(sacrebleu_self_bleu(texts, n), abs=1e-12)


def plain_bleu(hypothesis, references, n):
    """BLEU from its definition, without smoothing: clipped precisions and brevity."""
    precisions = []
    for order in range(1, n + 1):

        def grams(words, order=order):
            return (
                Counter(itertools.pairwise(words))
                if order == 2
                else Counter(tuple(words[i : i + order]) for i in range(len(words) - order + 1))
            )

        ours = grams(hypothesis)
        clipped = sum(min(c, max(grams(r)[g] for r in references)) for g, c in ours.items())
        precisions.append(clipped / ours.total())
    closest = min((abs(len(r) - len(hypothesis)), len(r)) for r in references)[1]
    brevity = 1.0 if len(hypothesis) >= closest else math.exp(1 - closest / len(hypothesis))
    return brevity * math.prod(precisions) ** (1 / n)


def test_self_bleu_against_the_definition():
    """Where every precision is above 0, smoothing plays no part."""
    rng = random.Random(0)
    texts = [[rng.choice("ab") for _ in range(rng.randint(6, 14))] for _ in range(8)]
    found = self_bleu(texts, orders=(2, 3))
    for n in (2, 3):
        expected = [plain_bleu(t, [*texts[:i], *texts[i + 1 :]], n) for i, t in enumerate(texts)]
        assert found[n] == pytest.approx(expected)


def test_self_bleu_by_hand():
    """ "a b c d" and "a b c e": 3/4 of the words, 2/3 of the pairs, 1/2 of the triples match."""
    found = self_bleu(tokenise(["a b c d", "a b c e"]), orders=(2, 3))
    assert found[2] == pytest.approx([math.sqrt(3 / 4 * 2 / 3)] * 2)
    assert found[3] == pytest.approx([(3 / 4 * 2 / 3 * 1 / 2) ** (1 / 3)] * 2)


def test_self_bleu_at_its_ends():
    same = set_diversity(["one two three four five"] * 3, tokenise(["one two three four five"] * 3))
    assert same["self_bleu"] == pytest.approx(1.0)
    apart = set_diversity(["a b c", "d e f"], tokenise(["a b c", "d e f"]))
    assert apart["self_bleu"] == 0.0
    assert apart["distinct_1"] == 1.0


def test_self_bleu_does_not_depend_on_the_order_of_responses():
    texts = tokenise(["a b c d e", "a b c d", "e a b", "c d e a", "a b c d e"])
    found = self_bleu(texts)
    for order in itertools.permutations(range(5)):
        shuffled = self_bleu([texts[i] for i in order])
        assert shuffled[4] == pytest.approx(found[4][list(order)])


@pytest.mark.parametrize("tokens", [[], [["a"]], [["a"], []]])
def test_self_bleu_refuses(tokens):
    with pytest.raises(ValueError, match="at least two responses"):
        self_bleu(tokens)


def test_tokenizers():
    assert tokenise(["It's 3.5, né  🙂 "]) == [["It's", "3.5", ",", "né", "🙂"]]
    assert tokenise(["猫坐"], "char") == [["猫", "坐"]]
    assert tokenise(["a, b"], "none") == [["a,", "b"]]
    assert tokenise([""]) == [[]]
    for name in TOKENIZERS:
        assert len(tokenise(["a b"], name)[0]) >= 2
    with pytest.raises(ValueError, match="known: 13a, intl"):
        tokenise(["a"], "14a")


def test_distinct_by_hand():
    tokens = [["a", "b", "a", "b"], ["a"]]
    assert distinct_n(tokens, 1) == 2 / 5
    assert distinct_n(tokens, 2) == 2 / 3  # ab, ba, ab
    assert distinct_n(tokens, 3) == 1.0
    assert math.isnan(distinct_n(tokens, 5))
    assert "distinct_2" not in set_diversity(["a", "b"], [["a"], ["b"]])


def test_compression():
    texts = ["the cat sits. " * 20] * 10
    raw = "\n".join(texts).encode()
    assert compression_ratio(texts) == len(raw) / len(gzip.compress(raw, 9))
    rng = random.Random(0)
    noise = ["".join(chr(rng.randint(97, 122)) for _ in range(280)) for _ in range(10)]
    assert compression_ratio(texts) > 20 > 3 > compression_ratio(noise)
    assert compression_ratio(["é🙂\ud800"]) > 0  # a lone surrogate, as JSON may hold


def test_mean_cosine_against_a_loop():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(7, 5)) * rng.uniform(0.1, 9, size=(7, 1))
    cosines = [
        float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))
        for a, b in itertools.combinations(vectors, 2)
    ]
    assert mean_cosine(vectors) == pytest.approx(np.mean(cosines))
    assert mean_cosine(np.ones((3, 4))) == pytest.approx(1.0)
    assert mean_cosine(np.array([[1.0, 0], [-2.0, 0]])) == pytest.approx(-1.0)
    with pytest.raises(ValueError, match="none of them zero"):
        mean_cosine(np.array([[1.0, 0], [0.0, 0]]))
    with pytest.raises(ValueError, match="at least two"):
        mean_cosine(np.ones((1, 2)))


def test_the_sum():
    assert similarity(0.25, 0.5) == 0.75
    assert similarity(0.25, -0.5) == 0.25  # opposite is no more diverse than unrelated
    texts = ["a b c d", "a b c e"]
    found = set_diversity(texts, tokenise(texts), np.array([[1.0, 0.0], [1.0, 1.0]]))
    mean = sum(np.mean(sacrebleu_self_bleu(texts, n)) for n in (2, 3, 4, 5)) / 4
    assert found["self_bleu"] == pytest.approx(mean)
    assert found["embedding_similarity"] == pytest.approx(math.sqrt(0.5))
    assert found["similarity"] == pytest.approx(mean + math.sqrt(0.5))


def test_jackknife_of_a_mean_is_the_textbook_interval():
    """Leaving out one at a time, the standard error is s / sqrt(n)."""
    values = np.random.default_rng(0).normal(size=20)
    found = jackknifed(lambda kept: {"mean": float(values[kept].mean())}, 20, seed=0)["mean"]
    half = 2.0930240544 * values.std(ddof=1) / math.sqrt(20)
    assert (found.value, found.low, found.high) == pytest.approx(
        (values.mean(), values.mean() - half, values.mean() + half)
    )


def test_jackknife_covers():
    """The mean cosine over pairs, whose truth is |mean vector|^2, in about 95 % of draws."""
    rng, hits = np.random.default_rng(0), 0
    for seed in range(150):
        vectors = rng.normal(loc=[1.0, 0, 0], size=(60, 3))

        def product(kept, vectors=vectors):
            total, n = vectors[kept].sum(axis=0), len(kept)
            squares = (vectors[kept] ** 2).sum()
            return {"product": float((total @ total - squares) / (n * (n - 1)))}

        found = jackknifed(product, 60, seed=seed)["product"]
        hits += found.low <= 1.0 <= found.high
    assert 0.88 <= hits / 150 <= 0.99


def test_jackknife_of_few():
    found = jackknifed(lambda kept: {"n": float(len(kept))}, 9, seed=0)["n"]
    assert (found.value, found.low) == (9.0, None)
