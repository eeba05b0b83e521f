"""Tables of what went into a run: arms, data, world, configuration and versions."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from shiftrm.errors import UserError
from shiftrm.metrics import metric as declared
from shiftrm.report.results import SFT, Results
from shiftrm.report.tables import Table, fixed_point
from shiftrm.world.world import DEFAULT_WORLD, WORLDS

DATA_SETS = {
    "demonstrations": "demonstrations (fine-tuning)",
    "pairs": "pairs (training the reward model)",
    "prompts": "prompts (groups and policy training)",
    "heldout": "held-out pairs",
    "eval_prompts": "test prompts",
}


def arms_table(m: Results) -> Table:
    """Return the table of arms with their descriptions."""
    rows = []
    for name in m.trained:
        arm = m.arms[name]
        rounds = m.rounds(name) or m.rounds(name, "ppo") or m.rounds(name, "reward_model")
        optimiser = arm.optimiser.upper() if arm.optimiser else "not said"
        rows.append((arm.name, arm.words, optimiser, str(len(rounds))))
    return Table(
        "The arms",
        ("Arm", "Reward model", "Policy trained by", "Rounds"),
        tuple(rows),
        text_columns=3,
    )


def data_table(m: Results) -> Table:
    """Return the table of rows read and left out, with reasons."""
    rows = []
    for name, title in DATA_SETS.items():
        kept = m.final("data", SFT, 0, name)
        if not kept:
            continue
        dropped = dropped_rows(m, name)
        counts = sorted(dropped.items(), key=lambda entry: -max(entry[1].values(), default=0))
        said = ", ".join(f"{reason.replace('_', ' ')} {_count(c)}" for reason, c in counts)
        totals = {seed: sum(c.get(seed, 0.0) for _, c in counts) for seed in kept}
        rows.append((title, said or "—", _count(kept), _count(totals)))
    return Table(
        "Data",
        ("Data set", "Left out because", "Rows kept", "Rows left out"),
        tuple(rows),
        "Every row that was left out is named in data/dropped.jsonl. No test prompt and no prompt "
        "of a held-out pair is in a set that trains.",
        text_columns=2,
    )


def dropped_rows(m: Results, data: str) -> dict[str, dict[int, float]]:
    """Return the rows left out of a data set, by reason and seed."""
    start = f"{data}_dropped_"
    return {
        metric.removeprefix(start): m.final("data", SFT, 0, metric)
        for metric in m.metrics("data")
        if metric.startswith(start)
    }


def _count(by_seed: dict[int, float]) -> str:
    """Format a count as `12,300`, or `12,300 to 12,310` if the seeds differ."""
    low, high = (f"{int(end(by_seed.values(), default=0)):,}" for end in (min, max))
    return low if low == high else f"{low} to {high}"


def world_table(m: Results) -> Table:
    """Return what the stages that made the world, the pairs and the labels recorded."""
    rows = []
    for stage in ("world", "pairs", "labels"):
        for metric, found in m.merged(stage).items():
            one = declared(metric)
            label = f"{one.label}: {metric}" if "*" in one.id else one.label
            rows.append((label, fixed_point(found.mean, one.digits)))
    return Table("The world", ("Quantity", "Value"), tuple(rows), _which_world(m))


def _which_world(m: Results) -> str:
    """Say which gold world the run was in; nothing where it was in none."""
    if not m.section("world"):
        return ""
    name = m.section("world").get("kind", DEFAULT_WORLD)
    try:
        about = WORLDS.get(name).about
    except UserError:  # a world of the user's, which is not on this machine
        about = ""
    return f"The gold world {name!r}. {about}".rstrip()


def config_table(config: Mapping[str, Any]) -> Table:
    """Return a nested configuration as a table of dotted keys, without passwords in URLs."""
    rows: list[tuple[str, str]] = []

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, Mapping) and value:
            for key, inner in value.items():
                walk(f"{prefix}.{key}" if prefix else str(key), inner)
        else:
            text = value if isinstance(value, str) else json.dumps(value, default=str)
            rows.append((prefix, re.sub(r"://[^/@\s]*@", "://…@", text)))

    walk("", config)
    return Table("Configuration", ("Setting", "Value"), tuple(rows), text_columns=2)


def versions_table(m: Results) -> Table:
    """Return the versions of code and libraries."""
    rows = tuple(
        (commit or "unknown", versions or "unknown", ", ".join(str(s) for s in sorted(seeds)))
        for (commit, versions), seeds in sorted(m.provenance.items())
    )
    return Table("Versions", ("Commit", "Versions", "Seeds"), rows, text_columns=3)
