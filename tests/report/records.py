"""Plausible records of whole runs, made without running anything.

Two experiments: the demo in the gold world, and a recipe with a judge. What tests check (gold after
the last round, win shares) is fixed by hand; everything else follows simple formulas with a little
seeded noise, so that tests can say what a table must print.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from shiftrm.records import Record

EVIL = "<script>alert('x')</script>\"><img src=http://evil.example/a onerror=alert(1)>"

DEMO_ROUNDS = 3
# Gold after the last round by arm, for seeds 0, 1, 2.
GOLD_LAST = {
    "fixed": (4.32, 4.46, 4.62),
    "retrained": (4.61, 4.13, 4.66),
    "metarm_paper": (4.40, 4.50, 4.60),
    "metarm_scale_free": (4.77, 5.10, 4.73),
    "fresh_labels": (4.83, 4.95, 5.15),
}
# What an adaptation gives in accuracy, and the relative variance it leads to. Under `fixed` every
# round halves the variance.
ACCURACY = {"retrained": 0.01, "metarm_scale_free": 0.04, "fresh_labels": 0.05}
SPREAD = {"retrained": 0.5, "metarm_paper": 0.5, "metarm_scale_free": 1.8}
DEMO: dict[str, Any] = {
    "name": "gold_demo",
    "seed": 0,
    "rounds": DEMO_ROUNDS,
    "world": {"pairs": 3000},
    "data": None,
    "methods": {
        **{name: {"reward": name, "policy": None} for name in GOLD_LAST},
        "dpo": {"reward": "fixed", "policy": "dpo"},
    },
    "policy": {"method": "ppo", "settings": {"kl_target": 6.0}},
    "evaluation": {"gold": "gold"},
    "judge": {"kind": "gold"},
}

ROUNDS = 4
PROMPTS = 100
WINS = {
    "fixed": (0.40, 0.50, 0.48, 0.41),
    "metarm": (0.44, 0.62, 0.69, 0.60),
    "dpo": (0.45,),
}
LOSSES = {
    "fixed": (0.20, 0.18, 0.25, 0.36),
    "metarm": (0.12, 0.08, 0.05, 0.09),
    "dpo": (0.30,),
}
BEST = {"fixed": 2, "metarm": 3, "dpo": 1}
RECIPE: dict[str, Any] = {
    "model": "meta-llama/Llama-2-7b-hf",
    "name": "hh_helpful",
    "seed": 0,
    "rounds": ROUNDS,
    "preset": "paper",
    "world": None,
    "data": {"pairs": {"format": "hh_rlhf", "source": None}, "prompts": {"format": "hh_rlhf"}},
    "methods": {
        "fixed": {"reward": "fixed", "policy": None},
        "metarm": {"reward": "metarm", "policy": None},
        "dpo": {"reward": "fixed", "policy": "dpo"},
    },
    "policy": {"method": "ppo", "settings": {"kl_target": 12.0}},
    "judge": {"kind": "endpoint", "model": "gpt-4o", "base_url": "http://me:secret@host/v1"},
}

Key = tuple[str, str, int]  # stage, method, round


class Writer:
    """Collects records of one seed."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.rng = np.random.default_rng(seed)
        self.records: list[Record] = []

    def add(self, key: Key, metric: str, value, step=None, n=None) -> None:
        stage, method, round_ = key
        self.records.append(
            Record(
                stage=stage, method=method, round=round_, metric=metric, step=step, n=n,
                value=value if isinstance(value, list) else float(value), seed=self.seed,
                commit="0123456789ab", versions="shiftrm 0.1.0, torch 2.13.0",
            )
        )  # fmt: skip

    def all(self, key: Key, values: Mapping[str, Any], step=None, n=None) -> None:
        for metric, value in values.items():
            self.add(key, metric, value, step, n)

    def differences(self, key: Key, scales: Mapping[str, float]) -> None:
        for when, scale in scales.items():
            values = np.abs(self.rng.normal(0, scale, 300))
            rounded = [round(float(v), 6) for v in values]
            self.add(key, f"difference_values_{when}", rounded)

    def jitter(self, scale: float) -> float:
        return float(self.rng.normal(0, scale))


