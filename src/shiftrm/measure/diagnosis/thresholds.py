"""Where the lines of a diagnosis are drawn, each with its reason.

They are conventions: pages print the numbers beside the words, so that a reader may draw a line
elsewhere.
"""

SEES_ACCURACY = 0.60
"""Accuracy from which a model "sees". People agree with each other on about 0.63 of the pairs of
HH-RLHF (Bai et al. 2022), so more than about that cannot be asked everywhere; and 200 labels, with
an interval of +-0.07, can tell 0.60 from a coin but hardly less."""
FEW_PROMPTS = 30
"""With fewer prompts intervals by resampling are too narrow, so no word is given."""
EQUAL_SHARE = 0.5
"""Blind where half of the comparisons differ by no more than rounding (1e-6)."""
COIN_BLIND, COIN_DIM = 0.9, 0.5
"""Blind, or dim, where this share of comparisons gets a stated probability of 0.49 to 0.51: by its
own account the model tosses coins."""
RATIO_BLIND, RATIO_DIM = 0.15, 0.5
"""Variance of reward differences over the reference's. From the one place where we know the truth,
the gold world (docs/demo.md, means over three seeds): policies with a ratio of at most 0.13 had
their own pairs ordered with accuracy 0.44 to 0.58, nearly all of them no better than a coin; the
one at 0.30 (DPO) with 0.64, SFT with 0.79. One small world: a convention, not a law."""
WITHIN_DIM = 0.05
"""Dim where less than this share of the variance lies within prompts: the reward then hardly
depends on the response."""
LENGTH_ALONE, LENGTH_STRONG = 0.9, 0.5
"""Correlation of reward and length within prompts. At 0.9 length explains 0.81 of the variance, and
the verdict says so; from 0.5 on there is a warning."""
DUPLICATES, TRUNCATED, SATURATION, EQUAL_REWARDS, CALIBRATION = 0.2, 0.2, 0.5, 0.05, 0.1
"""Shares (and the calibration error) from which a warning is given: a fifth of the responses tells
the policy's state more than the model's, half of the pairs give no gradient, and so on."""
REWARD_UP = 1.0
"""A rise of the mean reward, in the reference's standard deviations, that calls for a look at the
texts when the spread has fallen or responses repeat."""

ENOUGH_LABELS = 200
"""An accuracy known to +-0.07: 1.96 * sqrt(0.25 / 200)."""
SPREAD_FACTOR = 1.25
"""Between two models: variance of reward differences grown by more than this counts as louder."""

INFLUENCE_FLOOR = 1e-3
"""A meta step that changes the gradient of L by less than this share of its length is too small to
matter."""
INFLUENCE_CEILING = 1.0
"""From here on the meta step changes the gradient by more than the pairs' own gradient is long."""
