"""Settings of TRL that `shiftrm sft` and `shiftrm optimise` do not take; loads no library."""

__all__ = ["refused"]

NOT_TRUNCATED = "what is longer than max_length is dropped and counted, not truncated"
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
    """Fields of the method's configuration that its command does not take, and why."""
    return _REFUSED.get("rloo" if method == "grpo" else method, {})