def write_reward_model(w: Writer, method: str, round_: int, steps: range, ends, pace: float):
    """A training from the first to the last accuracy of `ends`."""
    key = ("reward_model", method, round_)
    start, end = ends
    for step in steps:
        w.add(key, "loss", 0.69 - 0.0001 * step, step)
        curve = end - (end - start) * np.exp(-step / pace)
        w.add(key, "eval_accuracy", curve + w.jitter(0.004), step)
        if method.startswith("metarm"):
            influence = 0.31 if method == "metarm_scale_free" else 2e-5
            w.all(key, {"meta_influence": influence, "meta_skipped": 0.0}, step)
            w.all(key, {"meta_objective": 0.1, "meta_objective_after": 0.2}, step)


def write_policy(w: Writer, method: str, round_: int, kls, golds, variance) -> None:
    """Forty steps of PPO from the first to the last KL and gold."""
    key = ("ppo", method, round_)
    for step in range(1, 41):
        part = step / 40
        w.add(key, "sequence_kl", kls[0] + (kls[1] - kls[0]) * part + w.jitter(0.1), step)
        if golds:
            gold = golds[0] + (golds[1] - golds[0]) * part
            w.add(key, "gold_mean", gold + w.jitter(0.15), step)
        w.add(key, "standardised_mean", 0.4 * (round_ - 1 + part) + w.jitter(0.03), step)
        spread = variance(round_ - 1 + part) * (1 + w.jitter(0.08))
        w.add(key, "difference_variance", spread, step)


# -- the demo ------------------------------------------------------------------------------------


def write_demo_evaluation(w: Writer, method: str, round_: int, gold: float, kl: float) -> None:
    key = ("evaluate", method, round_)
    alone = method in ("sft", "dpo")
    drift = 0.0 if alone else 0.06 * (round_ - 1)
    spread = 1.0 if alone or round_ == 1 else SPREAD.get(method, 0.9)
    if method == "fixed":
        spread = 0.5 ** (round_ - 1)
    accuracies = {"before": 0.72 - drift + ACCURACY.get(method, 0.0), "after": 0.66 - drift}
    w.add(key, "accuracy_heldout", 0.74, n=1000)
    if method == "sft":  # the evaluation of SFT knows no PPO: only "after"
        accuracies, factors = {"after": 0.72}, {"after": 1.0}
    else:
        factors = {"before": 1.0, "after": 0.5}
    for when, factor in factors.items():
        w.add(key, f"accuracy_policy_{when}", accuracies[when], n=2000)
        w.add(key, f"relative_difference_variance_{when}", spread * factor)
        w.add(key, f"difference_variance_{when}", 0.8 * spread * factor)
    w.add(key, "difference_variance_sft", 0.8)
    w.differences(key, {"sft": 1.0, "before": spread**0.5, "after": (0.5 * spread) ** 0.5})
    w.add(key, "gold_mean", gold, n=400)
    standardised = 0.0 if method == "sft" else 0.4 * round_
    w.all(key, {"gold_std": 1.5, "kl": kl, "proxy_mean": 0.9 * round_})
    w.all(key, {"proxy_mean_standardised": standardised, "length_mean": 11.0 + 0.3 * round_})
    w.all(key, {"distinct_share": 0.8, "truncated_share": 0.01})
    win = min(0.9, max(0.05, 0.3 + 0.12 * (gold - 2.3)))
    if method != "sft":
        w.all(key, {"win_vs_sft": win, "tie_vs_sft": 0.1, "lose_vs_sft": 0.9 - win}, n=400)


