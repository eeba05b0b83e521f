"""Describe a training run: the printed summary and the README.md beside the weights."""

import importlib.metadata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

import shiftrm
from shiftrm.core.intervals import Measured
from shiftrm.data.sources import HUB_NAME
from shiftrm.measure.diagnosis.thresholds import FEW_PROMPTS
from shiftrm.measure.diagnosis.verdict import accuracy_verdict
from shiftrm.trainers.kinds import ORDINARY
from shiftrm.trainers.meta_words import too_large, too_small
from shiftrm.trainers.quantised import LOADING

NOT_METRICS = (
    "runtime",
    "samples_per_second",
    "steps_per_second",
    "num_tokens",
    "epoch",
    "prompts",
    "model_preparation_time",
)

META_LOGS = {
    "meta_influence": "relative change of the gradient by the meta step, mean",
    "meta_influence_most": "the same, largest",
    "meta_objective": "J before the step, mean",
    "meta_objective_after": "J after the step, mean",
    "meta_rho": "length of the step, mean",
    "meta_growth": "factor by which reward differences grew in the step, mean",
    "meta_loss_rise": "rise of the loss on pairs in the step, as a share, mean",
    "meta_skipped": "share of skipped steps",
}


@dataclass
class DataSet:
    """One input: `pairs`, `eval NAME`, `groups`, or a model, which has no rows."""

    name: str
    source: str
    rows: int | None
    sha256: str

    def cells(self) -> tuple[Any, ...]:
        """Return the row of the card's table."""
        rows = "-" if self.rows is None else self.rows
        return self.name, f"`{self.source}`", rows, f"`{self.sha256}`" if self.sha256 else "-"


@dataclass
class Adapted:
    """The adaptation's part of the card and the summary."""

    how: str
    """The groups, and how many were held out."""

    verdict: str

    measured: str
    """Measurements before and after, as Markdown."""


@dataclass
class TrainedModel:
    """What every model card says about a training.

    Attributes:
        model: the checkpoint it started from.
        settings: those that differ from the defaults.
        command: the command that repeats it.
    """

    model: str
    output: str
    data: Sequence[DataSet]
    settings: Mapping[str, Any]
    seed: int
    command: str | None
    steps: int
    processes: int
    lora: bool

    def card(self, sections: Sequence[str], *, defaults: str = "", **front: Any) -> str:
        """Return README.md: front matter, the sections, then data, settings and versions.

        Args:
            defaults: the configuration classes that the settings differ from, as " of ...".
            front: fields of `huggingface_hub.ModelCardData`.
        """
        base = self.model if on_hub(self.model) else None
        models = [d for d in self.data if d.rows is None]
        named = ModelCardData(library_name="transformers", base_model=base, **front)
        parts = [
            f"---\n{named.to_yaml()}\n---",
            *sections,
            "## Data",
            markdown_table(
                ("data", "source", "rows", "SHA-256"),
                [d.cells() for d in self.data],
            ),
            "SHA-256 is the file's; of a folder or a hub data set it is that of the rows"
            f"{', of a model that of its configuration, tokenizer and weights' if models else ''}.",
            "## Settings",
            f"Those that differ from the defaults{defaults}:",
            markdown_table(("setting", "value"), [(k, f"`{v}`") for k, v in self.settings.items()]),
            f"Seed {self.seed}; processes: {self.processes}; {versions(lora=self.lora)}.",
        ]
        if self.command is not None:
            parts += ["Made by", f"```\n{self.command}\n```"]
        return "\n\n".join(part for part in parts if part) + "\n"


@dataclass
class Outcome(TrainedModel):
    """The content of the card and the summary of a reward model.

    Attributes:
        before, after: metrics by held-out set; before is None if the model could not be evaluated.
        loss: mean training loss over all steps, including those before an interruption.
        pairs, heldout: numbers of pairs, those held out by set.
        dropped: counts of dropped rows by data set and reason.
        trainer: the name of its class.
        adapted: None if the model was trained, not adapted.
        combined: what the result is made of, if not one model.
    """

    before: dict[str, dict[str, float]] | None
    after: dict[str, dict[str, float]]
    loss: float | None
    pairs: int
    heldout: dict[str, int]
    dropped: dict[str, dict[str, int]]
    trainer: str = "RewardTrainer"
    meta: dict[str, float] = field(default_factory=dict)
    adapted: Adapted | None = None
    combined: str | None = None


