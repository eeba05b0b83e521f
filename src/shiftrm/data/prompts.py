"""Prompts for a policy to answer, checked when read."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from shiftrm.data.sources import read_rows
from shiftrm.files import Row, require_columns
from shiftrm.models.rendering import Text, check_text, encode, encode_prompt

logger = logging.getLogger(__name__)

FIRST_WORDS = ("The", "I", "a")
"""Typical first words of responses."""


def read_prompts(path: str | Path) -> tuple[list[str], list[Text]]:
    """Read rows with a column `prompt`, text or chat messages.

    Args:
        path: any source that `sources.iterate_rows` reads.

    Returns:
        A name for each prompt in error messages (file and row), and the prompts.

    Raises:
        UserError: missing or malformed file, no rows, or a prompt that is not text.
    """
    names: list[str] = []

    def check(row: Row, where: str) -> None:
        require_columns(row, ("prompt",), where)
        check_text(row["prompt"], f"{where}: column 'prompt'")
        names.append(f"{where}: the prompt")

    rows = read_rows(path, check, what="prompts")
    return names, [row["prompt"] for row in rows]


def count_joined_ends(tokenizer: Any, prompts: Sequence[Text]) -> int:
    """Count prompts that end in white space which the tokenizer joins with the next word.

    Most tokenizers merge a space into the following word. "Answer: " then ends in a lone space
    token, which the policy has rarely seen, and tokenising prompt and response as one text gives
    different tokens at the boundary than the policy sampled.
    """
    return sum(_joins(tokenizer, prompt) for prompt in prompts)


def _joins(tokenizer: Any, prompt: Text) -> bool:
    if not isinstance(prompt, str) or not prompt or prompt == prompt.rstrip():
        return False  # a chat ends as its template does
    alone = encode_prompt(tokenizer, prompt)
    return any(
        encode(tokenizer, prompt, word, finished=False)[: len(alone)] != alone
        for word in FIRST_WORDS
    )


def warn_of_joined_ends(tokenizer: Any, prompts: Sequence[Text], *, source: str) -> None:
    """Log one warning if `count_joined_ends` finds any prompts.

    Args:
        source: name of the prompts in the warning, such as their file.
    """
    count = count_joined_ends(tokenizer, prompts)
    if count:
        logger.warning(
            "%s: %d of %d prompts end in white space, which the tokenizer joins with the first "
            "word of a response: the policy has to answer after a token that it has seldom seen; "
            'end them without it ("Answer:" instead of "Answer: ")',
            source,
            count,
            len(prompts),
        )
