"""What the manual's commands find in their folder, and how they are made small for a test.

Everything the tables below change is said here: the pages show the real commands.
"""

import shutil
from pathlib import Path

from shiftrm.files import write_jsonl
from shiftrm.world.build_domains import DomainWorldConfig, write_domain_world
from tests.data import public_schemas as schemas
from tests.fake_vllm import continued
from tests.test_recipes import amazon_rows, shp_rows

# TRL's default checkpointing calls a function that transformers deprecates.
FEW = ["max_steps=2", "kl_samples=4", "max_completion_length=4"]

SMALL: dict[str, list[str]] = {
    "sft": ["max_steps=2"],
    "train": ["max_steps=2"],
    "adapt": ["max_steps=2"],
    "adapt --policy": ["--max-new-tokens", "6"],
    "optimise ppo": [
        *("steps=2", "prompts_per_step=2", "rollouts_per_prompt=2", "minibatch_size=2"),
        *("kl_samples=4", "max_new_tokens=4"),
    ],
    "optimise rloo": [*FEW, "per_device_train_batch_size=4"],
    "optimise grpo": [*FEW, "per_device_train_batch_size=8"],
    "optimise dpo": FEW,
    "sample": ["--max-new-tokens", "6"],
    "evaluate win-rate": ["--limit", "6"],
    "evaluate sheet": ["--limit", "4"],
    "meta-train": ["max_steps=1", "support_batch_size=4", "query_batch_size=4", "eval_pairs=2"],
    "meta-test": [
        *("weighted.updates=1", "weighted.batch_size=4", "evaluation.pairs=4"),
        *("evaluation.responses_per_prompt=2", "evaluation.sampling.max_new_tokens=4"),
    ],
    "run --output": [
        *("rounds=1", "reward.settings.max_steps=2", "reward.meta.meta_batch_size=2"),
        *("policy.settings.steps=2", "policy.settings.prompts_per_step=2"),
        *("policy.settings.rollouts_per_prompt=2", "policy.settings.minibatch_size=2"),
        *("groups.prompts=3", "groups.responses=2", "evaluation.prompts=4"),
        *("sampling.max_new_tokens=4", "methods={metarm: {reward: metarm}}"),
    ],
}
"""Words that are added to a command that has all words of the key; the last one said counts."""

SMALL_PYTHON = {
    "DomainWorldConfig())": "DomainWorldConfig(support=16, pairs=16, eval_pairs=8, "
    "sft_examples=32, hidden_size=16, layers=1, heads=2, intermediate_size=16))",
    "num_train_epochs=1)": "num_train_epochs=1, max_steps=2)",
    "max_steps=500": "max_steps=1, support_batch_size=4, query_batch_size=2",
    "read_shp()": 'read_shp(["shp.jsonl"])',
    " WorldConfig()": " WorldConfig(sft_examples=64, train_prompts=40, eval_prompts=24, "
    "hidden_size=16, layers=1, heads=2, intermediate_size=16)",
}
"""Replacements in Python blocks."""

HERE: dict[str, str] = {
    "Anthropic/hh-rlhf": "public/hh_rlhf",
    "openai/summarize_from_feedback:comparisons": "public/summarize.jsonl",
    "trl-lib/tldr": "public/tldr.jsonl",
    "OpenAssistant/oasst1": "public/oasst1.jsonl",
    "PKU-Alignment/PKU-SafeRLHF": "public/pku.jsonl",
    "HuggingFaceH4/ultrafeedback_binarized": "public/ultrafeedback.jsonl",
    "anon8231489123/ShareGPT_Vicuna_unfiltered": "public/sharegpt.json",
    "allenai/reward-bench-2::test": "rewardbench.jsonl",
    "allenai/reward-bench-2": "rewardbench.jsonl",
}
"""Names on the hub, and made-up files in the same schemas."""


SMALL_DOMAINS = DomainWorldConfig(
    support=16, pairs=16, eval_pairs=8, sft_examples=32,
    hidden_size=16, layers=1, heads=2, intermediate_size=16,
)  # fmt: skip


def prepare(folder: Path) -> None:
    """Add to what the quick start has made what readers bring along: data, and other names."""
    write_public(folder / "public")
    models = folder / "models"
    for old, new in (("ppo", "ppo-1"), ("reward", "other-reward"), ("reward", "large-reward")):
        shutil.copytree(models / old, models / new)
    for name in ("policy", "rloo"):
        shutil.copy(folder / "ppo.jsonl", folder / f"{name}.jsonl")
    write_jsonl(folder / "rewardbench.jsonl", rewardbench_rows())
    write_domain_world(folder / "small", SMALL_DOMAINS)
    (folder / "small" / "domains").rename(folder / "domains")
    write_jsonl(folder / "shp.jsonl", shp_rows())
    for name in ("Books", "Video_Games"):
        write_jsonl(folder / f"{name}.jsonl", amazon_rows(name))


def write_public(folder: Path) -> None:
    schemas.write_hh_folder(folder / "hh_rlhf", 24)
    schemas.write_sharegpt(folder / "sharegpt.json", 8)
    schemas.write_oasst1(folder / "oasst1.jsonl", 8)
    schemas.write_pku(folder / "pku.jsonl", 12)
    schemas.write_comparisons(folder / "summarize.jsonl", 8)
    schemas.write_posts(folder / "tldr.jsonl", 8)
    schemas.write_binarized(folder / "ultrafeedback.jsonl", 8)


def rewardbench_rows():
    """RewardBench 1 and its subsets: the schema, few rows, words of the gold world."""
    for number, subset in enumerate(("alpacaeval-easy", "refusals-dangerous", "math-prm")):
        for k in range(2):
            yield {
                "id": 10 * number + k,
                "prompt": "describe the garden :",
                "chosen": "lovely roses",
                "rejected": "maybe roses roses",
                "subset": subset,
            }


def answer(body):
    """A server that is a judge for chats and vLLM for completions."""
    return continued(body) if "prompt" in body else "The first is better. [[A]]"


def write_answers(folder: Path) -> None:
    """Answer every sheet below `sheet` as raters would: A, B and tie in turn."""
    import csv

    for number, sheet in enumerate(sorted((folder / "sheet").glob("sheet*.csv"))):
        with sheet.open(encoding="utf-8-sig", newline="") as handle:
            rows = list(csv.DictReader(handle))
        for k, row in enumerate(rows):
            row["answer"] = ("A", "B", "tie")[(k + number) % 3]
        name = folder / ("ann.csv", "bob.csv")[number]
        with name.open("w", encoding="utf-8", newline="") as handle:
            writer = csv.DictWriter(handle, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
