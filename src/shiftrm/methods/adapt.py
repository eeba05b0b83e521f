"""Adapt a reward model to the current policy; the implementation of `shiftrm adapt`."""

import gc
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from shiftrm.data.negatives import with_own
from shiftrm.data.prompts import read_prompts, warn_of_joined_ends
from shiftrm.data.splits import held_out
from shiftrm.errors import UserError
from shiftrm.files import Row, write_jsonl
from shiftrm.measure.diagnosis.comparison import adaptation_verdict
from shiftrm.measure.diagnosis.findings import (
    Bar,
    DataFile,
    Findings,
    encode_data,
    find,
    no_bar,
    prompt_key,
    read_data,
)
from shiftrm.measure.sight import PAIRS
from shiftrm.methods.inputs import adaptable, with_models
from shiftrm.models.loading import checkpoint_fingerprint
from shiftrm.models.rendering import Text
from shiftrm.models.sampling import (
    Draws,
    SamplingConfig,
    encode_prompts,
    load_policy,
    sample_groups,
)
from shiftrm.models.scoring import Scorer
from shiftrm.progress import task
from shiftrm.trainers.members import check_head
from shiftrm.trainers.model_card import Adapted, model_card, summary
from shiftrm.trainers.training import (
    TrainingJob,
    TrainingRequest,
    open_work,
    prepare,
    publish,
    train_in_work,
)
from shiftrm.trainers.work_folder import SAMPLES

HOLDOUT = 0.2
"""Share of the groups' prompts that is only measured on."""

HELD_OUT = "heldout-groups.jsonl"
"""A file in the output folder, beside the weights."""

Present = Callable[[Findings, Path, Mapping[str, Any]], str]
"""`present(found, folder, more)` writes the findings to the folder and returns them as Markdown."""


@dataclass(frozen=True)
class PolicySamples:
    """Which groups to sample: policy, prompts and sampling settings."""

    policy: str
    prompts: str
    config: SamplingConfig
    responses: int = 5
    batch_size: int = 32

    def __post_init__(self) -> None:
        if self.responses < 2:
            raise UserError(
                f"--responses is {self.responses}; a group needs at least two responses"
            )
        if self.batch_size < 1:
            raise UserError(f"--sampling-batch-size is {self.batch_size}; it must be at least 1")


@dataclass(frozen=True)
class Adaptation:
    """The result: the numbers before and after, and a summary."""

    findings: Findings
    summary: str


@dataclass
class _Groups:
    """The source of the groups and the held-out prompts.

    Attributes:
        name: name of the file, for messages.
        file: None if the groups are still to be sampled.
        keys: the prompt of every group, in order.
        out: prompts held out; empty if other groups were given for evaluation.
        names, prompts: contents of a prompt file, for sampling.
    """

    name: str
    file: DataFile | None
    keys: list[str]
    out: set[str]
    names: list[str]
    prompts: list[Text]

    def split(self, file: DataFile) -> tuple[list[Row], DataFile | None]:
        """Return the rows to adapt to and the file of those held out."""
        placed = list(zip(file.rows, self.keys, strict=True))
        kept = [row for (_, row), key in placed if key not in self.out]
        out = tuple(entry for entry, key in placed if key in self.out)
        return kept, DataFile("held-out groups", file.source, "groups", out) if out else None


@dataclass(frozen=True)
class Request(TrainingRequest):
    """What to adapt, on which data, and what to measure it on; settings win over the method's.

    Attributes:
        method: a name in `methods.method.METHODS`, or `package.module:attribute`.
        samples: how to sample responses of the current policy; exactly one of groups and samples.
        eval_groups: as `eval_pairs`, of groups to measure on.
        holdout: share of the groups' prompts that is held out for measuring; 0.2 by default. Not
            with eval_groups.
        sight_pairs: pairs of each sight test before and after; 0 makes none.
    """

    method: str = "metarm"
    samples: PolicySamples | None = None
    eval_groups: Mapping[str, str] | None = None
    holdout: float | None = None
    sight_pairs: int = PAIRS