def measurements(trainer: Any, result: Any) -> dict[str, Any]:
    """Return the fields of `Outcome` that are known after training."""
    logs = trainer.state.log_history
    sets = trainer.eval_dataset
    sets = sets if isinstance(sets, dict) else {} if sets is None else {"": sets}
    return {
        "trainer": type(trainer).__name__,
        "steps": trainer.state.global_step,
        "loss": _mean_loss(logs, trainer.state.global_step, result.training_loss),
        "pairs": len(trainer.train_dataset),
        "heldout": {name: len(table) for name, table in sets.items()},
        "dropped": trainer.dropped_pairs,
        "processes": trainer.accelerator.num_processes,
        "lora": hasattr(trainer.accelerator.unwrap_model(trainer.model), "peft_config"),
        "meta": {
            key: (max(values) if key == "meta_influence_most" else sum(values) / len(values))
            for key in META_LOGS
            if (values := [log[name] for log in logs if (name := key.removesuffix("_most")) in log])
        },
    }


def summary(outcome: Outcome) -> str:
    """Return the closing message of `shiftrm train` and `shiftrm adapt`."""
    count = sum(sum(reasons.values()) for reasons in outcome.dropped.values())
    loss = "" if outcome.loss is None else f", mean loss {outcome.loss:.4f}"
    lines = [
        f"{_verb(outcome)} on {outcome.pairs} pairs ({count} dropped) for {outcome.steps} "
        f"steps{loss}.",
        *_dropped_words(outcome),
        *([] if outcome.combined is None else [outcome.combined]),
    ]
    for name, metrics in outcome.after.items():
        what = f"{outcome.heldout[name]} held-out pairs" + (f" of {name}" if name else "")
        before = None if outcome.before is None else outcome.before[name]["accuracy"]
        lines.append(f"Accuracy on {what}: {_accuracy_words(before, metrics)}.")
    if outcome.adapted is not None:
        lines += [outcome.adapted.how, outcome.adapted.verdict]
    return "\n".join([*lines, *_meta_words(outcome), f"Reward model: {outcome.output}"])


def _accuracy_words(before: float | None, metrics: Mapping[str, float]) -> str:
    """Return the accuracy with its interval and interpretation, worded as in a diagnosis."""
    value = metrics["accuracy"]
    text = f"{value:.3f}" if before is None else f"{before:.3f} before, {value:.3f} after"
    low, high = metrics.get("accuracy_low"), metrics.get("accuracy_high")
    if low is None or high is None:
        return text
    text += f" (95 % interval {low:.3f} to {high:.3f}; a coin: 0.5)"
    if metrics["prompts"] < FEW_PROMPTS:
        return f"{text}: {metrics['prompts']:.0f} prompts; fewer than {FEW_PROMPTS} show nothing"
    word, reason = accuracy_verdict(Measured(value, low, high))
    if low <= 0.5:
        reason += "; these pairs show nothing that was learnt"
    return f"{text}: {word}" + (f", {reason}" if reason else "")


def _verb(outcome: Outcome) -> str:
    return "Trained" if outcome.adapted is None else "Adapted"


def _mean_loss(logs: list[dict[str, Any]], steps: int, reported: float) -> float | None:
    """Return the mean over all steps; transformers' own omits those before an interruption."""
    losses = [(log["step"], log["loss"]) for log in logs if "loss" in log]
    if not losses:
        return reported or None
    starts = [0, *(step for step, _ in losses)]
    total = sum((s - a) * loss for a, (s, loss) in zip(starts, losses, strict=False))
    return total / losses[-1][0] if losses[-1][0] == steps else reported or total / losses[-1][0]


def _dropped_words(outcome: Outcome) -> list[str]:
    return [
        f"Dropped from the {name} pairs: "
        + "; ".join(f"{count} {reason}" for reason, count in reasons.items() if count)
        + "."
        for name, reasons in outcome.dropped.items()
        if any(reasons.values())
    ]


