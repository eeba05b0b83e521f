"""Meta-train by OODPL from a folder of domains; the implementation of `shiftrm meta-train`."""

import dataclasses
import os
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers.trainer_callback import PrinterCallback
from trl import ModelConfig

from shiftrm.data.domains import EVAL_PAIRS, FINETUNE, PAIRS, Domain, DomainSplit, load_split
from shiftrm.data.sources import fingerprint
from shiftrm.errors import UserError, suggest
from shiftrm.models.loading import checkpoint_fingerprint
from shiftrm.oodpl.meta_config import IDLE, OODPLConfig
from shiftrm.oodpl.trainer import OODPLTrainer
from shiftrm.trainers import work_folder
from shiftrm.trainers.late_settings import check_late_settings
from shiftrm.trainers.one_model import write_model
from shiftrm.trainers.progress import ProgressInWords
from shiftrm.trainers.settings import REFUSED, Settings, command_defaults, value_of
from shiftrm.trainers.training import require_checkpoint
from shiftrm.trainers.training_log import write_training_log

__all__ = ["meta_train", "settings_of"]


def meta_train(
    model: str,
    *,
    policy: str,
    domains: str,
    output: Path,
    held_out: Sequence[str] | None = None,
    validation: Sequence[str] | None = None,
    settings: Mapping[str, Any],
    command: str | None = None,
) -> str | None:
    """Meta-train a reward model on a folder of domains.

    Training works in `.NAME.work` beside the output folder and resumes from there, as in
    `trainers.training.train`.

    Args:
        model: the reward model to start from, or a policy, whose backbone gets a new head.
        policy: the reference policy that every inner loop starts from.
        domains: a folder in the layout of `shiftrm.data.domains`.
        held_out, validation: names; None takes those of `splits.json`.
        settings: values by field of `OODPLConfig`.
        command: the command that the model card shows for repeating this run.

    Returns:
        A summary; None on all but the main process.

    Raises:
        UserError: bad data or settings, an existing output, weights that are not finite.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{output}: already there and not empty; choose another --output")
    target = Path(os.path.abspath(output))
    work = target.with_name(f".{target.name}.work")
    chosen = _resolve(settings, work=work)
    args = chosen.args
    for name in (model, policy):
        require_checkpoint(name)
    split = load_split(
        domains,
        held_out=held_out,
        validation=validation,
        support_batch=args.support_batch_size,
        query_batch=args.query_batch_size,
    )
    with work_folder.hold_work(work, _record(model, policy, chosen, split)) as checkpoint:
        with _explained(chosen, model):
            trainer = OODPLTrainer(model, policy, args, split=split)
        trainer.remove_callback(PrinterCallback)
        trainer.add_callback(ProgressInWords(speaks=args.disable_tqdm))
        trainer.add_callback(work_folder.MarkCompleteCheckpoints())
        watched = trainer.watched
        before = trainer.evaluate() if watched else {}
        with _explained(chosen, model):
            trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
        after = trainer.evaluate() if watched else {}
        summary = _summary(split, args, before, after, output, watched=len(watched))
        finished = work / work_folder.FINISHED
        write_model(trainer, finished)
        if trainer.accelerator.is_main_process:
            start = [{"step": 0, **before}] if watched else []  # the trainer's log has no such row
            write_training_log(finished, [*start, *trainer.state.log_history])
            card = _card(summary, model, policy, domains, args, command)
            work_folder.publish_folder(finished, work, target, card)
        trainer.accelerator.wait_for_everyone()
    return summary if trainer.accelerator.is_main_process else None


def settings_of(given: Mapping[str, Any], *, work: Path) -> OODPLConfig:
    """Return the `OODPLConfig`; strings are read as YAML unless the setting is text.

    Raises:
        UserError: an unknown setting (the nearest is suggested) or an invalid value.
    """
    args: OODPLConfig = _resolve(given, work=work).args
    return args


def _resolve(given: Mapping[str, Any], *, work: Path) -> Settings:
    """Return the settings as other commands keep them; raises as `settings_of`."""
    hints = typing.get_type_hints(OODPLConfig)
    known = [f.name for f in dataclasses.fields(OODPLConfig) if f.init and f.name not in REFUSED]
    values = {}
    for key, value in given.items():
        if key in IDLE:
            raise UserError(f"{key}: {IDLE[key]}")
        if key in REFUSED:
            raise UserError(f"unknown setting {key!r}; {REFUSED[key]}")
        if key not in known:
            raise UserError(f"unknown setting {key!r}{suggest(key, known)}")
        values[key] = value_of(key, value, hints[key])
    ours = command_defaults(work)
    try:
        found = Settings(OODPLConfig(**(ours | values)), ModelConfig(), values, ours)
    except UserError:
        raise
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise UserError(f"meta-training settings: {error}") from None
    check_late_settings(found.args, values)
    return found


@contextmanager
def _explained(chosen: Settings, model: str) -> Iterator[None]:
    """Turn a library's refusal of the settings into one line, as `shiftrm train` does."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, ImportError, NotImplementedError, RuntimeError) as error:
        raise chosen.explain(model, error) from error
    except KeyError as error:
        if "metric_for_best_model" not in str(error):
            raise
        raise UserError(str(error.args[0])) from error


