"""PPO on the gold world's own reward: how much there is to gain."""

from shiftrm.methods.method import METHODS, Method

METHODS.register("gold")(
    Method("Gold as the reward (ceiling)", "Gold reward", "#888888", "p", needs=frozenset({"gold"}))
)
