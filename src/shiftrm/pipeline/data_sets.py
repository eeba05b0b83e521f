"""Reading a recipe's data sets, and splitting them by prompt."""

from collections.abc import Mapping
from typing import Any

from shiftrm.data.loaded import Loaded
from shiftrm.data.named import FORMATS, load
from shiftrm.data.prompt_keys import prompt_key
from shiftrm.data.splits import limited, split_by_prompt, without_evaluated
from shiftrm.errors import UserError

__all__ = ["assembled", "place_of", "read_source"]


def place_of(spec: Mapping[str, Any]) -> str:
    """Return the place of a data set: the recipe's, or by default its publisher's.

    Args:
        spec: `sections.Source` as plain data.

    Raises:
        UserError: an unknown format, or one without a place of its own.
    """
    hub = FORMATS.get(spec["format"]).hub
    if spec["source"] is not None:
        return str(spec["source"])
    if not hub:
        raise UserError(f"format {spec['format']} needs a source: a file, a folder or a hub name")
    return hub[0]


def read_source(spec: Mapping[str, Any], kind: str) -> Loaded:
    """Return rows of one kind ("pairs", "prompts" or "demonstrations"), and the dropped ones."""
    place = place_of(spec)
    return load(spec["format"], place, kind=kind, split=spec["split"], **spec["options"])


def assembled(settings: Mapping[str, Any], *, seed: int) -> dict[str, Loaded]:
    """Return all data sets of a run by name, as its stages read them; nothing is written.

    Args:
        settings: of the stage "data": `sections.DataSettings` and what the plan adds.
        seed: of splits and draws.

    Returns:
        No unit of "heldout" or "eval_prompts" is in another of them.
    """
    training = {"pairs": read_source(settings["pairs"], "pairs")}
    training["prompts"] = _distinct(read_source(settings["prompts"], "prompts"))
    if settings["demonstrations_needed"]:
        training["demonstrations"] = read_source(settings["demonstrations"], "demonstrations")
    measured = {}
    for name, source, kind in (
        ("heldout", "pairs", "pairs"),
        ("eval_prompts", "prompts", "prompts"),
    ):
        if settings[name] is not None:
            measured[name] = read_source(settings[name], kind)
        else:
            training[source], measured[name] = split_by_prompt(
                training[source], share=settings["heldout_share"], seed=seed
            )
    measured["eval_prompts"] = _distinct(measured["eval_prompts"])
    limits = {"heldout": settings["max_heldout"], "eval_prompts": settings["eval_prompts_count"]}
    for name, loaded in measured.items():
        measured[name] = _at_most(loaded, limits[name], seed)
    evaluated = [loaded.rows for loaded in measured.values()]
    for name, loaded in training.items():
        clean = without_evaluated(loaded, *evaluated)
        training[name] = _at_most(clean, settings[f"max_{name}"], seed)
    return training | measured


def _distinct(loaded: Loaded) -> Loaded:
    """Return each prompt once."""
    seen: dict[str, int] = {}
    for number, row in enumerate(loaded.rows):
        seen.setdefault(prompt_key(row["prompt"]), number)
    kept = set(seen.values())
    found = Loaded(dropped=list(loaded.dropped))
    for number, (row, place) in enumerate(zip(loaded.rows, loaded.places, strict=True)):
        if number in kept:
            found.rows.append(row)
            found.places.append(place)
        else:
            found.drop(place, "same_prompt")
    return found


def _at_most(loaded: Loaded, limit: int | None, seed: int) -> Loaded:
    return loaded if limit is None else limited(loaded, limit=limit, seed=seed)
