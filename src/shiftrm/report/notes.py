"""How the numbers of a page are computed, and what its terms mean."""

from __future__ import annotations

from shiftrm.report.analysis import KL_MEANING
from shiftrm.report.results import Results

_TRUE_GOLD = (
    "Gold is the known reward of the test world. The original preference labels are noisy draws "
    "from it; beyond them only arms with fresh labels get more such draws. Otherwise gold is used "
    "to evaluate and to judge."
)
_SECOND_GOLD = (
    "Gold is a second reward model, which trained nothing; it is not the truth. Accuracy on the "
    "policy's pairs is agreement with it, and shows whether a reward model sees as far as the "
    "second one is right."
)


def how(m: Results) -> list[str]:
    """Return the notes on how the numbers are made."""
    gold = [_TRUE_GOLD if m.gold_is_true else _SECOND_GOLD] if m.has("gold_mean") else []
    demo = [_DEMO] if m.section("world") else []
    return [*_HOW[:1], *gold, *demo, *_HOW[1:]]


_DEMO = (
    "In the demo every arm takes the same number of optimizer and PPO steps from the same seeds, "
    "and no arm was tuned on the results of this world. The length of the scale-free step, 0.5, "
    "was fixed beforehand, from earlier experiments of its kind; no other arm has such a number."
)

_HOW = (
    "Every number on this page is computed from the run's records alone, except the tables marked "
    "as the paper's. The sample responses are read from the run's folder.",
    "All arms start from the same SFT policy and the same first reward model. Every round's reward "
    "model of an arm that trains one starts anew from the SFT policy's weights and a new head.",
    "A MetaRM optimizer step costs more computation than a plain one: a forward and backward pass "
    "over the groups.",
    "Accuracy on the policy's pairs: two fresh responses of today's policy to one prompt; right if "
    "the reward model orders them as gold does. “Before” is the adapted reward model on the policy "
    "it was adapted for, “after” the same model on the policy that was optimised against it.",
    "Held-out accuracy is on labelled pairs of the original data, not of the policy: it cannot "
    "show whether a reward model still sees on today's policy.",
    "Win rates: the first response of both sides to the same test prompts. A judge that reads sees "
    "both orders; where they disagree it counts as a tie. Answers that name no winner are counted "
    "and left out, never guessed. Identical responses are ties.",
    "Differences between arms are taken seed by seed. With several seeds, intervals are 95 % "
    "t-intervals over the seeds. With one seed an interval is over the prompts (a bootstrap that "
    "draws whole prompts), or the sampling error of the responses; it says nothing about how much "
    "another seed would change.",
    "Wins are called clear where a sign test over the judged prompts says so at 5 % and, with "
    "several seeds, the 95 % t-interval of wins less losses over the seeds also excludes zero. "
    "Several arms are compared and nothing corrects for that.",
    "Reward differences: of two responses to one prompt. Variances are shown relative to the same "
    "reward model's on SFT responses, so that a factor on all rewards changes nothing. Normalised "
    "differences are divided by the largest one of the same reward model on SFT and policy "
    "responses together.",
    "Curves of training are of the parameters as they are trained; the diamonds are of what was "
    "deployed. The influence of the meta step is the mean over the training steps of a round.",
    "A response that the length limit cut off is never closed with an end token, neither in "
    "training nor in scoring, and costs every arm the same in PPO.",
    "KL is measured along sampled responses, exactly over the vocabulary at each token, in nats a "
    "response. With a temperature or top-p other than 1 it is the KL along such responses. KL "
    "counts as matched where two arms lie within 25 % of each other.",
    "Diversity is of the first response to each of the first test prompts.",
)


def glossary(m: Results) -> list[tuple[str, str]]:
    """Return the terms of the page and their meanings."""
    gold = "What a second reward model gives that trained nothing; not the truth."
    if m.gold_is_true:
        gold = "The true reward of the test world, known and fixed. Labels are drawn from it."
    return [("Gold", gold), *_GLOSSARY]


_GLOSSARY = (
    ("Proxy", "What the arm's own reward model gives, standardised on SFT responses."),
    ("Arm", "One way through the rounds: how its reward model and its policy are trained."),
    ("SFT", "The supervised policy that every arm starts from."),
    ("Round", "Sample from the policy, train the reward model, train the policy on it, evaluate."),
    ("Vanilla", "The first reward model, trained once on the original pairs, and kept."),
    ("Retrained", "A new reward model every round, on the same pairs, without the meta step."),
    (
        "MetaRM",
        "A new reward model every round, trained on the pairs after a look ahead that spreads the "
        "rewards of the current policy's responses (arXiv 2405.00438).",
    ),
    ("DPO", "The policy is trained on the pairs directly, without a reward model."),
    ("KL", KL_MEANING),
    ("Matched KL", "Arms compared at the same KL, since moving further alone changes gold."),
    ("Held-out pairs", "Preference pairs like those of the training set, not trained on."),
    ("Policy's pairs", "Pairs of fresh responses of today's policy, ranked by gold."),
    (
        "Relative variance",
        "Variance of reward differences on the policy's responses over that on SFT responses. 1: "
        "as far apart as on SFT; far below 1: the reward model hardly tells them apart. "
        "Multiplying all rewards by a factor leaves it unchanged.",
    ),
    (
        "Influence of the meta step",
        "‖∇L(θ') - ∇L(θ)‖ / ‖∇L(θ)‖: how much looking ahead changes the training gradient. Below "
        "0.001 it is too small to matter.",
    ),
    ("Louder, not sharper", "Rewards lie further apart but rank the same responses no better."),
    (
        "Self-BLEU",
        "How much a response repeats the others of its set, 0 to 1; lower = more diverse.",
    ),
    ("Seed", "One complete run. Differences smaller than those between seeds mean nothing."),
)
