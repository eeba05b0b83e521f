"""Iterative RLHF: rounds of sample, adapt, optimise, evaluate; every stage resumable.

`engine` runs stages, `config` holds the settings, `plan` says which stages a run has, and
`stages` and `measure` what each of them does.
"""
