"""Notes of a recipe's page: how numbers are computed, and what terms mean."""

from shiftrm.report.analysis import KL_MEANING

HOW = (
    "Every number on this page is computed from the run's records alone, except the tables marked "
    "as the paper's. The sample responses are read from the run's folder.",
    "All arms start from the same SFT policy and the same first reward model. Every round's reward "
    "model of an arm that trains one starts anew from the SFT policy's weights and a new head.",
    "Win rates: the first response of both sides to the same test prompts. A judge that reads sees "
    "both orders; where they disagree it counts as a tie. Answers that name no winner are counted "
    "and left out, never guessed. Identical responses are ties.",
    "With one seed an interval is over the prompts (a bootstrap that draws whole prompts); it says "
    "nothing about how much another seed would change. With several seeds intervals are 95 % "
    "t-intervals over the seeds.",
    "Wins are called clear where a sign test over the judged prompts says so at 5 % and, with "
    "several seeds, the 95 % t-interval of wins less losses over the seeds leaves out zero, too. "
    "Several arms are compared and nothing corrects for that.",
    "Reward differences: of two responses to one prompt. Variances are shown relative to the same "
    "reward model's on SFT responses, so that a factor on all rewards changes nothing.",
    "Normalised differences are divided by the largest one of the same reward model on SFT and "
    "policy responses together.",
    "Held-out accuracy is on labelled pairs of the original data, not of the policy: it cannot "
    "show whether a reward model still sees on today's policy. Accuracy on the policy's pairs, "
    "which is agreement with gold, can, as far as the second reward model is right.",
    "KL is measured along sampled responses, exactly over the vocabulary at each token, in nats a "
    "response. With a temperature or top-p other than 1 it is the KL along such responses.",
    "The influence of the meta step is the mean over the training steps of a round.",
    "Diversity is of the first response to each of the first test prompts.",
)

GLOSSARY = (
    ("Arm", "One way through the rounds: how its reward model and its policy are trained."),
    ("SFT", "The supervised policy that every arm starts from."),
    ("Round", "Sample from the policy, train the reward model, train the policy on it, measure."),
    ("Vanilla", "The first reward model, trained on the pairs alone, and kept."),
    ("Retrained", "A new reward model every round, on the same pairs, without the meta step."),
    (
        "MetaRM",
        "A new reward model every round, trained on the pairs after a look ahead that spreads the "
        "rewards of the current policy's responses (arXiv 2405.00438).",
    ),
    ("DPO", "The policy is trained on the pairs directly, without a reward model."),
    ("Proxy", "What the arm's own reward model gives, standardised on SFT responses."),
    ("Gold", "What a second reward model gives that trained nothing; not the truth."),
    ("KL", KL_MEANING),
    (
        "Relative variance",
        "Variance of reward differences on the policy's responses over that on SFT responses. 1: "
        "as far apart as on SFT; far below 1: the reward model hardly tells them apart.",
    ),
    (
        "Influence of the meta step",
        "‖∇L(θ') - ∇L(θ)‖ / ‖∇L(θ)‖: how much looking ahead changes the training gradient. Below "
        "0.001 it is too small to matter.",
    ),
    (
        "Self-BLEU",
        "How much a response repeats the others of its set, 0 to 1; lower = more diverse.",
    ),
    ("Seed", "One complete run. Differences smaller than those between seeds mean nothing."),
)
