"""Keys that tell whether two prompts are the same, and draws that depend on a text alone."""

import json
from hashlib import sha256

from shiftrm.models.rendering import Text
from shiftrm.models.templates import text_of


def prompt_key(prompt: Text) -> str:
    """Return a key of a prompt: text with normalised spaces, or a chat of such texts as JSON.

    Prompts that differ in spaces only, in how a message is divided into parts, or in fields that
    are null have one key.
    """
    if isinstance(prompt, str):
        return " ".join(prompt.split())
    plain = []
    for number, message in enumerate(prompt, start=1):
        given = {field: value for field, value in message.items() if value is not None}
        plain.append(given | {"content": " ".join(text_of(message, number).split())})
    return json.dumps(plain, sort_keys=True, ensure_ascii=False)


def hashed_uniform(seed: int, *parts: str) -> float:
    """Return a number in [0, 1) that depends only on the seed and the texts."""
    digest = sha256("\0".join((str(seed), *parts)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") / 2.0**64
