"""The lexical gold: a logistic regression on words, free to ask.

    r(y) = sum of w_f over f in F(y), divided by sqrt(|F(y)|)

F(y) are the known unigrams and bigrams that occur among the first words of the response y. Presence
counts, not frequency. The root and the limit on words keep long responses from winning by their
length. w is fitted to preference pairs as Bradley and Terry's model (a logistic regression on the
difference of the two sides) with an L2 penalty. It is a known function to compare with. It is not
human preference, and it does not read the prompt.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, sparse

from shiftrm.core.discrimination import correlation, pair_accuracy
from shiftrm.data.prompt_keys import hashed_uniform
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text
from shiftrm.models.rendering import Text

WORD = re.compile(r"[a-z0-9]+(?:'[a-z]+)?")

WORDS = 64
"""Words of a response that count; the policy's responses are shorter."""

LEAST = 3
"""Responses that an n-gram must occur in to have a weight."""

PENALTIES = (0.0003, 0.001, 0.003, 0.01, 0.03)
"""L2 penalties, of which cross-validation takes the most accurate one."""

FOLDS = 5

Floats = NDArray[np.float64]
Pair = tuple[str, str]
"""The better response and the worse one."""


@dataclass(frozen=True)
class LexicalGold:
    """The reward; called like a `Scorer`.

    Attributes:
        weights: by n-gram; a bigram is two words with a space.
        mean, spread: of the rewards before they were standardised, over all responses that it was
            fitted to. Rewards are in units of this spread.
    """

    weights: Mapping[str, float]
    mean: float = 0.0
    spread: float = 1.0

    def reward(self, text: str) -> float:
        """Return the reward of a response; one without a known n-gram has a logit of 0."""
        found = ngrams(text)
        known = [self.weights[name] for name in found if name in self.weights]
        logit = sum(known) / math.sqrt(len(known)) if known else 0.0
        return (logit - self.mean) / self.spread

    def __call__(
        self,
        prompts: Sequence[Text | None],
        responses: Sequence[Text],
        *,
        finished: Sequence[bool] | None = None,
    ) -> list[float]:
        """Return the rewards of responses; prompts and `finished` are not read."""
        return [self.reward(plain_text(response)) for response in responses]

    def write(self, path: Path) -> None:
        atomic_write_text(path, json.dumps(asdict(self), indent=0, sort_keys=True) + "\n")

    @classmethod
    def read(cls, path: Path) -> "LexicalGold":
        return cls(**json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class GoldReport:
    """What is known about a lexical gold.

    Attributes:
        pairs, ngrams: fitted to, and with a weight.
        penalty: the L2 penalty chosen.
        train_accuracy: on the pairs that it was fitted to.
        cross_validated: accuracy on pairs with prompts not fitted to, by penalty.
        length_correlation: of the reward with the number of words, over all responses;
            0 where all are as long.
    """

    pairs: int
    ngrams: int
    penalty: float
    train_accuracy: float
    cross_validated: Mapping[str, float]
    length_correlation: float


def plain_text(text: Text | Any) -> str:
    """Return a response as one text; of messages, their contents line by line."""
    if isinstance(text, str):
        return text
    return "\n".join(str(message["content"]) for message in text)


def ngrams(text: str) -> list[str]:
    """Return the different unigrams and bigrams of the first `WORDS` words, in order."""
    words = WORD.findall(text.lower().replace("\u2019", "'"))[:WORDS]
    bigrams = [f"{first} {second}" for first, second in pairwise(words)]
    return list(dict.fromkeys([*words, *bigrams]))


def fit(pairs: Sequence[Pair], *, penalty: float, least: int = LEAST) -> LexicalGold:
    """Fit the weights: minimise mean log(1 + exp(-w d)) + penalty/2 ||w||^2, d the difference.

    Raises:
        UserError: no n-gram occurs in `least` responses.
    """
    vocabulary = _vocabulary(pairs, least)
    better, worse = (_features([pair[side] for pair in pairs], vocabulary) for side in (0, 1))
    weights = _weights((better - worse).tocsr(), penalty)
    gold = LexicalGold(dict(zip(vocabulary, weights.tolist(), strict=True)))
    logits = np.array([gold.reward(text) for pair in pairs for text in pair])
    return LexicalGold(gold.weights, float(logits.mean()), float(logits.std()) or 1.0)


def fit_and_report(
    pairs: Sequence[Pair], prompts: Sequence[Hashable], *, penalties: Sequence[float] = PENALTIES
) -> tuple[LexicalGold, GoldReport]:
    """Fit a gold with the penalty that orders unseen prompts best, and say how good it is."""
    found = {p: cross_validated(pairs, prompts, penalty=p) for p in penalties}
    penalty = max(found, key=found.__getitem__)
    gold = fit(pairs, penalty=penalty)
    texts = [text for pair in pairs for text in pair]
    words = [len(text.split()) for text in texts]
    length = correlation([gold.reward(text) for text in texts], words)
    report = GoldReport(
        pairs=len(pairs),
        ngrams=len(gold.weights),
        penalty=penalty,
        train_accuracy=accuracy(gold, pairs),
        cross_validated={f"{p:g}": value for p, value in found.items()},
        length_correlation=length or 0.0,
    )
    return gold, report


def accuracy(gold: LexicalGold, pairs: Sequence[Pair]) -> float:
    """Return the share of pairs whose better side has the higher reward; ties count one half."""
    differences = [gold.reward(better) - gold.reward(worse) for better, worse in pairs]
    value, _ = pair_accuracy(differences, [1.0] * len(differences))
    return 0.5 if value is None else value


def cross_validated(
    pairs: Sequence[Pair], prompts: Sequence[Hashable], *, penalty: float, folds: int = FOLDS
) -> float:
    """Return the accuracy on pairs of prompts that the weights were not fitted to.

    Args:
        prompts: of each pair; pairs with one prompt are in one fold.
    """
    fold = [int(hashed_uniform(0, "fold", str(prompt)) * folds) for prompt in prompts]
    right = 0.0
    for out in range(folds):
        kept = [pair for pair, number in zip(pairs, fold, strict=True) if number != out]
        tested = [pair for pair, number in zip(pairs, fold, strict=True) if number == out]
        if tested:
            right += accuracy(fit(kept, penalty=penalty), tested) * len(tested)
    return right / len(pairs)


def _vocabulary(pairs: Sequence[Pair], least: int) -> list[str]:
    counts = Counter(name for pair in pairs for text in pair for name in ngrams(text))
    known = sorted(name for name, count in counts.items() if count >= least)
    if not known:
        raise UserError(f"no word occurs in {least} responses, so no gold can be fitted to them")
    return known


def _features(texts: Sequence[str], vocabulary: Sequence[str]) -> sparse.csr_array:
    """Presence of each n-gram, each row divided by the root of its number of n-grams."""
    place = {name: i for i, name in enumerate(vocabulary)}
    rows, columns, values = [], [], []
    for row, text in enumerate(texts):
        found = [place[name] for name in ngrams(text) if name in place]
        rows += [row] * len(found)
        columns += found
        values += [1 / math.sqrt(max(1, len(found)))] * len(found)
    return sparse.csr_array((values, (rows, columns)), shape=(len(texts), len(vocabulary)))


def _weights(difference: sparse.csr_array, penalty: float) -> Floats:
    def loss(w: Floats) -> tuple[float, Floats]:
        margins = difference @ w
        value = np.logaddexp(0.0, -margins).mean() + 0.5 * penalty * (w @ w)
        pull = -1.0 / (1.0 + np.exp(margins)) / len(margins)
        return float(value), difference.T @ pull + penalty * w

    start = np.zeros(difference.shape[1])
    found = optimize.minimize(loss, start, jac=True, method="L-BFGS-B", options={"maxiter": 500})
    return np.asarray(found.x)
