"""TRL settings that `shiftrm sft` and `shiftrm optimise` reject; imports no library."""

__all__ = ["refused"]

NOT_TRUNCATED = "rows longer than max_length are dropped and counted, not truncated"
ONE_REFERENCE = "the reference stays as it is; give --reference"
ONE_REWARD = "there is one reward model, given by --reward"

_REFUSED: dict[str, dict[str, str]] = {
    "sft": {
        "truncation_mode": NOT_TRUNCATED,
        "dataset_text_field": "rows have prompt and completion, or messages",
        "dataset_kwargs": "rows have prompt and completion, or messages",
        "assistant_only_loss": "only the assistant's turns are learnt anyway",
    },
    "dpo": {
        "truncation_mode": NOT_TRUNCATED,
        "sync_ref_model": ONE_REFERENCE,
        "ref_model_mixup_alpha": ONE_REFERENCE,
        "ref_model_sync_steps": ONE_REFERENCE,
    },
    "rloo": {
        "reward_weights": ONE_REWARD,
        "sync_ref_model": ONE_REFERENCE,
        "ref_model_mixup_alpha": ONE_REFERENCE,
        "ref_model_sync_steps": ONE_REFERENCE,
    },
}


def refused(method: str) -> dict[str, str]:
    """Return the fields of the method's configuration that its command rejects, with reasons."""
    return _REFUSED.get("rloo" if method == "grpo" else method, {})
