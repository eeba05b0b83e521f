"""The gold world: a small language with domains whose true reward is known.

Its files are ordinary data; `gold` is its reward function.
"""
