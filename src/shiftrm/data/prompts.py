"""Prompts for a policy to answer, checked on reading."""

from pathlib import Path

from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.rendering import Text, check_text

__all__ = ["read_prompts"]


def read_prompts(path: str | Path) -> tuple[list[str], list[Text]]:
    """Read rows with a column `prompt`, text or chat messages.

    Args:
        path: what `sources.iterate_rows` reads.

    Returns:
        How errors may call each prompt (file and row), and the prompts.

    Raises:
        UserError: missing or malformed file, no rows, or a prompt that is no text.
    """
    names, prompts = [], []
    for where, row in iterate_rows(path, required=("prompt",)):
        check_text(row["prompt"], f"{where}: column 'prompt'")
        names.append(f"{where}: the prompt")
        prompts.append(row["prompt"])
    if not prompts:
        raise UserError(f"{path}: the file has no prompts")
    return names, prompts
