"""What a summary says of an accuracy on held-out pairs: the words of a diagnosis."""

import numpy as np
import pytest

from shiftrm.core.intervals import measured, weighted_mean
from shiftrm.trainers.model_card import _accuracy_words
from shiftrm.trainers.pair_metrics import _interval


@pytest.mark.parametrize(
    ("metrics", "words"),
    [
        ((0.475, 0.383, 0.558, 120), "0.442 before, 0.475 after (95 % interval 0.383 to 0.558; a "
         "coin: 0.5): blind, no better than a coin; these pairs show nothing that was learnt"),
        ((0.55, 0.46, 0.64, 120), "0.442 before, 0.550 after (95 % interval 0.460 to 0.640; a "
         "coin: 0.5): unclear, the interval holds both a coin and a model that sees (0.60); these "
         "pairs show nothing that was learnt"),
        ((0.4, 0.31, 0.49, 120), "0.442 before, 0.400 after (95 % interval 0.310 to 0.490; a "
         "coin: 0.5): blind, it prefers the worse response; these pairs show nothing that was "
         "learnt"),
        ((0.58, 0.52, 0.64, 300), "0.442 before, 0.580 after (95 % interval 0.520 to 0.640; a "
         "coin: 0.5): dim, better than a coin, but below 0.60"),
        ((0.7, 0.64, 0.76, 300), "0.442 before, 0.700 after (95 % interval 0.640 to 0.760; a "
         "coin: 0.5): sees"),
        ((0.9, 0.8, 1.0, 10), "0.442 before, 0.900 after (95 % interval 0.800 to 1.000; a coin: "
         "0.5): 10 prompts; fewer than 30 show nothing"),
        ((1.0, None, None, 1), "0.442 before, 1.000 after"),
    ],
)  # fmt: skip
def test_an_accuracy_in_words(metrics, words):
    names = ("accuracy", "accuracy_low", "accuracy_high", "prompts")
    given = {name: value for name, value in zip(names, metrics, strict=True) if value is not None}
    assert _accuracy_words(0.442, given) == words


def test_prompts_are_drawn_whole():
    right = [1.0, 0.0, 1.0, 1.0, 0.0, 0.0] * 10
    prompts = [float(i // 3) for i in range(60)]
    of_prompts = measured(
        lambda w: weighted_mean(np.array(right), w), [int(p) for p in prompts], seed=0
    )
    found = _interval(np.array(right), prompts)
    assert found == {
        "prompts": 20.0,
        "accuracy_low": of_prompts.low,
        "accuracy_high": of_prompts.high,
    }
    alone = _interval(np.array(right), [-1.0] * 60)
    assert alone["prompts"] == 60.0, "nothing is known of prompts: each pair has its own"
