"""The stages that measure and judge: each round of each arm, best of n, and the comparison."""

import math
from pathlib import Path
from typing import Any

from shiftrm.core.discrimination import (
    absolute_differences,
    difference_variance,
    pair_accuracy,
    pair_rank_correlation,
)
from shiftrm.data.pairs import read_pairs
from shiftrm.errors import UserError
from shiftrm.files import Row, read_jsonl, write_jsonl
from shiftrm.measure.best_of_n import best_of_n_curve
from shiftrm.measure.diversity import set_diversity, tokenise
from shiftrm.measure.embeddings import load_embedder
from shiftrm.measure.overoptimisation import overoptimisation, path_from_rows, smoothed
from shiftrm.measure.sight import sight_tests
from shiftrm.models.scoring import mean_and_spread, score_rows
from shiftrm.pipeline.engine import StageContext
from shiftrm.pipeline.jobs import place
from shiftrm.pipeline.measures import ResponseNumbers, free, policy_kl
from shiftrm.pipeline.paying import record_pays
from shiftrm.policies.ppo import RewardFunction
from shiftrm.policies.text_rewards import open_watch
from shiftrm.records import Recorder
from shiftrm.trainers.machine import is_out_of_memory
from shiftrm.trainers.training_log import TRAINING_LOG

RESPONSES = "responses.jsonl"

KL_POINTS = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0)
"""Nats at which gold is recorded, where a round's path reaches them."""


def evaluate(context: StageContext) -> None:
    """Measure the policy and the reward model of a round on responses to the test prompts.

    "before" responses are of the policy that the reward model was adapted for, "after" those of
    the policy that was trained with it; both are compared with responses of the SFT policy.
    """
    try:
        _evaluate(context)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        size = context.stage.execution["sampling_batch_size"]
        raise UserError(
            f"out of memory; give execution.sampling_batch_size={max(1, size // 2)} (now {size}): "
            "the same command with it continues this run"
        ) from None


def _evaluate(context: StageContext) -> None:
    settings, recorder = context.stage.settings, context.recorder
    inputs = {name: place(value, context.root) for name, value in settings["inputs"].items()}
    rows = {name: read_jsonl(inputs[name]) for name in ("sft", "before", "after")}
    size = context.stage.execution["sampling_batch_size"]
    scorer = open_watch(inputs["reward"], batch_size=size)
    _record_heldout(recorder, scorer, read_pairs(inputs["heldout"]))
    rewards = {name: score_rows(scorer, rows[name]) for name in rows}
    scale = rewards["sft"]
    if "scale" in inputs:
        scale = score_rows(scorer, read_jsonl(inputs["scale"]))
    for name in ("before", "after"):
        _record_sight(context, scorer, rows[name], f"sight_{{}}_{name}")
    del scorer
    free()
    measured = ResponseNumbers.of(rows["after"], rewards["after"], mean_and_spread(scale))
    measured.record(recorder)
    _record_spread(recorder, rewards, settings["kept_values"])
    golds = gold_of_sft = None
    if settings["gold"] is not None:
        judge = open_watch(settings["gold"], batch_size=size)
        golds = _record_gold(recorder, judge, rows, rewards)
        _record_sight(context, judge, rows["after"], "gold_sight_{}")
        if settings["features"]:
            gold_of_sft = score_rows(judge, rows["sft"])
        del judge
        free()
    if settings["features"]:
        by_gold = None
        if golds is not None and gold_of_sft is not None:
            by_gold = {"sft": gold_of_sft, "after": golds}
        record_pays(recorder, rows, rewards, by_gold, settings["gold"])
    if settings["policy_stage"] is None:
        recorder.add("kl", 0.0)
    else:
        kl, n = policy_kl(inputs["policy"], inputs["reference"], rows["after"], size)
        recorder.add("kl", kl, n=n)
        _record_overoptimisation(context)
    _record_diversity(context, rows["after"])
    write_jsonl(context.out / "scored.jsonl", _scored(rows["after"], rewards["after"], golds))


def _scored(
    rows: list[Row], rewards: list[list[float]], golds: list[list[float]] | None
) -> list[Row]:
    """Return the rows with the rewards of each response."""

    def rounded(found: list[float]) -> list[float]:
        return [round(value, 6) for value in found]

    scored = [{**row, "rewards": rounded(found)} for row, found in zip(rows, rewards, strict=True)]
    if golds is not None:
        scored = [
            {**row, "golds": rounded(found)} for row, found in zip(scored, golds, strict=True)
        ]
    return scored


