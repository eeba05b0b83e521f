"""The study with a real model: its lexical gold, the stages of a seed, the measures, the page."""
