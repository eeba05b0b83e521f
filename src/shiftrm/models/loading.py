"""Loading models: library errors in one line, checks of the files, and new reward heads."""

import hashlib
import json
import re
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shiftrm.errors import UserError
from shiftrm.files import file_hash
from shiftrm.models.filled import load_filled
from shiftrm.models.rewards import find_head, score_head

FEW_WORDS = 3
"""From a folder without tokenizer files transformers makes a tokenizer of special tokens and one or
two other tokens; every text is then the same."""

A_HEAD = re.compile(r"head|score|scalar|value|reward|regress|classif|rank|critic")
A_LANGUAGE_HEAD = re.compile(
    r"^(lm_head|embed_out|output_projection|cls\.|generator_|discriminator_|mtp|lm_predictions)"
    r"|\.lm_head\b|^(qa_outputs)"
)


@contextmanager
def explain_loading(path: str | Path, what: str) -> Iterator[None]:
    """Turn exceptions of libraries that read a model's folder into a one-line `UserError`.

    Wrap only the reading: every exception is assumed to be about the files, because each library
    has its own exceptions for broken ones.

    Args:
        what: what the folder is loaded as, for the message.

    Raises:
        UserError: for every exception except running out of memory.
    """
    refuse_gguf(path)
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if type(error).__name__ == "OutOfMemoryError":  # torch's
            raise
        words = str(error).strip().splitlines()
        said = f"{type(error).__name__}: {words[0]}" if words else type(error).__name__
        if isinstance(error, OSError | ValueError | RuntimeError) and words:
            said = words[0]
        raise UserError(f"{path}: cannot be loaded as {what} ({said})") from None


ENSEMBLE = "ensemble.json"
"""The file that makes a folder an ensemble (`models/combined.py`)."""


def is_ensemble(path: str | Path) -> bool:
    """Whether a path is the folder of an ensemble."""
    try:
        return (Path(path) / ENSEMBLE).is_file()
    except (OSError, ValueError):
        return False


CHECKPOINT_FILES = (
    "config.json",
    "generation_config.json",
    "adapter_config.json",
    "laplace.json",
    "*.safetensors",
    "*.bin",
    "*.py",
    "tokenizer*",
    "chat_template.*",
    "additional_chat_templates/*",
    "added_tokens.json",
    "special_tokens_map.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
)
"""What decides how a checkpoint reads a text and answers it: weights, settings, code, tokenizer."""

NO_WEIGHTS = ("training_args.bin", "optimizer.bin", "scheduler.bin")


def checkpoint_fingerprint(path: str | Path) -> str:
    """Return a SHA-256 of a checkpoint folder's `CHECKPOINT_FILES`; "" for a hub name.

    That of an adapter includes its base's, if that is a folder here.
    """
    folder = Path(path)
    ends = list(CHECKPOINT_FILES)
    if is_ensemble(path):
        ends = [ENSEMBLE, *(f"*/{end}" for end in ends)]
    names = {name for end in ends for name in folder.glob(end) if name.is_file()}
    names = {name for name in names if name.name not in NO_WEIGHTS}
    if not names:
        return ""
    digest = hashlib.sha256()
    for name in sorted(names):
        digest.update(f"{name.name} {file_hash(name)}".encode())
    if (base := _base_folder(folder)) is not None:
        digest.update(checkpoint_fingerprint(base).encode())
    return digest.hexdigest()


def _base_folder(adapter: Path) -> Path | None:
    """Return the local folder of the model that an adapter belongs to."""
    try:
        about = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
        base = Path(about["base_model_name_or_path"])
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return base if base.is_dir() and base.resolve() != adapter.resolve() else None


VALUES_COMPARED = 64
"""Leading values of each parameter that tell a loaded model from another."""


def weights_digest(named: Iterable[tuple[str, Tensor]]) -> str:
    """Return a SHA-256 of names, shapes and `VALUES_COMPARED` leading values of parameters.

    Of parameters whose values lie elsewhere (the meta device) only name and shape are read.
    """
    digest = hashlib.sha256()
    for name, parameter in named:
        digest.update(f"{name} {tuple(parameter.shape)}".encode())
        if not parameter.is_meta:
            values = parameter.detach()
            values = values.full_tensor() if hasattr(values, "full_tensor") else values
            head = values.flatten()[:VALUES_COMPARED].double().cpu()
            digest.update(head.numpy().tobytes())
    return digest.hexdigest()


