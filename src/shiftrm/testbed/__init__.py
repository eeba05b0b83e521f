"""The gold world: a small language whose true reward is known, so that methods can be measured.

`language` holds the words, the prompts and the tokenizer; `gold` the reward; `world` writes the
files of an ordinary run (a tiny checkpoint and JSONL data) and labels preference pairs. `domains`
and `domain_world` are the same for methods that learn over many domains.
"""
