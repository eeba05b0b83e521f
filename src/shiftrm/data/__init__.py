"""Reads data from files and the hub as rows: pairs, groups, prompts, demonstrations, domains.

Import a reader (`pairs`, `groups`, `prompts`, `demonstrations`, `domains`), or `named` for the
public data sets.
"""