def _record_spread(recorder: Recorder, rewards: dict[str, list[list[float]]], kept: int) -> None:
    """Record variance and distribution of reward differences (the paper's Figures 1 and 5)."""
    pairs = {name: [row[:2] for row in found] for name, found in rewards.items()}
    reference = difference_variance(pairs["sft"])
    for name, found in pairs.items():
        variance = difference_variance(found)
        recorder.add(f"difference_variance_{name}", variance, n=len(found))
        recorder.add(f"difference_values_{name}", absolute_differences(found)[:kept])
        if name != "sft" and reference > 0:
            relative = variance / reference
            recorder.add(f"relative_difference_variance_{name}", relative, n=len(found))


def _record_sight(
    context: StageContext, reward_fn: RewardFunction, rows: list[Row], name: str
) -> None:
    """Record how often rewards prefer responses to ones that are presumably worse.

    Args:
        rows: responses. The draws are the same for all arms and rounds.
        name: name of the metrics, with `{}` in place of the kind.
    """
    count = context.stage.settings["sight_pairs"]
    if not count:
        return
    kinds = context.stage.settings.get("sight_kinds")
    seed = context.random_seed("sight")
    for test in sight_tests(reward_fn, rows, kinds=kinds, count=count, seed=seed):
        if test.share is not None:
            metric = name.format(test.kind)
            context.recorder.add(metric, test.share.value, n=test.pairs)
            low, high = test.share.low, test.share.high
            if low is not None and high is not None and metric.startswith("sight_"):
                half = (high - low) / 2
                context.recorder.add(f"half_width_{metric}", half, n=test.prompts)


