"""PKU-SafeRLHF (PKU-Alignment/PKU-SafeRLHF): two responses, judged for help and for harm apart.

Columns read: `prompt`, `response_0`, `response_1`, `better_response_id` (the more helpful one),
`safer_response_id` (the more harmless one), `is_response_0_safe`, `is_response_1_safe`. The two ids
often disagree, so the option must be given: `preference=helpful` or `harmless`.
"""

from dataclasses import dataclass

from shiftrm.data.loaded import (
    KINDS,
    Options,
    Outcome,
    Outcomes,
    demonstrations_of,
    each,
    message,
    option,
    pair_of,
    text_of,
    trimmed,
)
from shiftrm.data.named import FORMATS, Format
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns

__all__ = ["HUB_NAME", "PREFERENCES", "PKUOptions", "pku_pair", "pku_prompt", "read_pku"]

HUB_NAME = "PKU-Alignment/PKU-SafeRLHF"

PREFERENCES = {"helpful": "better_response_id", "harmless": "safer_response_id"}

SAFE = ("is_response_0_safe", "is_response_1_safe")


@dataclass(frozen=True)
class PKUOptions(Options):
    """Options of `read_pku`."""

    preference: str = option(
        "",
        "helpful or harmless; required for pairs and demonstrations, as the two often disagree",
        choices=tuple(PREFERENCES),
    )


def pku_pair(row: Row, where: str, *, preference: str) -> Outcome:
    """Map one row to a conversational preference row, or say why not.

    Reasons: `empty_prompt`, `empty_response`, `equal_sides`, `label_against_safety` (the response
    that is called the more harmless one is unsafe and the other one safe).

    Args:
        preference: a key of `PREFERENCES`.

    Raises:
        UserError: a missing column or a value of the wrong type.
    """
    column = PREFERENCES[preference]
    require_columns(row, (column,), where)
    prompt = pku_prompt(row, where)
    responses = [trimmed(text_of(row, f"response_{number}", where)) for number in (0, 1)]
    better = row[column]
    if isinstance(better, bool) or better not in (0, 1):
        raise UserError(f"{where}: column {column!r} is {better!r:.40}; expected 0 or 1")
    if isinstance(prompt, str):
        return prompt
    if preference == "harmless":
        safe = [row.get(name) for name in SAFE]
        if safe[better] is False and safe[1 - better] is True:
            return "label_against_safety"
    chosen, rejected = ([message("assistant", responses[n])] for n in (better, 1 - better))
    return pair_of(prompt["prompt"], chosen, rejected)


def pku_prompt(row: Row, where: str) -> Outcome:
    """The prompt of one row; the reason `empty_prompt`."""
    prompt = trimmed(text_of(row, "prompt", where))
    return {"prompt": [message("user", prompt)]} if prompt else "empty_prompt"


def read_pku(source: str, kind: str, split: str, options: PKUOptions) -> Outcomes:
    """Outcomes; as a demonstration, the preferred response.

    Raises:
        UserError: pairs or demonstrations without a `preference`.
    """
    rows = iterate_rows(source, split=split)
    if kind == "prompts":
        return each(pku_prompt, rows)
    if not options.preference:
        raise UserError(
            "preference is not given; give preference=helpful (better_response_id) or "
            "preference=harmless (safer_response_id): the two often disagree"
        )
    pairs = each(lambda row, where: pku_pair(row, where, preference=options.preference), rows)
    return pairs if kind == "pairs" else demonstrations_of(pairs)


FORMATS.register("pku")(
    Format(
        about="PKU-SafeRLHF: two responses, judged for help and for harm apart",
        kinds=KINDS,
        hub=(HUB_NAME,),
        options=PKUOptions,
        read=read_pku,
    )
)
