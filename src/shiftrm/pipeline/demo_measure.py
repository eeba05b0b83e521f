"""The measuring stages of a gold-world run: SFT, every round of every arm, and their comparison."""

from typing import Any

from shiftrm.core.discrimination import (
    absolute_differences,
    difference_variance,
    pair_accuracy,
)
from shiftrm.data.pairs import read_pairs
from shiftrm.files import Row, read_jsonl, write_jsonl
from shiftrm.measure.judges.win_rates import win_tie_lose
from shiftrm.models.sampling import SamplingConfig, as_samples, load_policy
from shiftrm.models.scoring import Scorer, score_rows
from shiftrm.pipeline.demo_stages import (
    load_scorer,
    reward_spread,
    sample_pairs,
)
from shiftrm.pipeline.engine import StageContext
from shiftrm.policies.ppo import exact_token_kl
from shiftrm.records import Recorder
from shiftrm.world.build import PROMPTS_EVAL
from shiftrm.world.gold import GoldReward

RESPONSES = "responses.jsonl"


def evaluate_start(context: StageContext) -> None:
    """Round 0: the SFT policy under the vanilla reward model."""
    settings, recorder = context.stage.settings, context.recorder
    policy, tokenizer = load_policy(context.folder("sft"))
    rows = _fresh_pairs(context, policy, tokenizer)
    scorer = Scorer.from_pretrained(context.folder("reward_model"))
    rewards = score_rows(scorer, rows)
    _record_policy(recorder, rows, rewards, _standardise(context, scorer))
    recorder.add("kl", 0.0)
    _record_heldout(context, scorer)
    _record_sight(recorder, "after", rows, rewards, reference=difference_variance(rewards))
    recorder.add("difference_variance_sft", difference_variance(rewards), n=len(rows))
    recorder.add("difference_values_sft", _values(rewards, settings))
    _write_responses(context, rows, rewards)


def evaluate_round(context: StageContext) -> None:
    """The policy after this round's PPO and the reward model it was optimised against.

    "before" pairs are of the policy the reward model was adapted for, "after" pairs of the policy
    that PPO made of it. Both are compared with the reward model's spread on SFT pairs.
    """
    settings, recorder = context.stage.settings, context.recorder
    policy, tokenizer = load_policy(context.folder(settings["policy"]))
    reference, _ = load_policy(context.folder("sft"))
    scorer = load_scorer(context, settings["reward"])
    after = _fresh_pairs(context, policy, tokenizer)
    before = read_jsonl(context.folder(settings["before"]) / RESPONSES)
    sft = read_jsonl(context.folder("evaluation") / RESPONSES)
    rewards = {
        name: score_rows(scorer, rows)
        for name, rows in (("sft", sft), ("before", before), ("after", after))
    }
    reference_variance = difference_variance(rewards["sft"])

    _record_policy(recorder, after, rewards["after"], _standardise(context, scorer))
    kl = exact_token_kl(policy, reference, as_samples(tokenizer, after))
    recorder.add("kl", float(kl.mean()), n=len(kl))
    _record_heldout(context, scorer)
    recorder.add("difference_variance_sft", reference_variance, n=len(sft))
    recorder.add("difference_values_sft", _values(rewards["sft"], settings))
    for name, rows in (("before", before), ("after", after)):
        _record_sight(recorder, name, rows, rewards[name], reference=reference_variance)
        recorder.add(f"difference_values_{name}", _values(rewards[name], settings))
    shares = win_tie_lose(
        [row["gold"][0] for row in after],
        [row["gold"][0] for row in sft],
        tie_margin=settings["tie_margin"],
    )
    for name, share in zip(("win", "tie", "lose"), shares, strict=True):
        recorder.add(f"{name}_vs_sft", share, n=len(after))
    _write_responses(context, after, rewards["after"])


def compare(context: StageContext) -> None:
    """Win, tie and lose rates of every arm's best round against the others (the paper's Table 2).

    The best round is the one of highest mean gold on the first half of the evaluation prompts; the
    rates are measured on the second half, so that choosing does not flatter the choice. Gold
    chooses which row to print; it trains and tunes nothing.
    """
    settings = context.stage.settings
    sft = _golds(context, "evaluation")
    half = len(sft) // 2
    best: dict[str, tuple[int, list[float]]] = {"sft": (0, sft)}
    for method, names in settings["evaluations"].items():
        golds = [_golds(context, name) for name in names]
        number = max(range(len(golds)), key=lambda k: sum(golds[k][:half]))
        best[method] = (number + 1, golds[number])
    base = context.stage.record_as["stage"]
    for method, (number, ours) in best.items():
        recorder = Recorder(stage=base, method=method, round=number, seed=context.seed)
        for other, (_, theirs) in best.items():
            if other in (method,) or method == "sft":
                continue
            shares = win_tie_lose(ours[half:], theirs[half:], tie_margin=settings["tie_margin"])
            for name, share in zip(("win", "tie", "lose"), shares, strict=True):
                recorder.add(f"{name}_vs_{other}", share, n=len(ours) - half)
        context.recorder.records += recorder.records