def _record_overoptimisation(context: StageContext) -> None:
    """Record gold against KL along this round's policy training (Gao et al., arXiv 2210.10760)."""
    log = context.folder(context.stage.settings["policy_stage"]) / "model" / TRAINING_LOG
    rows = read_jsonl(log) if log.is_file() and log.stat().st_size else []
    proxy = "standardised_mean" if any("standardised_mean" in row for row in rows) else "reward"
    path = path_from_rows(rows, kl="sequence_kl", proxy=proxy, gold="gold_mean")
    if not path.kl:  # nobody watched, or no KL was logged
        return
    window = max(1, len(path.kl) // 20)  # a peak of single batches would be the luckiest one
    found = overoptimisation(smoothed(path, window), at_kl=KL_POINTS)
    numbers = {
        "peak_gold": found.peak_gold,
        "peak_kl": found.peak_kl,
        "final_gold": found.final_gold,
        "final_kl": found.final_kl,
        "drop": found.drop,
        "proxy_rise": found.proxy_rise,
        "window": float(window),
    }
    numbers |= {
        f"gold_at_kl_{kl:g}": gold for kl, gold in found.gold_at.items() if gold is not None
    }
    for name, value in numbers.items():
        context.recorder.add(f"overopt_{name}", value, n=found.points)


def measure_best_of_n(context: StageContext) -> None:
    """Measure what the first reward model picks out of n samples of the SFT policy."""
    rows = read_jsonl(context.folder("best_of_n/responses") / RESPONSES)
    rewards = []
    for name in (str(context.folder("reward_model") / "model"), context.stage.settings["gold"]):
        size = context.stage.execution["sampling_batch_size"]
        rewards.append(score_rows(open_watch(name, batch_size=size), rows))
        free()
    curve = best_of_n_curve(*rewards)
    for point in curve.points:
        for name, value in (("kl", point.kl), ("proxy", point.proxy), ("gold", point.gold)):
            mean = value if isinstance(value, float) else value.value
            context.recorder.add(f"bon_{name}", mean, step=point.n, n=curve.prompts)
    context.recorder.add("bon_peak_n", float(curve.peak), n=curve.prompts)
    context.recorder.add("bon_drop", curve.drop.value, n=curve.prompts)


def _record_heldout(recorder: Recorder, scorer: RewardFunction, pairs: list[Row]) -> None:
    prompts: list[Any] = [pair.get("prompt") for pair in pairs]
    chosen, rejected = (
        scorer(
            prompts,
            [pair[side] for pair in pairs],
            finished=[pair.get(f"{side}_finished", True) for pair in pairs],
        )
        for side in ("chosen", "rejected")
    )
    differences = [a - b for a, b in zip(chosen, rejected, strict=True)]
    accuracy, n = pair_accuracy(differences, [1.0] * len(differences))
    recorder.add("accuracy_heldout", accuracy, n=n)


def _record_gold(
    recorder: Recorder,
    judge: RewardFunction,
    rows: dict[str, list[Row]],
    rewards: dict[str, list[list[float]]],
) -> list[list[float]]:
    """Record how well our reward model agrees with one that trained nothing, and its mean.

    Returns:
        Its rewards of the rows "after".
    """
    golds: list[list[float]] = []
    for name in ("before", "after"):
        golds = score_rows(judge, rows[name])
        differences = [row[0] - row[1] for row in rewards[name]]
        gold_differences = [row[0] - row[1] for row in golds]
        accuracy, n = pair_accuracy(differences, gold_differences)
        recorder.add(f"accuracy_policy_{name}", accuracy, n=n)
        rank, n = pair_rank_correlation(differences, gold_differences)
        recorder.add(f"rank_policy_{name}", rank, n=n)
    flat = [g for row in golds for g in row]
    mean = sum(flat) / len(flat)
    recorder.add("gold_mean", mean, n=len(flat))
    spread = math.sqrt(sum((g - mean) ** 2 for g in flat) / max(1, len(flat) - 1))
    recorder.add("gold_std", spread, n=len(flat))
    return golds


def _record_diversity(context: StageContext, rows: list[Row]) -> None:
    """Record diversity of the first response to each of the first prompts (Table 3)."""
    settings = context.stage.settings
    texts = [row["responses"][0] for row in rows[: settings["diversity_prompts"]]]
    tokens = tokenise(texts)
    kept = [number for number, words in enumerate(tokens) if words]
    context.recorder.add("empty_responses", float(len(texts) - len(kept)), n=len(texts))
    if len(kept) < 2:
        return
    texts, tokens = [texts[k] for k in kept], [tokens[k] for k in kept]
    vectors = None
    if settings["embedder"] is not None:
        vectors = load_embedder(settings["embedder"])(texts)
        free()
    for name, value in set_diversity(texts, tokens, vectors).items():
        context.recorder.add(name, value, n=len(texts))


# -- judging -------------------------------------------------------------------------------------


def judge_against_sft(context: StageContext) -> None:
    """Judge this round's policy against SFT: win, tie and lose (the paper's Table 1)."""
    ours = _judged_rows(context, context.stage.settings["ours"])
    theirs = _judged_rows(context, "responses")
    _judge(context, context.recorder, ours, theirs, (context.stage.record_as["method"], "sft"))


def compare(context: StageContext) -> None:
    """Judge every arm's best round against the others (the paper's Table 2).

    The best round is the one that wins most against SFT on the first half of the judged prompts;
    rates are measured on the second half, so that choosing does not flatter the choice.
    """
    settings = context.stage.settings
    best: dict[str, tuple[int, list[Row]]] = {"sft": (0, _judged_rows(context, "responses"))}
    for name, rounds in settings["arms"].items():
        wins = [_wins(context.folder(f"{here}/judgement"), name) for here in rounds]
        number = max(range(len(rounds)), key=wins.__getitem__)
        best[name] = (number + 1, _judged_rows(context, f"{rounds[number]}/responses"))
    for name, (number, ours) in best.items():
        recorder = Recorder(stage="compare", method=name, round=number, seed=context.seed)
        for other, (_, theirs) in best.items():
            if other == name or name == "sft":
                continue
            half = len(ours) // 2
            _judge(context, recorder, ours[half:], theirs[half:], (name, other))
        context.recorder.records += recorder.records


def _judged_rows(context: StageContext, stage: str) -> list[Row]:
    """Return the responses that a judge sees, to the same prompts for every arm."""
    return read_jsonl(context.folder(stage) / RESPONSES)[: context.stage.settings["judged"]]


def _judge(
    context: StageContext,
    recorder: Recorder,
    ours: list[Row],
    theirs: list[Row],
    names: tuple[str, str],
) -> None:
    from shiftrm.pipeline.judging import judge_rows

    verdicts, rates = judge_rows(
        ours,
        theirs,
        {**context.stage.settings["judge"], **context.stage.execution},
        cache=context.root / "judge-cache.jsonl",
        seed=context.random_seed("judge"),
    )
    for name, (value, n) in rates.items():
        recorder.add(f"{name}_vs_{names[1]}", value, n=n)
    write_jsonl(context.out / _verdicts_file(*names), verdicts)


def _verdicts_file(method: str, other: str) -> str:
    return f"verdicts-{method}-vs-{other}.jsonl"


def _wins(folder: Path, method: str) -> float:
    """Return the share of wins minus that of losses on the first half of the judged prompts."""
    verdicts = read_jsonl(folder / _verdicts_file(method, "sft"))
    half = verdicts[: len(verdicts) // 2]
    values = {"win": 1.0, "lose": -1.0}
    return sum(values.get(row["outcome"], 0.0) for row in half) / max(1, len(half))