def demo_records(
    seed: int = 0, gold_last: Mapping[str, tuple[float, ...]] = GOLD_LAST, rounds: int = DEMO_ROUNDS
) -> list[Record]:
    """All records of one seed of the demo."""
    w = Writer(seed)
    w.all(("world", "sft", 0), {"pairs": 3000, "sft_gold_mean": 2.3})
    training = {"steps": range(10, 210, 10), "pace": 50.0}
    write_reward_model(w, "sft", 0, ends=(0.5, 0.74), **training)
    w.add(("reward_model", "sft", 0), "eval_accuracy_final", 0.74, n=1000)
    write_demo_evaluation(w, "sft", 0, 2.3, 0.0)
    for method, golds in gold_last.items():
        before = 2.3
        for round_ in range(1, rounds + 1):
            if method != "fixed":
                write_reward_model(w, method, round_, ends=(0.73, 0.745), **training)
                w.add(("reward_model", method, round_), "eval_accuracy_final", 0.745, n=1000)
            gold = 2.3 + (golds[seed] - 2.3) * (round_ / rounds) ** 0.5
            kls = 6.0 * (round_ - 1) / rounds, 6.0 * round_ / rounds
            flat = SPREAD.get(method, 0.9)
            write_policy(
                w, method, round_, kls, (before, gold),
                lambda x, m=method, flat=flat: 0.8 * np.exp(-0.8 * x) if m == "fixed" else flat,
            )  # fmt: skip
            write_demo_evaluation(w, method, round_, gold, kls[1])
            before = gold
    write_demo_evaluation(w, "dpo", 1, 3.6, 9.0)
    for method in (*gold_last, "dpo"):
        key = ("compare", method, 1 if method == "dpo" else DEMO_ROUNDS)
        for opponent, win in (("sft", 0.61), ("fixed", 0.44), ("dpo", 0.52)):
            if opponent != method:
                shares = {"win": win, "tie": 0.16, "lose": 0.84 - win}
                w.all(key, {f"{x}_vs_{opponent}": share for x, share in shares.items()}, n=200)
    return w.records


# -- the recipe ----------------------------------------------------------------------------------


def write_evaluation(w: Writer, method: str, round_: int, *, judged: bool, gold: bool) -> None:
    key = ("evaluate", method, round_)
    after = 1.0 if method in ("sft", "dpo") else 0.55**round_ if method == "fixed" else 0.9
    before = 1.0 if round_ < 2 else 0.55 ** (round_ - 1) if method == "fixed" else 1.1
    w.all(
        key,
        {
            "accuracy_heldout": 0.68 + (0.004 if method == "metarm" else 0.0),
            "proxy_mean": 1.0 + 0.5 * round_,
            "proxy_mean_standardised": 0.5 * round_,
            "length_mean": 60.0 + 9 * round_,
            "distinct_share": 0.99,
            "truncated_share": 0.02 + 0.03 * round_,
            "kl": 3.0 * round_ if method != "dpo" else 8.0,
        },
        n=2000,
    )
    scales = {"sft": 1.0, "before": before, "after": after}
    w.differences(key, {when: scale**0.5 for when, scale in scales.items()})
    for when, scale in scales.items():
        w.add(key, f"difference_variance_{when}", 0.8 * scale, n=1000)
        if when != "sft":
            w.add(key, f"relative_difference_variance_{when}", scale, n=1000)
    if gold:
        mean = 2.0 + 0.3 * round_ + (0.2 if method == "metarm" else 0)
        w.all(key, {"gold_mean": mean, "gold_std": 1.5}, n=2000)
        accuracies = {"before": 0.66, "after": 0.66 - 0.03 * round_}
        w.all(key, {f"accuracy_policy_{k}": v for k, v in accuracies.items()}, n=1000)
    bleu = 0.20 + 0.05 * round_
    diversity = {"self_bleu": bleu, "compression_ratio": 2.4}
    diversity |= {f"self_bleu_{order}": bleu + 0.1 * (3.5 - order) for order in (2, 3, 4, 5)}
    diversity |= {f"distinct_{order}": 0.3 * order for order in (1, 2, 3)}
    diversity |= {"embedding_similarity": 0.3 + 0.02 * round_}
    w.all(key, diversity | {"similarity": bleu + 0.3 + 0.02 * round_}, n=100)
    if judged and method != "sft":
        i = round_ - 1
        write_verdicts(w, key, "sft", WINS[method][i] + 0.01 * w.seed, LOSSES[method][i], PROMPTS)


def write_verdicts(w: Writer, key: Key, opponent: str, win: float, lose: float, n: int) -> None:
    tie = 1 - win - lose
    numbers = {
        "win": win, "tie": tie, "lose": lose, "win_low": win - 0.09, "win_high": win + 0.09,
        "length_controlled": win, "length_ours": 410, "length_theirs": 350, "unjudged": 0,
        "judge_consistency": 0.8, "judge_first_share": 0.55, "rate": win + 0.5 * tie,
    }  # fmt: skip
    w.all(key, {f"{name}_vs_{opponent}": value for name, value in numbers.items()}, n=n)


