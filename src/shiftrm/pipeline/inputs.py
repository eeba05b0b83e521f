"""Checks, before anything runs, of the files and models that a recipe names."""

import hashlib
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

from shiftrm.config import from_mapping
from shiftrm.data.named import COMMON, FORMATS
from shiftrm.errors import UserError, suggest
from shiftrm.files import file_hash
from shiftrm.models.loading import checkpoint_fingerprint
from shiftrm.pipeline.data_sets import place_of
from shiftrm.pipeline.experiment import Experiment
from shiftrm.pipeline.sections import Source

__all__ = ["KINDS", "check_data", "check_judge", "check_models", "input_hashes"]

KINDS = {
    "demonstrations": "demonstrations",
    "pairs": "pairs",
    "heldout": "pairs",
    "prompts": "prompts",
    "eval_prompts": "prompts",
}
"""The kind of rows that each data set of a recipe must give."""

FILES = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".gz", ".zst", ".arrow")
"""Endings of names that cannot be data sets on the hub."""


def check_data(recipe: Experiment) -> None:
    """Refuse unknown formats and options, and local files that are not there."""
    for name, source in _sources(recipe):
        try:
            _check_source(source, KINDS[name])
        except UserError as error:
            raise UserError(f"data.{name}: {error}") from None


def _sources(recipe: Experiment) -> Iterator[tuple[str, Source]]:
    """Yield the data sets that the run reads, by name."""
    for name in KINDS if recipe.data is not None else ():
        source = getattr(recipe.data, name)
        if source is not None and not (name == "demonstrations" and recipe.sft is None):
            yield name, source


def _check_source(source: Source, kind: str) -> None:
    place = place_of(asdict(source))  # refuses an unknown format
    form = FORMATS.get(source.format)
    if kind not in form.kinds:
        raise UserError(f"{source.format} gives no {kind}; it gives {', '.join(form.kinds)}")
    known = list(form.option_help())
    for option in source.options:
        if option not in known:
            raise UserError(f"{source.format} has no option {option!r}{suggest(option, known)}")
    own = {key: value for key, value in source.options.items() if key not in COMMON}
    from_mapping(form.options, own)
    file = place.partition(":")[0]
    on_hub = file.count("/") == 1 and not file.startswith((".", "/", "~"))
    if not Path(file).exists() and (not on_hub or file.endswith(FILES)):
        raise UserError(f"{place}: no such file or folder, and not a name on the hub")


def check_models(recipe: Experiment) -> None:
    """Refuse folders that are missing or hold another kind of model."""
    from shiftrm.models.templates import PACKAGED
    from shiftrm.policies.loading import check_policy
    from shiftrm.policies.text_rewards import check_watch

    model = recipe.model
    if model is not None:
        _named("model", lambda: check_policy(model, "model"))
    template = recipe.chat_template
    if template is not None and recipe.sft is not None:
        known = sorted(path.stem for path in PACKAGED.glob("*.jinja"))
        if template not in known and not Path(template).exists():
            raise UserError(
                f"chat_template is {template!r}: no such file, and not one of this package "
                f"({', '.join(known)})"
            )
    gold = recipe.evaluation.gold
    if gold is not None:
        _named("evaluation.gold", lambda: check_watch(gold))


def check_judge(recipe: Experiment) -> None:
    """Refuse a judge that cannot be opened: its key, template or folder. Nothing is asked."""
    judge = recipe.judge
    if judge.kind == "reward-model":
        from shiftrm.policies.loading import check_reward_model

        _named("judge.model", lambda: check_reward_model(str(judge.model), "judge.model"))
    if judge.kind == "endpoint":
        from shiftrm.pipeline.judging import open_recipes_judge

        _named("judge", lambda: open_recipes_judge(asdict(judge), cache=None))
    if recipe.sampler == "vllm":
        from shiftrm.models.vllm_server import find_vllm

        _named("sampler", find_vllm)


def _named(setting: str, check) -> None:  # type: ignore[no-untyped-def]
    try:
        check()
    except UserError as error:
        raise UserError(f"{setting}: {error}") from None


def input_hashes(recipe: Experiment, output: Path) -> dict[str, str]:
    """Return a hash of every local file, data folder and model that the recipe names, by setting.

    A repeated run compares them: its finished stages were made from these contents. A folder that
    also holds the run's output is left out.
    """
    judge, models = recipe.judge, {"model": recipe.model, "evaluation.gold": recipe.evaluation.gold}
    if judge.kind == "reward-model":
        models["judge.model"] = judge.model
    files = {"chat_template": recipe.chat_template}
    if judge.kind == "endpoint":
        files["judge.template"] = judge.template
    data = {
        f"data.{name}": place_of(asdict(source)).partition(":")[0]
        for name, source in _sources(recipe)
    }
    found = {name: checkpoint_fingerprint(path)[:16] for name, path in models.items() if path}
    for name, place in {**files, **data}.items():
        path = Path(place) if place is not None else None
        if path is None or (name in files and not path.is_file()):
            continue
        if output.resolve() != path.resolve() and path.resolve() not in output.resolve().parents:
            found[name] = _hash_of_files(path)
    return {name: value for name, value in found.items() if value}


def _hash_of_files(path: Path) -> str:
    """Return 16 digits of a hash of a file, or of a folder's files; "" if there is none."""
    files = [path] if path.is_file() else sorted(p for p in path.rglob("*") if p.is_file())
    shown = [p for p in files if not any(n.startswith(".") for n in p.relative_to(path).parts)]
    digest = hashlib.sha256()
    for file in shown:
        digest.update(f"{file.relative_to(path)} {file_hash(file)}".encode())
    return digest.hexdigest()[:16] if shown else ""
