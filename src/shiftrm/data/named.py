"""The public data sets by name: which rows each gives, its options, and one way to read them.

loaded = load("hh_rlhf", "Anthropic/hh-rlhf", kind="pairs", subset="helpful")
loaded.rows, loaded.counts()
"""

import dataclasses
import typing
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from shiftrm.config import from_mapping
from shiftrm.data import hh_rlhf, oasst1, pku, preference_sets, sharegpt, summarize
from shiftrm.data.loaded import KINDS, Loaded, Outcomes, collect
from shiftrm.data.splits import deduplicated, limited
from shiftrm.errors import UserError, suggest

__all__ = ["FORMATS", "KINDS", "Format", "Loaded", "load", "parse_options"]

COMMON = {
    "limit": "at most N rows, drawn by the seed (default: all)",
    "seed": "of what is drawn (default: 0)",
}
"""Options that every format has."""


@dataclass(frozen=True)
class Format:
    """One public schema."""

    about: str
    kinds: tuple[str, ...]
    hub: tuple[str, ...]  # names it has on the hub, as `load` takes them
    options: type  # a dataclass; `loaded.option` declares each field
    read: Callable[[str, str, str, Any], Outcomes]  # source, kind, split, options
    splits: dict[str, dict[str, str]] = field(default_factory=dict)
    """Hub name -> kind -> split to read, where that is not `train`."""
    rows_say_split: bool = False  # so that a single file can hold several

    def default_split(self, source: str, kind: str) -> str:
        """The split to read when none is said."""
        return self.splits.get(source.partition(":")[0], {}).get(kind, "train")

    def option_help(self) -> dict[str, str]:
        """Option -> what it means, those of every format last."""
        fields = dataclasses.fields(self.options)
        return {field.name: field.metadata["help"] for field in fields} | COMMON


FORMATS: dict[str, Format] = {
    "hh_rlhf": Format(
        about="Anthropic HH-RLHF: dialogues, helpful and harmless",
        kinds=KINDS,
        hub=(hh_rlhf.HUB_NAME,),
        options=hh_rlhf.HHOptions,
        read=hh_rlhf.read_hh,
    ),
    "summarize": Format(
        about="OpenAI's comparisons of summaries of Reddit posts, and their mirrors",
        kinds=KINDS,
        hub=summarize.HUB_NAMES,
        options=summarize.SummaryOptions,
        read=summarize.read_comparisons,
        rows_say_split=True,
    ),
    "tldr": Format(
        about="Reddit posts with a TL;DR, to fine-tune on",
        kinds=("demonstrations", "prompts"),
        hub=summarize.POSTS_HUB_NAMES,
        options=summarize.SummaryOptions,
        read=summarize.read_posts,
    ),
    "sharegpt": Format(
        about="ShareGPT: conversations with ChatGPT, to fine-tune on",
        kinds=("demonstrations", "prompts"),
        hub=(sharegpt.HUB_NAME,),
        options=sharegpt.ShareGPTOptions,
        read=sharegpt.read_sharegpt,
    ),
    "oasst1": Format(
        about="OpenAssistant: trees of messages in many languages, answers ranked",
        kinds=KINDS,
        hub=(oasst1.HUB_NAME,),
        options=oasst1.OASSTOptions,
        read=oasst1.read_oasst,
    ),
    "pku": Format(
        about="PKU-SafeRLHF: two responses, judged for help and for harm apart",
        kinds=KINDS,
        hub=(pku.HUB_NAME,),
        options=pku.PKUOptions,
        read=pku.read_pku,
    ),
    "ultrafeedback": Format(
        about="UltraFeedback: openbmb's rated completions, or binarized",
        kinds=KINDS,
        hub=(
            preference_sets.BINARIZED,
            preference_sets.ULTRAFEEDBACK,
            "trl-lib/ultrafeedback_binarized",
        ),
        options=preference_sets.UltraFeedbackOptions,
        read=preference_sets.read_ultrafeedback,
        splits={
            preference_sets.BINARIZED: {
                "pairs": "train_prefs",
                "prompts": "train_prefs",
                "demonstrations": "train_sft",
            }
        },
    ),
    "preference": Format(
        about="any data in TRL's columns: prompt, chosen, rejected; prompt, completion; messages",
        kinds=KINDS,
        hub=(),
        options=preference_sets.PreferenceOptions,
        read=preference_sets.read_preferences,
    ),
}
"""The public schemas, by name."""