def _fresh_pairs(context: StageContext, policy: Any, tokenizer: Any) -> list[Row]:
    """Two responses a prompt with their gold rewards; prompts and seed are the same for all."""
    settings = context.stage.settings
    prompts = [
        row["prompt"] for row in read_jsonl(context.folder("world") / "files" / PROMPTS_EVAL)
    ][: settings["prompts"]]
    rows = sample_pairs(
        policy,
        tokenizer,
        prompts,
        SamplingConfig(**settings["sampling"]),
        context.random_seed("evaluation"),
    )
    for row, golds in zip(rows, score_rows(GoldReward(), rows), strict=True):
        row["gold"] = golds
    return rows


def _record_policy(
    recorder: Recorder, rows: list[Row], rewards: list[list[float]], standard: tuple[float, float]
) -> None:
    golds = [g for row in rows for g in row["gold"]]
    proxies = [r for pair in rewards for r in pair]
    responses = [r for row in rows for r in row["responses"]]
    finished = [f for row in rows for f in row["finished"]]
    n = len(golds)
    gold = sum(golds) / n
    proxy = sum(proxies) / n
    recorder.add("gold_mean", gold, n=n)
    recorder.add("gold_std", (sum((g - gold) ** 2 for g in golds) / (n - 1)) ** 0.5, n=n)
    recorder.add("proxy_mean", proxy, n=n)
    recorder.add("proxy_mean_standardised", (proxy - standard[0]) / standard[1], n=n)
    recorder.add("length_mean", sum(len(r.split()) for r in responses) / n, n=n)
    recorder.add("distinct_share", len(set(responses)) / n, n=n)
    recorder.add("truncated_share", finished.count(False) / n, n=n)


def _record_sight(
    recorder: Recorder, name: str, rows: list[Row], rewards: list[list[float]], *, reference: float
) -> None:
    """Accuracy and spread on one policy's pairs; `reference` is the variance on SFT pairs."""
    accuracy, n = pair_accuracy(
        [pair[0] - pair[1] for pair in rewards],
        [row["gold"][0] - row["gold"][1] for row in rows],
    )
    variance = difference_variance(rewards)
    recorder.add(f"accuracy_policy_{name}", accuracy, n=n)
    recorder.add(f"difference_variance_{name}", variance, n=len(rows))
    if reference > 0:
        recorder.add(f"relative_difference_variance_{name}", variance / reference, n=len(rows))


def _record_heldout(context: StageContext, scorer: Scorer) -> None:
    pairs = read_pairs(context.folder("pairs") / "heldout.jsonl")
    prompts = [pair["prompt"] for pair in pairs]
    chosen, rejected = (
        scorer(
            prompts,
            [pair[side] for pair in pairs],
            finished=[pair[f"{side}_finished"] for pair in pairs],
        )
        for side in ("chosen", "rejected")
    )
    differences = [a - b for a, b in zip(chosen, rejected, strict=True)]
    accuracy, n = pair_accuracy(differences, [1.0] * len(differences))
    context.recorder.add("accuracy_heldout", accuracy, n=n)


def _standardise(context: StageContext, scorer: Scorer) -> tuple[float, float]:
    mean, std, _ = reward_spread(scorer, read_jsonl(context.folder("pairs") / "sft_samples.jsonl"))
    return mean, std


def _values(rewards: list[list[float]], settings: dict[str, Any]) -> list[float]:
    return absolute_differences(rewards)[: settings["kept_values"]]


def _write_responses(context: StageContext, rows: list[Row], rewards: list[list[float]]) -> None:
    for row, pair in zip(rows, rewards, strict=True):
        row["proxy"] = [round(r, 6) for r in pair]
    write_jsonl(context.out / RESPONSES, rows)


def _golds(context: StageContext, name: str) -> list[float]:
    return [row["gold"][0] for row in read_jsonl(context.folder(name) / RESPONSES)]
