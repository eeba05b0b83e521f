"""PKU-SafeRLHF (PKU-Alignment/PKU-SafeRLHF): responses judged for helpfulness and harmlessness.

Columns read: `prompt`, `response_0`, `response_1`, `better_response_id` (the more helpful one),
`safer_response_id` (the more harmless one), `is_response_0_safe`, `is_response_1_safe`. The two ids
often disagree, so the option must be given: `preference=helpful` or `harmless`.
"""

from dataclasses import dataclass

from shiftrm.data.loaded import Options, Outcome, bit_of, message, option, pair_of, text_of, trimmed
from shiftrm.data.named import FORMATS, Format
from shiftrm.errors import UserError
from shiftrm.files import Row

PREFERENCES = {"helpful": "better_response_id", "harmless": "safer_response_id"}

SAFE = ("is_response_0_safe", "is_response_1_safe")


@dataclass(frozen=True)
class PKUOptions(Options):
    """Options of PKU-SafeRLHF."""

    preference: str = option(
        "",
        "helpful or harmless; required for pairs and demonstrations, as the two often disagree",
        choices=tuple(PREFERENCES),
    )

    def check(self, kind: str) -> None:
        if kind != "prompts" and not self.preference:
            raise UserError(
                "preference is not given; give preference=helpful (better_response_id) or "
                "preference=harmless (safer_response_id): the two often disagree"
            )


def pku_pair(row: Row, where: str, *, preference: str) -> Outcome:
    """Map one row to a conversational preference row, or return the reason for dropping it.

    Reasons: those of `pair_of`, and `label_against_safety` (the response that is called the more
    harmless one is unsafe and the other one safe).

    Args:
        preference: a key of `PREFERENCES`.
    """
    better = bit_of(row, PREFERENCES[preference], where)
    prompt = pku_prompt(row, where)
    responses = [trimmed(text_of(row, f"response_{number}", where)) for number in (0, 1)]
    if isinstance(prompt, str):
        return prompt
    if preference == "harmless":
        safe = [row.get(name) for name in SAFE]
        if safe[better] is False and safe[1 - better] is True:
            return "label_against_safety"
    sides = ([message("assistant", responses[n])] for n in (better, 1 - better))
    return pair_of(prompt["prompt"], *sides)


def pku_prompt(row: Row, where: str) -> Outcome:
    """Return the prompt of one row, or `empty_prompt`."""
    prompt = trimmed(text_of(row, "prompt", where))
    return {"prompt": [message("user", prompt)]} if prompt else "empty_prompt"


FORMATS.register("pku")(
    Format(
        about="PKU-SafeRLHF: two responses, judged separately for helpfulness and harmlessness",
        hub=("PKU-Alignment/PKU-SafeRLHF",),
        options=PKUOptions,
        mappers={
            "pairs": lambda row, where, o: pku_pair(row, where, preference=o.preference),
            "prompts": lambda row, where, _: pku_prompt(row, where),
        },
    )
)
