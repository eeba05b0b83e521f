"""Normalises dialogues for chat templates, and splits two dialogues where they diverge."""

from shiftrm.data.loaded import Outcome, demonstration_of, pair_of, trimmed
from shiftrm.models.rendering import Messages


def alternating(messages: Messages) -> Messages | str:
    """Return alternating messages, the user's first, after at most one system message; or a reason.

    Consecutive messages of one role are joined with a blank line; white space at the ends of each
    is stripped. The last message may have either role and may be empty.

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
    """Return a preference row made of two dialogues that end with the assistant; or a reason.

    The prompt ends before the last assistant message up to which both dialogues are the same: the
    message where they diverge if that is the assistant's, otherwise the assistant message before.

    Args:
        chosen, rejected: alternating messages.
        responses: "single" drops pairs with a side of more than one message.

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
    """Return the last message as a demonstration, or a reason."""
    if messages[-1]["role"] != "assistant":
        return "ends_with_human"
    return demonstration_of(messages[:-1], messages[-1:])