def _meta_words(outcome: Outcome) -> list[str]:
    influence = outcome.meta.get("meta_influence")
    if influence is None:
        return []
    by_effect = "meta_rho" in outcome.meta
    words = f"The meta step changed the gradient by {influence:.2g} of its length."
    if small := too_small(influence, by_effect=by_effect):
        words += f" {small}"
    most = outcome.meta["meta_influence_most"]
    if large := too_large(most, by_effect=by_effect):
        words += f" WARNING: in one step it was {most:.2g}. {large}"
    return [words]


def model_card(outcome: Outcome) -> str:
    """Return the README.md: the model's inputs, training and metrics. Needs no network."""
    adapted, metarm = outcome.adapted, bool(outcome.meta)
    return outcome.card(
        [
            f"# Reward model {'' if adapted is None else 'adapted '}from {outcome.model}",
            _opening(outcome),
            "## Measured",
            _metrics_table(outcome) if adapted is None else adapted.measured,
            *_dropped_words(outcome),
            *_meta_section(outcome),
        ],
        defaults=f" of `RewardConfig`{' and `MetaRMConfig`' if metarm else ''}",
        pipeline_tag="text-classification",
        datasets=sorted(
            {d.source.split(":")[0] for d in outcome.data if d.rows and on_hub(d.source)}
        )
        or None,
        tags=["reward-model", "shiftrm", *(["metarm"] if metarm else [])],
    )


def on_hub(source: str) -> bool:
    """Return whether a name is a hub name, not a local file or folder."""
    return bool(HUB_NAME.fullmatch(source.split(":")[0])) and not Path(source).exists()


_CHECKPOINT = (
    "A sequence-classification checkpoint with one label: the logit is the reward, read at the "
    "last token of prompt and response, EOS included."
)


def _opening(outcome: Outcome) -> str:
    method = (
        "with a MetaRM step on unlabelled responses (arXiv 2405.00438)"
        if outcome.meta
        else "with the Bradley-Terry loss"
        if outcome.trainer in ORDINARY
        else f"with `{outcome.trainer}`"
    )
    bits = next((bits for name, bits in LOADING.items() if outcome.settings.get(name)), None)
    lora = (
        f" The base was held in {bits} bits: its dequantised weights with LoRA merged are here. "
        "The adapter alone, in `adapter/`, was trained on that base, not on the original."
        if bits
        else " LoRA was merged into these weights; the adapter alone is in `adapter/`."
        if outcome.lora
        else ""
    )
    loss = "" if outcome.loss is None else f", mean loss {outcome.loss:.4f}"
    of = "" if outcome.adapted is None else f" from `{outcome.model}`"
    how = "" if outcome.adapted is None else f"\n\n{outcome.adapted.how}"
    return (
        f"{_verb(outcome)}{of} {method} on {outcome.pairs} preference pairs for {outcome.steps} "
        f"steps{loss}. {outcome.combined or _CHECKPOINT}{lora}{how}"
    )


def _metrics_table(outcome: Outcome) -> str:
    if not outcome.after:
        return "Nothing: no held-out pairs were given."
    rows = []
    for name, metrics in outcome.after.items():
        for key, value in metrics.items():
            if key in NOT_METRICS or not isinstance(value, int | float):
                continue
            before = (outcome.before or {}).get(name, {}).get(key)
            rows.append(
                (
                    name or "held-out",
                    outcome.heldout[name],
                    key.replace("_", " "),
                    "-" if before is None else f"{before:.4g}",
                    f"{value:.4g}",
                )
            )
    return markdown_table(("held-out set", "pairs", "measure", "before", "after"), rows)


def _meta_section(outcome: Outcome) -> list[str]:
    if not outcome.meta:
        return []
    rows = [(META_LOGS[key], f"{value:.4g}") for key, value in outcome.meta.items()]
    return ["## Meta step", markdown_table(("measure", "value"), rows), *_meta_words(outcome)]


def versions(*, lora: bool) -> str:
    """Return the versions of the libraries that made the model."""
    names = ["torch", "transformers", "trl", "accelerate", "datasets"]
    names += ["peft"] if lora else []
    found = [f"{name} {importlib.metadata.version(name)}" for name in names]
    return ", ".join([f"shiftrm {shiftrm.__version__}", *found])


def markdown_table(header: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a Markdown table with each cell on one line."""
    lines: list[Sequence[Any]] = [header, ("---",) * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(str(cell).replace("|", "\\|").replace("\n", " ") for cell in line) + " |"
        for line in lines
    )
