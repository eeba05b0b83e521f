"""Similarity of a set of responses: Self-BLEU, embeddings, distinct n-grams, compression.

The MetaRM paper (arXiv 2405.00438) measures diversity as "Self-BLEU averaged over n = 2..5 plus
embedding similarity, both normalised, summed, lower = more diverse", and does not say how it
normalises. Ours: Self-BLEU as a share in [0, 1], the mean cosine with negative values counted as 0,
so also in [0, 1]; their sum, `similarity`, lies in [0, 2]. No value depends on what else is in a
table. All values depend on the number of responses and on their length, so compare sets of one
size only (`diversity_files` cuts to it).
"""

import bisect
import gzip
import math
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from shiftrm.core.discrimination import Floats
from shiftrm.core.intervals import Measured, t_quantile_95

SELF_BLEU_ORDERS = (2, 3, 4, 5)
DISTINCT_ORDERS = (1, 2, 3)

_GROUPS = 20  # of the jackknife
Tokens = Sequence[str]


def tokenise(texts: Sequence[str], tokenizer: str = "13a") -> list[list[str]]:
    """Return the words of sacrebleu's BLEU.

    Args:
        tokenizer: sacrebleu's name of it: "13a" (words and punctuation), "intl" (the same by
            Unicode's classes), "char" or "zh" (for scripts without spaces), "none" (at spaces).

    Raises:
        ValueError: another name.
    """
    from sacrebleu.metrics import BLEU

    if tokenizer not in TOKENIZERS:
        raise ValueError(f"tokenizer is {tokenizer!r}; known: {', '.join(TOKENIZERS)}")
    # BLEU itself does the `rstrip` and the split before and after.
    cut = BLEU(tokenize=tokenizer).tokenizer
    return [cut(text.rstrip()).split() for text in texts]


TOKENIZERS = ("13a", "intl", "char", "zh", "none")


class Ngrams:
    """All n-grams of a set of responses up to a length, counted once for many subsets."""

    def __init__(self, tokens: Sequence[Tokens], longest: int) -> None:
        self.lengths = np.array([len(words) for words in tokens], dtype=np.int64)
        self.longest = longest
        words: dict[str, int] = {}
        flat = [words.setdefault(word, len(words)) for response in tokens for word in response]
        word = np.array(flat, dtype=np.int64)
        owner = np.repeat(np.arange(len(tokens)), self.lengths)
        left = np.cumsum(self.lengths)[owner] - np.arange(len(word))  # words to the response's end
        self._tables = []
        start, gram = np.arange(len(word)), word
        for n in range(1, longest + 1):
            if n > 1:  # an n-gram is one of n - 1 words and the next word
                kept = left[start] >= n
                start, gram = start[kept], gram[kept]
                gram = np.unique(gram * len(words) + word[start + n - 1], return_inverse=True)[1]
            self._tables.append(_table(gram, owner[start], len(tokens)))

    def of(self, n: int, kept: NDArray[np.bool_]) -> tuple[NDArray[np.int64], ...]:
        """Return n-gram, response and count of the responses kept, sorted by n-gram and count."""
        gram, owner, count = self._tables[n - 1]
        there = kept[owner]
        return gram[there], owner[there], count[there]


def _table(
    gram: NDArray[np.int64], owner: NDArray[np.int64], responses: int
) -> tuple[NDArray[np.int64], ...]:
    key, count = np.unique(gram * responses + owner, return_counts=True)
    gram, owner = np.divmod(key, max(1, responses))
    order = np.lexsort((count, gram))
    return gram[order], owner[order], count[order].astype(np.int64)