def load(
    format: str,
    source: str | Path,
    *,
    kind: str,
    split: str | None = None,
    progress: Callable[[int], None] | None = None,
    **options: Any,
) -> Loaded:
    """Read a public data set.

    Args:
        format: a name in `FORMATS`.
        source: a file, a folder or a hub name, as `sources.iterate_rows` reads them.
        kind: one of `KINDS`; not every format offers each.
        split: of a folder or hub name; None takes the format's own for this kind.
        progress: called with the number of outcomes so far.
        options: the format's own (`FORMATS[format].option_help()`), and `limit` and `seed`.

    Returns:
        The rows, each once, and those dropped, with where and why.

    Raises:
        UserError: an unknown format, kind or option, a source that cannot be read, a row of
            another schema throughout, or no row left.
    """
    form = _format(format)
    if kind not in form.kinds:
        hint = suggest(kind, list(form.kinds))
        raise UserError(f"{format}: gives no {kind!r}; it gives {', '.join(form.kinds)}{hint}")
    limit, seed = _common({name: options[name] for name in COMMON if name in options}, format)
    own = {f.name for f in dataclasses.fields(form.options)}
    options = {name: value for name, value in options.items() if name in own or name not in COMMON}
    try:
        settings: Any = from_mapping(form.options, options)
    except UserError as error:
        raise UserError(f"{format}: {error}") from None
    split = split or form.default_split(str(source), kind)
    outcomes = form.read(str(source), kind, split, settings)
    loaded = deduplicated(collect(_counted(outcomes, progress)))
    if limit is not None:
        loaded = limited(loaded, limit=limit, seed=seed)
    if not loaded.rows:
        if errors := [row["error"] for row in loaded.dropped if "error" in row]:
            raise UserError(errors[0])
        reasons = ", ".join(f"{n} {reason}" for reason, n in loaded.counts().items())
        raise UserError(
            f"{source}: no row is left as {kind} of {format} ({reasons or 'there are none'}); "
            "check the format, the split and the options"
        )
    return loaded


def parse_options(format: str, words: list[str]) -> dict[str, Any]:
    """Options as the command line gives them, `name=value`, with the types that they have.

    Raises:
        UserError: a word that is no option, or a value of another type.
    """
    form = _format(format)
    hints = typing.get_type_hints(form.options) | {"limit": int, "seed": int}
    options: dict[str, Any] = {}
    for word in words:
        name, equals, text = word.partition("=")
        if not equals:
            raise UserError(f"{word!r} is no option; write name=value, as limit=1000")
        if name not in hints:
            raise UserError(f"{format}: no option {name!r}{suggest(name, list(hints))}")
        options[name] = _typed(hints[name], text, f"{format}: {name}")
    return options


def _format(name: str) -> Format:
    if name not in FORMATS:
        raise UserError(f"no format {name!r}{suggest(name, list(FORMATS))}")
    return FORMATS[name]


def _common(given: dict[str, Any], format: str) -> tuple[int | None, int]:
    for name, value in given.items():
        if isinstance(value, bool) or not isinstance(value, int | None):
            raise UserError(f"{format}: {name} is {value!r}; expected a whole number")
    return given.get("limit"), given.get("seed") or 0


def _counted(outcomes: Outcomes, progress: Callable[[int], None] | None) -> Iterator[Any]:
    for number, item in enumerate(outcomes, start=1):
        yield item
        if progress is not None and number % 256 == 0:
            progress(number)


def _typed(hint: Any, text: str, what: str) -> Any:
    """Text stays text (`lang=no` is Norwegian, not false); the rest is what its type reads."""
    if hint is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"{what} is {text!r}; say true or false")
        return text.lower() == "true"
    if hint in (int, float):
        try:
            return hint(text)
        except ValueError:
            kind = "a whole number" if hint is int else "a number"
            raise UserError(f"{what} is {text!r}; expected {kind}") from None
    return text