def adapt(request: Request, *, present: Present, bar: Bar = no_bar) -> Adaptation | None:
    """Adapt a reward model to responses of the current policy and measure it before and after.

    Training is that of `training.train` with groups. The output folder is created only on success;
    until then samples and checkpoints are in `.NAME.work` beside it, and repeating an interrupted
    call resumes from them.

    Args:
        present: writes the findings, see `Present`.
        bar: shows progress.

    Returns:
        The result; None on all but the main process.

    Raises:
        UserError: as `training.train`; a model without a trained score head; not exactly one of
            groups and samples; too few prompts to hold some out; rows that cannot be scored.
    """
    method, training = adaptable(request.method)
    _check_choices(request)
    samples, model = request.samples, request.model
    sampled = None if samples is None else samples.policy
    settings = {**method.settings, **request.settings}
    training = training.settled(settings)
    request = with_models(request, request.method, method, training, sampled=sampled)
    job = prepare(replace(request, settings=settings), training, command_name="adapt")
    eval_pairs, eval_groups = request.eval_pairs or {}, request.eval_groups or {}
    share = HOLDOUT if request.holdout is None else request.holdout
    source = _read(job, request.groups, samples, share=None if eval_groups else share)
    files = _files(job, eval_pairs, eval_groups)
    heldout = None if source.file is None else source.split(source.file)[1]
    _check_model(model, [*files, *([] if heldout is None else [heldout])], training.combine)
    main = PartialState().is_main_process
    record = _record(job, share, samples, eval_groups)
    if request.method != "metarm":  # work begun by earlier versions has no such entry
        record["method"] = request.method
    with open_work(job, record) as checkpoint:
        file = source.file if samples is None else _sample(job, samples, source, bar=bar)
        assert file is not None
        kept, out = source.split(file)
        if out is not None:
            files.append(out)
            if samples is not None:  # others were checked above
                _check_model(model, [out], training.combine)
        outcome = train_in_work(
            job, kept if training.takes_groups else None, checkpoint, evaluate=False
        )
        _free_memory()
        if not main:
            return None  # without a barrier: measuring may take longer than a barrier waits
        found = _measure(job, model, files, request.sight_pairs, bar=bar)
        used = len(kept) if training.takes_groups else 0
        how = _how(source, samples, used, 0 if out is None else len(out.rows), files)
        more = {"model": model, "meta": outcome.meta, "groups": how}
        tables = present(found, job.finished, more)
        outcome = replace(outcome, adapted=Adapted(how, verdict_words(found), tables))
        _write_groups(job, out)
        publish(job, model_card(outcome))
    return Adaptation(found, summary(outcome))


def _check_choices(request: Request) -> None:
    groups, samples = request.groups, request.samples
    if (groups is None) == (samples is None):
        word = "neither is" if groups is None else "both are"
        raise UserError(
            f"adapt needs responses of the current policy: give either --groups or --policy with "
            f"--prompts; {word} given"
        )
    if request.eval_groups and request.holdout is not None:
        raise UserError("--holdout and --eval-groups: give one; with the latter none is held out")
    if samples is not None and samples.config.temperature == 0:
        raise UserError(
            "temperature is 0.0; it must be above 0 here: all responses to a prompt would be the "
            "same, and adapt learns from how they differ"
        )
    if samples is not None and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "--policy: sampling needs a single process; call `shiftrm sample` first, then give its "
            "file as --groups"
        )


def _read(
    job: TrainingJob, groups: str | None, samples: PolicySamples | None, *, share: float | None
) -> _Groups:
    """Return groups or prompts, and the prompts held out (none if share is None)."""
    if samples is None:
        assert groups is not None
        source, names, prompts = groups, list[str](), list[Text]()
        file = read_data(groups, groups)
        if file.kind != "groups":
            raise UserError(f"{groups}: holds labelled pairs, not groups; give them as --pairs")
        rows = [row for _, row in file.rows]
        job.add_data("groups", groups, rows)
    else:
        source, file = samples.prompts, None
        names, prompts = read_prompts(source)
        rows = [{"prompt": prompt} for prompt in prompts]
        job.add_data("prompts", source, rows)
    keys = [prompt_key(row) for row in rows]
    seed = job.chosen.args.seed
    out = set[str]() if share is None else held_out(keys, share=share, seed=seed, source=source)
    return _Groups(source, file, keys, out, names, prompts)


def _record(
    job: TrainingJob,
    share: float,
    samples: PolicySamples | None,
    eval_groups: Mapping[str, str] | None,
) -> dict[str, Any]:
    """Return entries besides the training's that must match to resume an adaptation."""
    sampling = None
    if samples is not None:
        [prompts] = [data.sha256[:16] for data in job.data if data.name == "prompts"]
        sampling = {
            **asdict(samples),
            "policy_files": checkpoint_fingerprint(samples.policy)[:16],
            "seed": job.chosen.args.seed,
            "prompts_sha256": prompts,
        }
    return {"holdout": None if eval_groups else share, "sampling": sampling}


def _files(
    job: TrainingJob, eval_pairs: Mapping[str, str], eval_groups: Mapping[str, str]
) -> list[DataFile]:
    """Return what to measure on besides the held-out groups; the reference pairs come first."""
    files = [read_data(source, name or "held-out pairs") for name, source in eval_pairs.items()]
    for name, source in eval_groups.items():
        file = read_data(source, name or "held-out groups")
        if file.kind != "groups":
            raise UserError(f"{source}: holds labelled pairs; give them as --eval-pairs")
        if file.name in [other.name for other in files]:
            raise UserError(f"--eval-groups: {name!r} is also a name in --eval-pairs")
        job.add_data(f"eval groups {name}".strip(), source, [row for _, row in file.rows])
        files.append(file)
    return files