def self_bleu(
    tokens: Sequence[Tokens] | Ngrams,
    *,
    orders: Sequence[int] = SELF_BLEU_ORDERS,
    kept: NDArray[np.int64] | None = None,
) -> dict[int, Floats]:
    """Compute Self-BLEU of every response: BLEU with all others as references, in [0, 1].

    Zhu et al. 2018 (Texygen, arXiv 1802.01886); the mean over responses is the set's Self-BLEU. The
    numbers are sacrebleu's `BLEU(max_ngram_order=n, effective_order=True).sentence_score` against
    the others: its smoothing, clipping and brevity penalty. Counting is ours, so that a set of N
    responses costs about N and not N^2: the highest count of an n-gram among the others is its
    highest count or, where that is the response's own, the second highest.

    Args:
        tokens: at least two responses of at least one token each.
        orders: the maximal n-gram lengths.
        kept: which responses make up the set; by default all.

    Returns:
        By order, one value for every response kept.

    Raises:
        ValueError: fewer than two responses, or one without tokens.
    """
    from sacrebleu.metrics import BLEU

    ngrams = tokens if isinstance(tokens, Ngrams) else Ngrams(tokens, max(orders))
    which = np.arange(len(ngrams.lengths)) if kept is None else kept
    if len(which) < 2 or not ngrams.lengths[which].all():
        raise ValueError("Self-BLEU needs at least two responses of at least one token each")
    longest = max(orders)
    correct = np.stack([_matches(ngrams, n, which) for n in range(1, longest + 1)], axis=1)
    lengths = ngrams.lengths[which].tolist()
    references = _closest_lengths(lengths)
    found = {n: np.empty(len(which)) for n in orders}
    for i, length in enumerate(lengths):
        totals = [max(0, length - n + 1) for n in range(1, longest + 1)]
        for n in orders:
            found[n][i] = BLEU.compute_bleu(
                correct[i, :n].tolist(), totals[:n], length, references[i],
                smooth_method="exp", effective_order=True, max_ngram_order=n,
            ).score / 100  # fmt: skip
    return found


def _matches(ngrams: Ngrams, n: int, which: NDArray[np.int64]) -> NDArray[np.int64]:
    """Count each response's n-grams in others, clipped to the highest count there."""
    mask = np.zeros(len(ngrams.lengths), dtype=bool)
    mask[which] = True
    gram, owner, count = ngrams.of(n, mask)
    if not len(gram):
        return np.zeros(len(which), dtype=np.int64)
    last = np.append(gram[1:] != gram[:-1], True)  # the highest count of its n-gram
    group = np.cumsum(last) - last
    highest = count[last]
    before = np.concatenate([[0], np.where(last[:-1], 0, count[:-1])])  # the second highest
    others = np.where(last, before, highest[group])
    clipped = np.bincount(owner, np.minimum(count, others), minlength=len(ngrams.lengths))
    return clipped[which].astype(np.int64)


def _closest_lengths(lengths: Sequence[int]) -> list[int]:
    """Return the nearest other length for every length; of two equally near, the shorter."""
    count = Counter(lengths)
    ordered = sorted(count)
    found = []
    for length in lengths:
        if count[length] > 1:
            found.append(length)
            continue
        at = bisect.bisect_left(ordered, length)
        neighbours = ordered[max(0, at - 1) : at] + ordered[at + 1 : at + 2]
        found.append(min(neighbours, key=lambda other: (abs(other - length), other)))
    return found


def distinct_n(
    tokens: Sequence[Tokens] | Ngrams, n: int, *, kept: NDArray[np.int64] | None = None
) -> float:
    """Return distinct n-grams over all n-grams of the set (Li et al. 2016, arXiv 1510.03055).

    In (0, 1], higher = more diverse; NaN where no response has n tokens.
    """
    ngrams = tokens if isinstance(tokens, Ngrams) else Ngrams(tokens, n)
    mask = np.zeros(len(ngrams.lengths), dtype=bool)
    mask[slice(None) if kept is None else kept] = True
    gram, _, count = ngrams.of(n, mask)
    different = 1 + int((gram[1:] != gram[:-1]).sum())  # they are sorted
    return different / int(count.sum()) if len(gram) else float("nan")


def compression_ratio(texts: Sequence[str]) -> float:
    """Return bytes of all texts over bytes after gzip (Shaib et al. 2024, arXiv 2403.00553).

    Higher = more repetition. gzip looks back 32 kB, so repetition further apart goes unseen. Below
    about 1 for a few short texts, since the gzip header counts.
    """
    raw = "\n".join(texts).encode("utf-8", "surrogatepass")
    return len(raw) / len(gzip.compress(raw, 9, mtime=0))


