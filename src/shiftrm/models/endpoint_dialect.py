"""Models behind one API that want their parameters under other names."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Dialect:
    """How one model wants to be asked.

    Attributes:
        completion_tokens: `max_completion_tokens` in the place of `max_tokens`, as OpenAI's models
            that reason want it.
        own_temperature: no `temperature`, which those refuse, too.
    """

    completion_tokens: bool = False
    own_temperature: bool = False

    def after(self, refusal: str) -> "Dialect":
        """The dialect once the server has refused a request in these words."""
        words = refusal.lower()
        unsupported = any(word in words for word in ("unsupported", "not support", "instead"))
        other = unsupported and "max_tokens" in words and "max_completion_tokens" in words
        default = unsupported and "temperature" in words
        return Dialect(self.completion_tokens or other, self.own_temperature or default)

    def spoken(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """Parameters as this model takes them."""
        found = dict(parameters)
        if self.completion_tokens and "max_tokens" in found:
            limit = found.pop("max_tokens")
            found.setdefault("max_completion_tokens", limit)
        if self.own_temperature:
            found.pop("temperature", None)
        return found
