"""MetaRM: pairs, and a meta step on unlabelled groups of the policy's responses (arXiv 2405.00438).

`metarm_random` is a control: the steps of `metarm_by_effect` in random directions, as long in every
layer. What it gains as well does not come from the direction of grad J.
"""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import with_groups

BY_EFFECT = {"preset": "by_effect"}

for name, label, short, look, settings in (
    ("metarm", "MetaRM", "MetaRM", ("#882255", "v"), {}),
    (
        "metarm_paper",
        "MetaRM, as in the paper",
        "MetaRM paper",
        ("#E69F00", "^"),
        {"preset": "paper"},
    ),
    (
        "metarm_by_effect",
        "MetaRM, step by effect",
        "MetaRM by effect",
        ("#882255", "D"),
        BY_EFFECT,
    ),
    (
        "metarm_exact",
        "MetaRM, step by effect, exact gradient",
        "MetaRM exact",
        ("#44AA99", ">"),
        {**BY_EFFECT, "meta_order": "exact"},
    ),
    (
        "metarm_random",
        "Control: random steps as long as MetaRM's",
        "MetaRM random",
        ("#888888", "x"),
        {**BY_EFFECT, "meta_direction": "random"},
    ),
    (
        "metarm_scale_free",
        "MetaRM, scale-free step",
        "MetaRM scale-free",
        ("#D55E00", "D"),
        {"preset": "scale_free"},
    ),
    (
        "metarm_adaptive",
        "MetaRM, Adam step",
        "MetaRM adaptive",
        ("#117733", "<"),
        {"preset": "adaptive"},
    ),
):
    METHODS.register(name)(
        Method(
            label,
            short,
            *look,
            needs=frozenset({"pairs", "groups"}),
            training=with_groups,
            settings=settings,
        )
    )