def refuse_gguf(path: str | Path) -> None:
    """Refuse a folder of GGUF files, which transformers reads only when given the file's name.

    Raises:
        UserError: says how to convert it to a checkpoint.
    """
    folder = Path(path)
    try:
        found = sorted(folder.glob("*.gguf"))
        whole = any(folder.glob("*.safetensors")) or any(folder.glob("*.bin"))
    except (OSError, ValueError):
        return
    if found and not whole:
        raise UserError(
            f"{path}: holds its weights as GGUF, which these commands do not read; make a folder "
            f"of it with `shiftrm convert gguf {found[0]} --output DIR`, and give that"
        )


def keep_pad_apart(tokenizer: Any) -> bool:
    """Choose a pad token other than EOS, where these are the same; return whether they differ now.

    What pools by itself (transformers, and so TRL's reward functions and vLLM) takes the last token
    that is not pad: with pad == EOS, the one before the end of the answer.
    """
    if tokenizer.pad_token_id not in (None, tokenizer.eos_token_id):
        return True
    for token in (tokenizer.unk_token, tokenizer.bos_token):
        if token is not None and token != tokenizer.eos_token:
            tokenizer.pad_token = token
            return True
    return False


def refuse_adapter(
    path: str | Path, because: str = "which would stay as it is while the model is trained"
) -> None:
    """Refuse the folder of an adapter where a whole model is needed.

    Raises:
        UserError: it is one.
    """
    if (Path(path) / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: is an adapter, {because}; merge it into its model first (`shiftrm` writes "
            "the merged one beside it)"
        )


def check_vocabulary(model: Any, tokenizer: Any, path: str | Path) -> None:
    """Refuse a tokenizer whose vocabulary has tokens that the model lacks.

    Added tokens may lie beyond the embedding: many checkpoints have such a pad token, which is
    always masked.

    Raises:
        UserError: names one such token; or the tokenizer knows no words at all.
    """
    require_words(tokenizer, str(path))
    size = known_tokens(model)
    if size is None or len(tokenizer) <= size:
        return
    added = {*tokenizer.all_special_ids, *getattr(tokenizer, "added_tokens_decoder", ())}
    vocabulary = tokenizer.get_vocab().items()
    beyond = sorted((i, token) for token, i in vocabulary if i >= size and i not in added)
    if beyond:
        number, token = beyond[0]
        raise UserError(
            f"{path}: the tokenizer is not this model's: token {token!r} has the number {number}, "
            f"and the model has embeddings for {size}; give the folder the tokenizer that the "
            "model was trained with"
        )


def require_words(tokenizer: Any, name: str) -> None:
    """Refuse a tokenizer that knows no words, or has a length that is no number.

    Raises:
        UserError: it has only special tokens; or `model_max_length`, with which transformers
            compares every text, is no number.
    """
    if not isinstance(longest := tokenizer.model_max_length, int | float):
        raise UserError(
            f"{name}: tokenizer_config.json: model_max_length is {longest!r:.40}; expected a number"
        )
    words = set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens)
    if len(words) <= FEW_WORDS:
        raise UserError(
            f"{name}: its tokenizer knows no words, so every text would be the same; put the "
            "tokenizer's files (tokenizer.json, tokenizer_config.json) into the folder"
        )


def known_tokens(model: nn.Module) -> int | None:
    """Return the number of token ids that a model has embeddings for; None if unknown."""
    try:
        table: Any = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return getattr(table, "num_embeddings", None)


def require_known_ids(ids: Collection[int], size: int | None, *, name: str) -> None:
    """Refuse token ids that the model has no embedding for.

    Args:
        size: as `known_tokens` returns it.
        name: the name of these ids in errors.

    Raises:
        UserError: an id is negative, or `size` or more.
    """
    if size is None or not len(ids):
        return
    least, most = int(min(ids)), int(max(ids))
    if least < 0 or most >= size:
        raise UserError(
            f"{name} has token id {most if most >= size else least}, and the model has embeddings "
            f"for {size} tokens; the tokenizer is not the model's"
        )


