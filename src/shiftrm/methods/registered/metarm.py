"""MetaRM: pairs, and a meta step on groups of the policy's responses (arXiv 2405.00438)."""

from shiftrm.methods.method import METHODS, Method
from shiftrm.trainers.kinds import with_groups

for name, preset, label, short, look in (
    ("metarm", None, "MetaRM", "MetaRM", ("#882255", "v")),
    ("metarm_paper", "paper", "MetaRM, as in the paper", "MetaRM paper", ("#E69F00", "^")),
    (
        "metarm_scale_free",
        "scale_free",
        "MetaRM, scale-free step",
        "MetaRM scale-free",
        ("#D55E00", "D"),
    ),
    ("metarm_adaptive", "adaptive", "MetaRM, Adam step", "MetaRM adaptive", ("#117733", "<")),
):
    METHODS.register(name)(
        Method(
            label,
            short,
            *look,
            needs=frozenset({"pairs", "groups"}),
            training=with_groups,
            settings={} if preset is None else {"preset": preset},
        )
    )
