"""Verdicts on the responses of two arms, by the judge of a recipe."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftrm.files import Row
from shiftrm.measure.judges.comparing import Judge, judge_pairs, match_rows
from shiftrm.measure.judges.endpoint_judge import EndpointJudge
from shiftrm.measure.judges.kinds import JudgeOptions, open_judge
from shiftrm.measure.judges.win_rates import WinRate, summarise, verdict_rows
from shiftrm.models.endpoint import EndpointConfig

__all__ = ["judge_rows", "numbers_of", "open_recipes_judge"]


def judge_rows(
    ours: Sequence[Row],
    theirs: Sequence[Row],
    settings: Mapping[str, Any],
    *,
    cache: Path,
    seed: int,
) -> tuple[list[Row], dict[str, tuple[float, int]]]:
    """Judge every prompt; no question is sent twice.

    Args:
        ours, theirs: responses to the same prompts.
        settings: `sections.JudgeSettings` as plain data.
        cache: file of an endpoint's answers, shared by all stages of a run.
        seed: seed of the bootstrap.

    Returns:
        The verdicts as rows, and for each name a number and how many prompts it is based on.
    """
    judge = open_recipes_judge(settings, cache=cache if settings["kind"] == "endpoint" else None)
    if isinstance(judge, EndpointJudge):
        prices = {name: settings[name] for name in ("price_in", "price_out")}
        print(judge.estimate(match_rows(ours, theirs), **prices), flush=True)
    verdicts = judge_pairs(judge, ours, theirs)
    found = summarise(verdicts, judge=judge.name, seed=seed)
    unjudged = sum(verdict.outcome is None for verdict in verdicts)
    numbers = {"unjudged": (float(unjudged), len(verdicts))}
    if found is not None:
        numbers |= numbers_of(found)
    return list(verdict_rows(verdicts)), numbers


def open_recipes_judge(settings: Mapping[str, Any], *, cache: Path | None) -> Judge:
    """Open the judge of a recipe's section `judge`.

    Raises:
        UserError: no key, template or model.
    """
    server = ("base_url", "key_variable", "concurrency")
    own = ("model", "template", "parameters", "max_requests", "tie_margin")
    options = JudgeOptions(
        endpoint=EndpointConfig(**{name: settings[name] for name in server}),
        cache=cache,
        **{name: settings[name] for name in own},
    )
    return open_judge(settings["kind"], options)


def numbers_of(found: WinRate) -> dict[str, tuple[float, int]]:
    """Return the numbers of a win rate that are recorded."""
    n = found.counted
    numbers = {"win": found.win, "tie": found.tie, "lose": found.lose, "rate": found.rate}
    if found.controlled is not None:
        numbers["length_controlled"] = found.controlled
    values = {name: (measured.value, n) for name, measured in numbers.items()}
    for name, measured in numbers.items():
        if measured.low is not None and measured.high is not None:
            values |= {f"{name}_low": (measured.low, n), f"{name}_high": (measured.high, n)}
    values["length_ours"] = found.length_ours, n
    values["length_theirs"] = found.length_theirs, n
    if found.position is not None:
        values["judge_consistency"] = found.position.consistency.value, n
        if found.position.first_share is not None:
            values["judge_first_share"] = found.position.first_share.value, n
    return values
