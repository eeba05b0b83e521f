"""A whole gold-world run: its configuration and its stages."""

from pathlib import Path

from shiftrm.config import apply_overrides, from_mapping, to_mapping
from shiftrm.pipeline.demo_config import RunConfig
from shiftrm.pipeline.demo_plan import plan
from shiftrm.pipeline.engine import run_stages
from shiftrm.pipeline.folder import claim, progress

FOLDER_README = """This folder holds one run of iterative RLHF on shiftrm's gold world.

report.html     what happened, in words and pictures; open it in a browser
records.jsonl   every measured number; the page is made from this file alone
config.yaml     every setting of the run
world/          the language: prompts, demonstrations, tokenizer, the random base model
sft/            the policy after supervised fine-tuning (an ordinary transformers checkpoint)
pairs/          preference pairs (TRL format), held-out pairs, samples of the SFT policy
reward_model/   the first reward model (an ordinary sequence-classification checkpoint)
evaluation/     the SFT policy's responses to the evaluation prompts, with their gold rewards
methods/        per method and round: groups or labels, reward model, policy, evaluation
comparison/     best rounds against each other

Each folder with a stage.json is a finished stage: its settings, records.jsonl and log.txt stand in
it. Give the same command again to continue an interrupted run, or to make the page anew.
"""


def configure(overrides: list[str]) -> RunConfig:
    """The default run with `key=value` settings applied."""
    return from_mapping(RunConfig, apply_overrides(to_mapping(RunConfig()), overrides))


def run_demo(config: RunConfig, output: Path, *, workers: int) -> None:
    """Run all stages that are not finished."""
    stages = plan(config)
    claim(output, to_mapping(config), FOLDER_README)
    with progress(stages) as on_progress:
        run_stages(stages, output, seed=config.seed, workers=workers, on_progress=on_progress)
