"""Thresholds of a diagnosis, with their reasons.

They are conventions: pages also print the numbers, so that readers can choose other thresholds.
"""

SEES_ACCURACY = 0.60
"""Accuracy from which a model "sees". People agree on about 0.63 of the pairs of HH-RLHF (Bai et
al. 2022), so a higher threshold is not realistic; and 200 labels, with an interval of +-0.07, can
hardly tell less than 0.60 from a coin toss."""
FEW_PROMPTS = 30
"""With fewer prompts, bootstrap intervals are too narrow, so there is no verdict."""
EQUAL_SHARE = 0.5
"""Blind if half of the comparisons differ by no more than rounding (1e-6)."""
COIN_BLIND, COIN_DIM = 0.9, 0.5
"""Blind, or dim, if this share of comparisons has a stated probability of 0.49 to 0.51: the model
itself states a coin toss."""
RATIO_BLIND, RATIO_DIM = 0.15, 0.5
"""Variance of reward differences over the reference's. In the gold world, where the truth is known
(an earlier run of docs/demo.md, means over three seeds), the accuracy on a policy's own pairs was
0.44 to 0.58 at ratios up to 0.13, 0.64 at 0.30 (DPO) and 0.79 for SFT. This is evidence from one
small world."""
WITHIN_DIM = 0.05
"""Dim if less than this share of the variance is within prompts: the reward then hardly depends on
the response."""
LENGTH_ALONE, LENGTH_STRONG = 0.9, 0.5
"""Correlation of reward and length within prompts. At 0.9, length explains 0.81 of the variance
and the verdict says so; from 0.5, there is a warning."""
DUPLICATES, TRUNCATED, SATURATION, EQUAL_REWARDS, CALIBRATION = 0.2, 0.2, 0.5, 0.05, 0.1
"""Shares (and the calibration error) from which there is a warning."""
REWARD_UP = 1.0
"""A rise of the mean reward, in the reference's standard deviations, that suggests reading the
texts if the spread has fallen or responses repeat."""

SIGHT_LOW = 0.7
"""A sight test is low if its whole interval lies below this. In a run of the demo no test of the
true reward was (another prompt: 0.96 to 0.98, repeated: 0.99 to 1, cut: 0.69 to 0.86, shuffled:
0.74 to 0.82). The fixed reward model preferred the response of its own prompt in 0.67 before PPO
and in 0.57 after it, the original to a repeated one in 0.34 to 0.50."""

ENOUGH_LABELS = 200
"""Gives an accuracy to +-0.07: 1.96 * sqrt(0.25 / 200)."""
SPREAD_FACTOR = 1.25
"""A model is louder if the variance of reward differences grew by more than this."""

INFLUENCE_FLOOR = 1e-3
"""A meta step that changes the gradient of L by less than this share of its norm is too small to
matter."""
INFLUENCE_CEILING = 1.0
"""Above this, the meta step, which uses no labels, changes the gradient by more than the norm of
the pairs' gradient. On SmolLM2-135M two steps of fixed length 0.5 had an influence of 7.7: the
variance of reward differences grew 633-fold, and the accuracy fell from 0.56 to 0.44."""