def _record(model: str, policy: str, chosen: Settings, split: DomainSplit) -> dict[str, Any]:
    """Return the entries that must match to resume an interrupted run.

    Tasks are drawn from the sources by position, so their order is one of the inputs.
    """
    models = {"model": model, "policy": policy}
    sums = {name: checkpoint_fingerprint(name)[:16] for name in {model, policy}}
    return {
        **{role: os.path.normpath(name) for role, name in models.items()},
        "files": {role: sums[name] for role, name in models.items()},
        "settings": chosen.identity(),
        "data": {
            "source": [domain.name for domain in split.source],
            "validation": [domain.name for domain in split.validation],
            "held_out": sorted(domain.name for domain in split.held_out),
            "rows": {d.name: _fingerprints(d) for d in (*split.source, *split.validation)},
        },
        "processes": int(os.environ.get("WORLD_SIZE", "1")),
    }


def _fingerprints(domain: Domain) -> dict[str, str]:
    """Return a fingerprint of each file's rows: moved to another file, a row counts differently."""
    files = {FINETUNE: domain.support, PAIRS: domain.query, EVAL_PAIRS: domain.eval_pairs}
    return {name: fingerprint("", list(rows))[:16] for name, rows in files.items()}


def _summary(
    split: DomainSplit,
    args: OODPLConfig,
    before: Mapping[str, float],
    after: Mapping[str, float],
    output: Path,
    *,
    watched: int,
) -> str:
    lines = [
        f"{len(split.source)} source domains, {args.max_steps} outer steps of "
        f"{args.domains_per_step} tasks, D = {args.inner_steps}, beta = {args.beta:g}"
    ]
    if after:
        which = "validation domains" if split.validation else "source domains (evaluation pairs)"
        lines.append(
            f"A_PL on {watched} {which}: "
            f"{after['eval_reference_accuracy']:.3f} before adapting; adapted under the reward "
            f"model: {before['eval_accuracy']:.3f} at the start, {after['eval_accuracy']:.3f} now"
        )
    lines.append(f"Reward model: {output}")
    return "\n".join(lines)


def _card(
    summary: str, model: str, policy: str, domains: str, args: OODPLConfig, command: str | None
) -> str:
    names = [f.name for f in dataclasses.fields(OODPLConfig)]
    ours = OODPLConfig.__annotations__
    settings = "\n".join(f"- {name}: {getattr(args, name)}" for name in names if name in ours)
    how = f"\nMade with\n\n    {command}\n" if command else ""
    return f"""---
library_name: transformers
tags: [reward-model, oodpl, shiftrm]
---
# Reward model, meta-trained over domains

{summary}

OODPL (Jia, arXiv 2402.14760) as shiftrm implements it: a sequence classifier with one label, loaded
by transformers and `shiftrm.models.scoring.Scorer`.
Started from `{model}`, reference policy `{policy}`,
domains `{domains}`.
{how}
{settings}
"""
