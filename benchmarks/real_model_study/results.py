"""Rows of results: what each finished arm of each seed measures.

A row is `{"seed", "arm", "measure", "value", "low", "high", "n"}`; low and high are the ends of
the 95 % interval, n is the number of prompts (of a sight test: of pairs).
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shiftrm.core.intervals import Measured
from shiftrm.files import Row, read_jsonl, write_jsonl
from shiftrm.models.scoring import score_rows
from shiftrm.trainers.training_log import TRAINING_LOG

from . import measures
from .gold import LexicalGold
from .plan import method_of
from .stages import GOLD, MOVING, SCORES, SIGHT

BEST_OF = 16
CEILING, SHORTEST = "gold", "shortest"
"""Two rewards that need no training: the lexical gold itself, and minus the number of words."""

AGAINST = ("fixed", "retrained")
"""Arms that the others are compared with, response by response."""

__all__ = ["AGAINST", "BEST_OF", "CEILING", "SHORTEST", "add_rows", "seed_rows"]


def seed_rows(root: Path, seed: int, arms: Sequence[str]) -> list[Row]:
    """Return the rows of a seed's folder, of all arms that are finished there.

    Args:
        arms: these come first, in this order.

    Returns:
        Nothing while the moved policy's responses are not there.
    """
    eval_file = root / "eval_samples" / "eval_samples.jsonl"
    if not eval_file.is_file():
        return []
    gold = LexicalGold.read(root / "data" / GOLD)
    groups = read_jsonl(eval_file)
    base = read_jsonl(root / "base_samples" / "base_samples.jsonl")
    golds = {"eval": score_rows(gold, groups), "base": score_rows(gold, base)}
    rewards: dict[str, dict[str, list[list[float]]]] = {
        CEILING: golds,
        SHORTEST: {"eval": _shortness(groups), "base": _shortness(base)},
    }
    there = sorted(path.name for path in (root / "arms").glob("*"))
    for name in dict.fromkeys([*arms, *there]):
        path = root / "arms" / name / "scores" / SCORES
        if path.is_file():
            rows = read_jsonl(path)
            rewards[name] = {
                "eval": [row["eval_samples"] for row in rows],
                "base": [row["base_samples"] for row in rows],
            }
    found = _gold_report(root, seed) + _moving(root, seed)
    n = min(BEST_OF, len(groups[0]["responses"]))
    best = {name: measures.best_gold(r["eval"], golds["eval"], n) for name, r in rewards.items()}
    for name, given in rewards.items():
        found += _arm_rows(name, given, golds, best, seed)
        found += _sight_rows(root, name, seed)
        if name not in (CEILING, SHORTEST) and "labels" in method_of(name).needs:
            labels = len(_labelled(root, "fresh")) - len(_labelled(root, "pairs"))
            found.append(_row(seed, name, "labels", Measured(float(labels)), labels))
    return found + _ppo_rows(root, [*rewards], seed, gold)


def add_rows(path: Path, rows: Sequence[Row]) -> list[Row]:
    """Write the rows into the file in place of older ones of their seeds; return all."""
    seeds = {row["seed"] for row in rows}
    old = read_jsonl(path) if path.is_file() and path.stat().st_size else []
    everything = [row for row in old if row["seed"] not in seeds] + list(rows)
    everything.sort(key=lambda row: row["seed"])
    write_jsonl(path, everything)
    return everything


def _arm_rows(
    name: str,
    given: Mapping[str, list[list[float]]],
    golds: Mapping[str, list[list[float]]],
    best: Mapping[str, Any],
    seed: int,
) -> list[Row]:
    """Return accuracy, rank correlation and gold at equal KL of one reward."""
    n = len(golds["eval"])
    values = {
        "accuracy": measures.accuracy(given["eval"], golds["eval"]),
        "accuracy_base": measures.accuracy(given["base"], golds["base"]),
        "rank": measures.rank(given["eval"], golds["eval"]),
        "best_gold": measures.mean(best[name]),
    }
    for other in AGAINST:
        if other in best and other != name:
            values[f"best_gold_minus_{other}"] = measures.difference(best[name], best[other])
    return [_row(seed, name, measure, value, n) for measure, value in values.items() if value]


def _gold_report(root: Path, seed: int) -> list[Row]:
    [report] = read_jsonl(root / "data" / "gold-report.jsonl")
    cross = report["cross_validated"]
    numbers = {
        "train_accuracy": report["train_accuracy"],
        "cross_validated_accuracy": cross[f"{report['penalty']:g}"],
        "length_correlation": report["length_correlation"],
        "ngrams": report["ngrams"],
        "penalty": report["penalty"],
    }
    return [
        _row(seed, "lexical_gold", name, Measured(float(value)), report["pairs"])
        for name, value in numbers.items()
    ]


def _moving(root: Path, seed: int) -> list[Row]:
    """Return what moving the policy did; the KL and the differences to the first policy."""
    path = root / "moving" / MOVING
    if not path.is_file():
        return []
    base, moved = read_jsonl(path)
    rows = []
    for name in ("gold", "proxy", "finished", "words"):
        ours, theirs = np.array(moved[name]), np.array(base[name])
        rows.append(_row(seed, "base", name, measures.mean(theirs), len(theirs)))
        rows.append(_row(seed, "moved", name, measures.mean(ours), len(ours)))
        change = measures.difference(ours, theirs)
        rows.append(_row(seed, "moved", f"{name}_minus_base", change, len(ours)))
    chosen = moved["demonstrations_gold"]
    rows.append(_row(seed, "demonstrations", "gold", measures.mean(chosen), len(chosen)))
    rows.append(_row(seed, "moved", "kl", Measured(moved["kl"]), len(moved["gold"])))
    return rows


def _sight_rows(root: Path, name: str, seed: int) -> list[Row]:
    path = root / "arms" / name / "sight" / SIGHT
    found = []
    for test in read_jsonl(path) if path.is_file() else ():
        if test["share"] is not None:
            share = Measured(**test["share"])
            found.append(_row(seed, name, f"sight_{test['kind']}", share, test["pairs"]))
    return found


def _ppo_rows(root: Path, names: Sequence[str], seed: int, gold: LexicalGold) -> list[Row]:
    """Return what PPO against each arm's reward gave: gold by test prompt, and the KL it ended at.

    The KL is of the policy's last roll-outs to the policy that it started from.
    """
    golds: dict[str, Any] = {}
    for name in names:
        path = root / "arms" / name / "ppo_samples" / "ppo_samples.jsonl"
        if path.is_file():
            golds[name] = np.array([np.mean(row) for row in score_rows(gold, read_jsonl(path))])
    found = []
    for name, ours in golds.items():
        values = {"ppo_gold": measures.mean(ours)}
        for other in AGAINST:
            if other in golds and other != name:
                values[f"ppo_gold_minus_{other}"] = measures.difference(ours, golds[other])
        last = read_jsonl(root / "arms" / name / "ppo" / "model" / TRAINING_LOG)[-1]
        values["ppo_kl"] = Measured(last["final_sequence_kl"])
        found += [_row(seed, name, measure, value, len(ours)) for measure, value in values.items()]
    return found


def _labelled(root: Path, stage: str) -> list[Row]:
    return read_jsonl(root / stage / "pairs.jsonl")


def _shortness(groups: Sequence[Row]) -> list[list[float]]:
    return [[-float(len(text.split())) for text in row["responses"]] for row in groups]


def _row(seed: int, arm: str, measure: str, value: Measured, n: int) -> Row:
    low, high = (None if end is None else round(end, 6) for end in (value.low, value.high))
    row = {"seed": seed, "arm": arm, "measure": measure, "value": round(value.value, 6)}
    return json.loads(json.dumps({**row, "low": low, "high": high, "n": n}))
