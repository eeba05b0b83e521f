"""Dialogues as chat templates take them, and where two dialogues part."""

from shiftrm.data.loaded import Outcome, demonstration_of, pair_of, trimmed
from shiftrm.models.rendering import Messages

__all__ = ["alternating", "last_answer", "parted"]


def alternating(messages: Messages) -> Messages | str:
    """Messages that alternate, the user's first, after one of the system's at most; or why not.

    Messages of one role in a row become one, with a blank line between them; white space at the
    ends of each is cut off. The last message may be of either role, and empty.

    Reasons: `no_messages`, `begins_with_assistant`, `system_inside`, `empty_turn`.
    """
    merged: Messages = []
    for item in messages:
        role, content = item["role"], trimmed(item["content"])
        if merged and merged[-1]["role"] == role:
            content = "\n\n".join(filter(None, (merged.pop()["content"], content)))
        merged.append({"role": role, "content": content})
    if merged and merged[0] == {"role": "system", "content": ""}:
        merged = merged[1:]
    spoken = merged[1:] if merged and merged[0]["role"] == "system" else merged
    if not spoken:
        return "no_messages"
    if any(item["role"] == "system" for item in spoken):
        return "system_inside"
    if spoken[0]["role"] != "user":
        return "begins_with_assistant"
    if not all(item["content"] for item in spoken[:-1]):
        return "empty_turn"
    return merged


def parted(chosen: Messages, rejected: Messages, *, responses: str = "any") -> Outcome:
    """A preference row of two whole dialogues that end with the assistant; or why not.

    The prompt ends where the last assistant's message begins that both dialogues start alike up to:
    the message where they part, if it is the assistant's, else the assistant's one before.

    Args:
        chosen, rejected: alternating messages.
        responses: "single" drops a pair whose sides are more than one message.

    Reasons: `equal_sides`, `no_shared_prompt`, `empty_response`, `several_turns`.
    """
    if chosen == rejected:
        return "equal_sides"
    shared = 0
    while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
        shared += 1
    for cut in range(shared, 0, -1):
        starts = [side[cut]["role"] for side in (chosen, rejected) if cut < len(side)]
        if starts == ["assistant", "assistant"]:
            break
    else:
        return "no_shared_prompt"
    if responses == "single" and max(len(chosen), len(rejected)) > cut + 1:
        return "several_turns"
    return pair_of(chosen[:cut], chosen[cut:], rejected[cut:])


def last_answer(messages: Messages) -> Outcome:
    """The last message as a demonstration, or why there is none."""
    if messages[-1]["role"] != "assistant":
        return "ends_with_human"
    return demonstration_of(messages[:-1], messages[-1:])