def mean_cosine(vectors: Floats) -> float:
    """Return the mean cosine over all pairs i != j of rows, in [-1, 1].

    Sum over i != j of e_i . e_j = |sum of e|^2 - N for unit vectors e.

    Args:
        vectors: (N, d), N >= 2, none of them zero.

    Raises:
        ValueError: fewer than two, or one that is zero or not finite.
    """
    vectors = np.asarray(vectors, dtype=np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    if len(vectors) < 2 or not np.isfinite(norms).all() or (norms == 0).any():
        raise ValueError("similarity needs at least two vectors, none of them zero or not finite")
    total = (vectors / norms).sum(axis=0)
    return float((total @ total - len(vectors)) / (len(vectors) * (len(vectors) - 1)))


def set_diversity(
    texts: Sequence[str],
    tokens: Sequence[Tokens] | Ngrams,
    vectors: Floats | None = None,
    *,
    kept: NDArray[np.int64] | None = None,
) -> dict[str, float]:
    """Compute all numbers of a set of responses.

    Args:
        texts, tokens, vectors: at least two responses, none empty; n-grams up to length 5.
        kept: which responses make up the set; by default all.

    Returns:
        `self_bleu` (mean over n = 2..5) and `self_bleu_N`, `distinct_N`, `compression_ratio` and,
        with vectors, `embedding_similarity` (the mean cosine, as it is) and `similarity` (the
        paper's sum). `distinct_N` is missing where no response has N tokens.
    """
    which = np.arange(len(texts)) if kept is None else kept
    ngrams = tokens if isinstance(tokens, Ngrams) else Ngrams(tokens, max(SELF_BLEU_ORDERS))
    by_order = {n: float(v.mean()) for n, v in self_bleu(ngrams, kept=which).items()}
    found = {"self_bleu": sum(by_order.values()) / len(by_order)}
    if vectors is not None:
        found["embedding_similarity"] = mean_cosine(vectors[which])
        found["similarity"] = similarity(found["self_bleu"], found["embedding_similarity"])
    found |= {f"self_bleu_{n}": value for n, value in by_order.items()}
    for n in DISTINCT_ORDERS:
        share = distinct_n(ngrams, n, kept=which)
        if not math.isnan(share):
            found[f"distinct_{n}"] = share
    found["compression_ratio"] = compression_ratio([texts[i] for i in which])
    return found


def similarity(self_bleu: float, cosine: float) -> float:
    """Return the paper's sum in our normalisation, in [0, 2]; lower = more diverse."""
    return self_bleu + max(0.0, cosine)


def jackknifed(
    statistic: Callable[[NDArray[np.int64]], dict[str, float]], size: int, *, seed: int
) -> dict[str, Measured]:
    """Compute numbers of a set with 95 % intervals by a jackknife over twentieths.

    A bootstrap would draw copies of a response, which match each other.
    The variance is (G - 1) / G times the sum of squares around the mean over the G groups (Shao and
    Tu 1995, section 2.3), the interval Student's with G - 1 degrees of freedom.

    Args:
        statistic: maps the indices that are kept to numbers by name.
        size: size of the set; below 10, there are no intervals.
        seed: seed of the division into groups.
    """
    whole = statistic(np.arange(size))
    if size < 10:
        return {name: Measured(value) for name, value in whole.items()}
    order = np.random.default_rng(seed).permutation(size)
    groups = np.array_split(order, min(_GROUPS, size))
    left_out = [statistic(np.sort(np.setdiff1d(order, group))) for group in groups]
    found = {}
    for name, value in whole.items():
        values = np.array([part[name] for part in left_out if name in part])
        if len(values) < len(groups):
            found[name] = Measured(value)
            continue
        spread = ((values - values.mean()) ** 2).sum() * (len(groups) - 1) / len(groups)
        half = t_quantile_95(len(groups) - 1) * math.sqrt(spread)
        found[name] = Measured(value, value - half, value + half)
    return found
