"""The first reward model is kept."""

from shiftrm.methods.method import METHODS, Method

METHODS.register("fixed")(Method("Reward model kept fixed", "Kept fixed", "#333333", "o"))
