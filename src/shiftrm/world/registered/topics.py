"""Descriptions of a topic, in praise of it: the world of the demo (`language.py`, `gold.py`)."""

from shiftrm.world.gold import WORLD
from shiftrm.world.world import WORLDS

WORLDS.register(WORLD.name)(WORLD)