def _check_model(model: str, files: list[DataFile], combine: str | None) -> None:
    """Refuse early a model that is no reward model or does not fit, and rows it cannot score."""
    try:
        with task("loading the reward model", None):
            scorer = Scorer.from_pretrained(model)
    except UserError as error:
        if "score head" in str(error):
            raise UserError(
                f"{model}: has no score head, so it is not a trained reward model; make one with "
                "`shiftrm train`"
            ) from None
        raise
    check_head(combine, scorer.model)
    for file in files:
        encode_data(scorer, file)


def _sample(job: TrainingJob, samples: PolicySamples, source: _Groups, *, bar: Bar) -> DataFile:
    """Return the groups, sampled into the work folder or found there."""
    path = job.work / SAMPLES
    if not path.exists():
        with task("loading the policy", None):
            model, tokenizer = load_policy(samples.policy)
        model.to(PartialState().device)
        room = samples.config.max_new_tokens
        # Repeated below, but only here can errors name the row.
        encode_prompts(model, tokenizer, source.prompts, room=room, names=source.names)
        if PartialState().is_main_process:
            warn_of_joined_ends(tokenizer, source.prompts, source=samples.prompts)
        with bar("sampling", len(source.prompts)) as advance:
            sample_groups(
                model,
                tokenizer,
                source.prompts,
                path,
                Draws(
                    samples.config,
                    samples.responses,
                    batch_size=samples.batch_size,
                    seed=job.chosen.args.seed,
                ),
                progress=advance,
            )
        del model
        _free_memory()
    file = read_data(str(path), SAMPLES)
    job.add_data("groups", str(path), [row for _, row in file.rows])
    job.data[-1].source = SAMPLES  # its name in the output
    return file


def _free_memory() -> None:
    """Release the accelerator memory of a deleted model."""
    gc.collect()
    if torch.accelerator.is_available():
        torch.accelerator.empty_cache()


def _measure(
    job: TrainingJob, before: str, files: list[DataFile], sight_pairs: int, *, bar: Bar
) -> Findings:
    """Diagnose the model before and after, on data it was not trained on."""

    def load(path: str) -> Scorer:
        scorer = Scorer.from_pretrained(path)
        scorer.model.to(PartialState().device)
        return scorer

    models = {"before": before, "after": str(job.finished)}
    kinds = with_own(getattr(job.chosen.args, "contrast_negatives", None))
    sight: dict[str, Any] = {"sight_pairs": sight_pairs, "sight_kinds": kinds}
    size = job.chosen.args.per_device_eval_batch_size
    found = find(models, files, load=load, batch_size=size, bar=bar, **sight)
    meta_steps = hasattr(job.chosen.args, "meta_step")
    change = adaptation_verdict(found.comparisons, found.diagnoses, meta_steps=meta_steps)
    return replace(found, change=change)


def _how(
    source: _Groups, samples: PolicySamples | None, kept: int, out: int, files: list[DataFile]
) -> str:
    """Describe the groups the model was adapted to and those held out."""
    origin = (
        f"{source.name}"
        if samples is None
        else f"{samples.policy}, which answered each prompt of {source.name} {samples.responses} "
        "times"
    )
    text = f"Adapted to {kept} groups of {origin}"
    if not kept:
        text = f"Trained on the pairs alone, not on the groups of {origin}"
    if source.out:
        total = len(set(source.keys))
        return (
            f"{text}; {out} groups, those of {len(source.out)} of the {total} prompts, were held "
            f"out to measure on ({HELD_OUT})."
        )
    text += "; before and after are measured on other groups."
    for file in files:
        if file.kind == "groups":
            keys = [prompt_key(row) for _, row in file.rows]
            if shared := len({*keys} & {*source.keys}):
                text += (
                    f" {shared} of the {len(set(keys))} prompts of {file.source} are among those "
                    "adapted to as well."
                )
    return text


def _write_groups(job: TrainingJob, out: DataFile | None) -> None:
    """Write the held-out and the sampled groups into the unfinished result folder."""
    if out is not None:
        write_jsonl(job.finished / HELD_OUT, (row for _, row in out.rows))
    if (job.work / SAMPLES).exists():
        shutil.copyfile(job.work / SAMPLES, job.finished / SAMPLES)


def verdict_words(found: Findings) -> str:
    """Return `Before and after: louder, not sharper.` and its numbers, one per line."""
    assert found.change is not None
    change = found.change
    return "\n".join(
        [f"Before and after: {change.word}.", change.sentence, *change.warnings, *change.advice]
    )