def unread_heads(unexpected_keys: Iterable[str]) -> list[str]:
    """Return the weights of a trained head that a sequence classifier does not read.

    Args:
        unexpected_keys: as returned by `from_pretrained(..., output_loading_info=True)`.
    """
    return sorted(
        key
        for key in unexpected_keys
        if A_HEAD.search(key) and not A_LANGUAGE_HEAD.search(key) and ".layers." not in key
    )


def load_classifier(
    path: str | Path, *, quiet: bool, **options: Any
) -> tuple[Any, list[str], list[str]]:
    """Load a sequence classifier.

    Returns:
        The model; the weights that the checkpoint lacks, those of the head first; and the weights
        of the checkpoint that look like a head and are not read (`unread_heads`).

    Raises:
        UserError: as `filled.load_filled`; or it classifies tokens.
    """
    from transformers import AutoModelForSequenceClassification

    found = load_filled(AutoModelForSequenceClassification, path, quiet=quiet, **options)
    named = getattr(found.model.config, "architectures", None) or ()
    adapters = getattr(found.model, "peft_config", {}).values()
    if any(name.endswith("ForTokenClassification") for name in named) or any(
        adapter.task_type == "TOKEN_CLS" for adapter in adapters
    ):
        raise UserError(
            f"{path}: rates every token; a reward model has one reward for a response (a sequence "
            "classifier)"
        )
    missing = sorted(found.missing, key=lambda name: (not is_head(name), name))
    return found.model, missing, unread_heads(found.unexpected)


def is_head(name: str) -> bool:
    """Whether this is the name of a weight of a sequence classifier's head."""
    return "score" in name or "classifier" in name


def load_reward_model(path: str | Path, *, seed: int, **model_options: Any) -> Any:
    """Load the model that reward training starts from: a reward model, or a policy with a new head.

    Args:
        path: checkpoint folder or hub name. If it has no score head, `new_head_` initialises one.
        seed: seed of a new head.
        model_options: for `from_pretrained`; `dtype` is float32 unless given.

    Raises:
        UserError: the checkpoint has a trained head under another name, which would be lost, or
            it is more than one model (`combined.refuse_combined`).
        OSError, ValueError, RuntimeError: as `from_pretrained` (nothing there, no classifier of
            this architecture, a head whose number of labels is not one).
    """
    from shiftrm.models.combined import refuse_combined  # it imports this module

    refuse_combined(path)
    dtype = model_options.get("dtype", "float32")
    if isinstance(dtype, str) and dtype != "auto":
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"dtype is {dtype!r}; give auto, float32, bfloat16 or float16")
        dtype = getattr(torch, dtype)
    options = {
        # As TRL does: on one accelerator the model goes straight to it; several processes place it.
        "device_map": "auto" if _one_accelerator() else None,
        **model_options,
        "dtype": dtype,
        "num_labels": 1,
    }
    model, missing, lost = load_classifier(path, quiet=True, **options)
    if any(map(is_head, missing)):
        if lost:
            raise UserError(
                f"{path}: has a head of its own ({lost[0]}) that {type(model).__name__} does not "
                "read, so training would start from a new one; rename it to "
                f"{_head_name(model)}.weight if it is one linear layer, or remove it to start anew"
            )
        new_head_(score_head(model), seed=seed)
    return model


def _head_name(model: nn.Module) -> str:
    head = find_head(model)
    return next(name for name, module in model.named_modules() if module is head)


def _one_accelerator() -> bool:
    from accelerate import PartialState

    state = PartialState()
    return state.num_processes == 1 and state.device.type not in ("cpu", "mps")


@torch.no_grad()
def new_head_(head: nn.Linear, *, seed: int) -> None:
    """Draw the weights from N(0, 1/H^2), H the width, in place, and set the bias to zero.

    With normalised hidden states the first rewards are then about 1/sqrt(H), so the loss of every
    pair starts near ln 2, whatever the model's own initialisation. The draws depend on the seed
    alone.
    """
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(head.weight.shape, generator=generator) / head.in_features
    head.weight.copy_(draws.to(head.weight.dtype))
    if head.bias is not None:
        head.bias.zero_()


def accelerator() -> torch.device | None:
    """Return this machine's accelerator; None without one, also with a CUDA build of torch."""
    return torch.accelerator.current_accelerator(check_available=True)


def to_accelerator(model: Any) -> Any:
    """Move the model to this machine's accelerator, if there is one."""
    device = accelerator()
    return model if device is None else model.to(device)