def recipe_records(seed: int = 0, *, judged: bool = True, gold: bool = False) -> list[Record]:
    """All records of one seed of the recipe."""
    w = Writer(seed)
    w.all(
        ("data", "sft", 0),
        {
            "demonstrations": 52000, "pairs": 43000 + seed, "prompts": 40000, "heldout": 2000,
            "eval_prompts": 1000, "pairs_dropped_equal_responses": 31,
            "pairs_dropped_empty_response": 4, "prompts_dropped_same_prompt": 1200,
        },
    )  # fmt: skip
    training = {"steps": range(100, 1100, 100), "pace": 250.0}
    write_reward_model(w, "sft", 0, ends=(0.5, 0.68), **training)
    write_evaluation(w, "sft", 0, judged=judged, gold=gold)
    for method, wins in WINS.items():
        for round_ in range(1, len(wins) + 1):
            if method == "metarm":
                write_reward_model(w, method, round_, ends=(0.66, 0.685), **training)
            if method == "dpo":
                for step in range(1, 41):
                    log = {"loss": 0.6, "rewards/accuracies": 0.6}
                    w.all(("ppo", method, round_), log, step)
            else:
                write_policy(
                    w, method, round_, (3.0 * (round_ - 1), 3.0 * round_), (),
                    lambda x, m=method: 0.8 * np.exp(-0.5 * x) if m == "fixed" else 0.8,
                )  # fmt: skip
            write_evaluation(w, method, round_, judged=judged, gold=gold)
    for method, best in BEST.items() if judged else ():
        for other, win in (("sft", 0.60), ("fixed", 0.54), ("metarm", 0.30), ("dpo", 0.49)):
            if other != method:
                write_verdicts(w, ("compare", method, best), other, win, 0.15, PROMPTS // 2)
    return w.records


def over_optimised(seed: int = 0, shift: float = 0.0) -> list[Record]:
    """Over-optimisation along a policy's training, and best-of-n."""
    along = {
        "overopt_peak_gold": 3.0 + shift, "overopt_peak_kl": 2.0, "overopt_final_gold": 1.0,
        "overopt_final_kl": 9.0, "overopt_drop": 2.0, "overopt_gold_at_kl_3": 2.5,
        "overopt_gold_at_kl_10": 0.5,
    }  # fmt: skip
    w = Writer(seed)
    w.all(("evaluate", "fixed", 1), along)
    key = ("best_of_n", "sft", 0)
    w.all(key, {"bon_kl": 0.0, "bon_proxy": 0.1, "bon_gold": 2.0}, step=1)
    w.all(key, {"bon_kl": 0.64, "bon_proxy": 0.7, "bon_gold": 2.5 + shift}, step=4)
    w.add(key, "bon_drop", 0.25)
    return w.records


# -- helpers -------------------------------------------------------------------------------------


def change(records: list[Record], value: float | None, **where: object) -> list[Record]:
    """The records with `value` where all named fields agree; None drops those records."""
    changed = []
    for record in records:
        if all(getattr(record, name) == wanted for name, wanted in where.items()):
            if value is None:
                continue
            record = Record(**{**record.__dict__, "value": value})
        changed.append(record)
    return changed


def renamed(records: list[Record], arm: str, **fields: object) -> list[Record]:
    """The records of one arm with other fields."""
    return [Record(**{**r.__dict__, **fields}) for r in records if r.method == arm]


def write_folder(folder: Path) -> None:
    """The scored responses of a run, hostile ones among them."""
    texts = [EVIL, "مرحبا بالعالم", "long " * 1000, "lone \ud800 surrogate \u202e reversed", "5"]
    prompts: list[Any] = [
        [{"role": "user", "content": EVIL}, {"role": "assistant", "content": "Yes?"},
         {"role": "user", "content": "Go on."}],
        "plain text", "nowrap" * 200, [{"role": "user", "content": "🙂"}], "fifth",
    ]  # fmt: skip
    places = ["evaluation", "methods/dpo/round-1/evaluation", "methods/fixed/round-10/evaluation",
              "methods/fixed/round-2/evaluation", "methods/metarm/round-4/evaluation"]  # fmt: skip
    for place in places:
        (folder / place).mkdir(parents=True)
        rows = [
            {"prompt": p, "responses": [f"{place}: {t}", "b"], "finished": [i != 2, True],
             "rewards": [0.5 + i, 1.0], "golds": [2.25, 0.0]}
            for i, (p, t) in enumerate(zip(prompts, texts, strict=True))
        ]  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / place / "scored.jsonl").write_text(text)
