"""Check training settings against the fields of the configuration classes.

The fields of a command's configuration class (`RewardConfig`, `MetaRMConfig`, those of
`policies.configs`) and of `trl.ModelConfig` are the only place where a setting is declared.
Flags, `key=value` words and keys of a YAML file all end here.
"""

import dataclasses
import math
import os
import sys
import typing
from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from types import NoneType
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import TrainingArguments
from trl import ModelConfig, get_peft_config, get_quantization_config

from shiftrm.config import check_seed, parse_yaml
from shiftrm.errors import UserError, first_line, shortened, suggest
from shiftrm.models.loading import accelerator
from shiftrm.trainers.late_settings import check_late_settings
from shiftrm.trainers.quantised import check_adapters
from shiftrm.trainers.work_folder import is_disk_full

REFUSED = {
    "output_dir": "this command sets it",
    "resume_from_checkpoint": "the same command given again continues by itself",
    "push_to_hub": "this command writes a folder; `hf upload` uploads it",
    "model_name_or_path": "give the model as an option",
    "lora_task_type": "this command sets it",
    "parallelism_config": "`accelerate launch --config_file` sets it",
}
"""Fields that the user cannot set in any command, and what to do instead."""

LEAST = {
    "gradient_accumulation_steps": 1,
    "per_device_train_batch_size": 1,
    "per_device_eval_batch_size": 1,
    "max_length": 1,
    "max_tokens_per_pass": 1,
    "pad_to_multiple_of": 1,
    "learning_rate": 0.0,
    "weight_decay": 0.0,
    "adam_beta1": 0.0,
    "adam_beta2": 0.0,
    "adam_epsilon": 0.0,
    "num_train_epochs": 0.0,
    "dataloader_num_workers": 0,
    "meta_batch_size": 1,
    "warmup_steps": 0.0,
    "max_grad_norm": 0.0,
    "center_rewards_coefficient": 0.0,
    "save_total_limit": 1,
    "lora_r": 1,
    "beta": 0.0,
    "num_generations": 2,
    "max_completion_length": 1,
    "max_prompt_length": 1,
    "kl_samples": 0,
}
"""The minimum of settings that transformers checks late or not at all."""

BELOW_ONE = ("adam_beta1", "adam_beta2")

OPTIONS = {
    "train": ("pairs", "eval_pairs", "groups", "policy", "reference", "reward"),
    "adapt": (
        *("pairs", "eval_pairs", "groups", "eval_groups", "holdout"),
        *("policy", "reference", "prompts"),
        *("responses", "max_new_tokens", "temperature", "top_p", "repetition_penalty"),
    ),
    "sft": ("model", "demonstrations"),
    "optimise": ("policy", "reference", "reward", "scale", "watch", "prompts", "pairs"),
}
"""Options that are not settings, by command; also suggested for a mistyped setting."""

HOW_DIVIDED = (
    "per_device_train_batch_size",
    "gradient_accumulation_steps",
    "per_device_eval_batch_size",
    "forward_batch_size",
    "micro_batch_size",
    "max_tokens_per_pass",
    "gradient_checkpointing",
    "activation_checkpointing",
    "activation_offloading",
)
"""Settings that change how work is divided, not the result; they may change on resume."""

NULL = ("", "~", "null", "none", "None")

NEED_PEFT = ("lora_", "use_rslora", "use_dora")


@dataclasses.dataclass
class Settings:
    """The settings of a training run."""

    args: Any
    """An object of the command's configuration class."""

    model: ModelConfig
    """How the model is loaded, and LoRA."""

    given: dict[str, Any]
    """What the user set, as plain values; equivalent spellings are equal here."""

    ours: dict[str, Any]
    """The defaults of this command on this machine."""

    task_type: str = "SEQ_CLS"
    """PEFT's task type of the model."""

    @property
    def model_options(self) -> dict[str, Any]:
        """Return the keyword arguments of `from_pretrained`."""
        named = {
            "dtype": self.model.dtype,
            "attn_implementation": self.model.attn_implementation,
            "revision": self.model.model_revision if "model_revision" in self.given else None,
        }
        options = {key: value for key, value in named.items() if value is not None}
        return options | dict(getattr(self.args, "model_init_kwargs", None) or {})

    @property
    def trainer_options(self) -> dict[str, Any]:
        """Return LoRA and quantisation options as trainers take them."""
        self.model.lora_task_type = self.task_type  # for a classifier, PEFT also trains the head
        options = {
            "peft_config": get_peft_config(self.model),
            "quantization_config": get_quantization_config(self.model),
        }
        return {key: value for key, value in options.items() if value is not None}

    def beyond_defaults(self) -> dict[str, Any]:
        """Return every setting that differs from its class's default, including presets."""
        default = type(self.args)(**self.ours)
        said = {*self.given, *(key for key in ("use_cpu", "bf16") if key in self.ours)}
        values = {f.name: getattr(self.args, f.name) for f in dataclasses.fields(self.args)}
        found = {
            key: getattr(value, "value", value)
            for key, value in values.items()
            if key in said or value != getattr(default, key)
        }
        return found | {k: v for k, v in self.given.items() if k not in found}

    def identity(self) -> dict[str, Any]:
        """Return the settings that must be equal to resume a run: all but `HOW_DIVIDED`."""
        args = self.args
        kept = {key: value for key, value in self.given.items() if key not in HOW_DIVIDED}
        if hasattr(args, "per_device_train_batch_size"):
            kept["batch"] = args.per_device_train_batch_size * args.gradient_accumulation_steps
        return kept

    def explain(self, model: str, error: Exception) -> Exception:
        """Return a one-line error if a library rejected the model or settings, else the error."""
        words = first_line(error)
        if isinstance(error, UnpicklingError | EOFError) or "PytorchStreamReader" in words:
            return UserError(
                f"{model}: cannot be loaded (its pytorch_model.bin is cut off, or holds other "
                "things than weights); fetch it again, or save it as safetensors"
            )
        if isinstance(error, OSError | SafetensorError) and not is_disk_full(error):
            return UserError(f"{model}: cannot be loaded ({words})")
        if isinstance(error, RuntimeError) and "ignore_mismatched_sizes" in str(error):
            return UserError(
                f"{model}: its weights do not fit a reward model of one label; give a policy, or a "
                "checkpoint with num_labels=1"
            )
        if isinstance(error, ValueError) and "`pad_token` ('None')" in str(error):
            return UserError(
                f"{model}: the tokenizer has neither a pad nor an EOS token; set them and save it "
                "again, or give eos_token=..."
            )
        if isinstance(error, TypeError) and self.given.get("model_init_kwargs"):
            return UserError(f"{model}: does not take these model_init_kwargs: {words}")
        if isinstance(
            error, ValueError | ImportError | NotImplementedError
        ) or "to be installed" in str(error):
            return UserError(f"{model}: cannot be trained with these settings: {words}")
        return error


def resolve(
    given: Mapping[str, Any],
    config: type,
    *,
    work: Path,
    command_name: str,
    task_type: str = "SEQ_CLS",
    refused: Mapping[str, str] | None = None,
    elsewhere: Mapping[str, str] | None = None,
) -> Settings:
    """Build the configurations from the given values.

    Args:
        given: values by setting; strings are read as YAML unless the setting is text.
        config: the command's configuration class, a dataclass.
        work: the folder that training writes into.
        command_name: for errors; a key of `OPTIONS`.
        refused: fields besides `REFUSED` that the user cannot set in this command, and why.
        elsewhere: settings that the class does not have, and when they can be given.

    Raises:
        UserError: an unknown setting (the nearest is suggested) or an invalid value.
    """
    refused = REFUSED | dict(refused or {})
    hints = typing.get_type_hints(config) | typing.get_type_hints(ModelConfig)
    fields = (*dataclasses.fields(config), *dataclasses.fields(ModelConfig))
    known = [f.name for f in fields if f.init and f.name not in refused]
    values = {}
    for key, value in given.items():
        key, value = _positive(key, value, known)
        if key not in known:
            hint = refused.get(key) or (elsewhere or {}).get(key)
            hint = f"; {hint}" if hint else _hint(key, known, command_name)
            raise UserError(f"unknown setting {key!r}{hint}")
        values[key] = value_of(key, value, hints[key])
    model_fields = {f.name for f in dataclasses.fields(ModelConfig)}
    model = {key: value for key, value in values.items() if key in model_fields}
    dtype = model.get("dtype")
    if dtype not in (None, "auto") and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise UserError(f"dtype is {dtype!r}; give auto, float32, bfloat16 or float16")
    if "use_peft" not in model and (idle := [k for k in model if k.startswith(NEED_PEFT)]):
        raise UserError(f"{idle[0]} is set without LoRA; add use_peft=true")
    check_adapters(model)
    ours = command_defaults(work) if issubclass(config, TrainingArguments) else {}
    if "use_cpu" in ours:  # TRL's bf16 default needs an accelerator
        ours["bf16"] = False
    chosen = {key: value for key, value in values.items() if key not in model_fields}
    try:
        found = Settings(config(**(ours | chosen)), ModelConfig(**model), values, ours, task_type)
    except UserError:
        raise
    except (TypeError, ValueError, ImportError, OSError) as error:
        raise UserError(f"training settings: {error}") from None
    if isinstance(found.args, TrainingArguments):
        check_late_settings(found.args, values)
    return found


def command_defaults(work: Path) -> dict[str, Any]:
    """Return the commands' default training arguments on this machine."""
    ours: dict[str, Any] = {
        "output_dir": str(work),
        "report_to": "none",
        "disable_tqdm": not sys.stderr.isatty(),
        "save_total_limit": 2,  # a checkpoint of an 8B model with Adam's moments is 100 GB
    }
    if accelerator() is None:
        ours["use_cpu"] = True
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            ours["ddp_backend"] = "gloo"
    return ours


def _positive(key: str, value: Any, known: list[str]) -> tuple[str, Any]:
    """Return a setting with a `no_` prefix, as from `--no-bf16`, as `bf16=false`."""
    if key not in known and key.startswith("no_") and key[3:] in known and value == "true":
        return key[3:], "false"
    return key, value


def _hint(key: str, known: list[str], command_name: str) -> str:
    near = suggest(key, [*known, *OPTIONS[command_name]])
    if "did you mean" in near:
        return near
    return f"; `shiftrm {command_name} --help` lists the settings"


def value_of(key: str, given: Any, hint: Any) -> Any:
    """Return the value of a setting; text is read as YAML, numbers and switches are checked."""
    kinds = set(typing.get_args(hint)) or {hint}
    text = shortened(given if isinstance(given, str) else str(given))
    if key == "report_to" and given in ("none", "None", "null", None):
        return "none"  # transformers' word; None means all of them
    if NoneType in kinds and (given is None or text in NULL):
        return None
    if kinds <= {str, NoneType}:
        return given if isinstance(given, str) else str(given)
    value = parse_yaml(given, f"{key}={text}", word=True) if isinstance(given, str) else given
    number = _number(value)
    if number is not None and number < LEAST.get(key, -math.inf):
        raise UserError(f"{key} is {text}; it must be at least {LEAST[key]:g}")
    if key == "max_steps" and number is not None and (number == 0 or number < -1):
        # With 0, transformers would train whole epochs.
        raise UserError(f"max_steps is {text}; give at least 1, or leave it out")
    if not kinds <= {bool, int, float, NoneType}:  # choices, lists: transformers judges them
        return _choice(value, given, kinds)
    if bool in kinds:
        number, expected = value if isinstance(value, bool) else None, "true or false"
    elif float in kinds:
        expected = "a number"
    else:
        number, expected = _whole(number), "a whole number"
    if number is not None and abs(number) >= 2**63 and float not in kinds:
        number = None
    if number is None:
        null = ", or null" if NoneType in kinds else ""
        raise UserError(f"{key} is {text!r}; expected {expected}{null}")
    if key in BELOW_ONE and number >= 1:
        raise UserError(f"{key} is {text}; it must be below 1")
    if key in ("seed", "data_seed"):
        check_seed(int(number), key)
    return number


def _choice(value: Any, given: Any, kinds: set[Any]) -> Any:
    """Return a list, mapping or number as parsed, a word as written (`no` is not a switch here)."""
    if isinstance(value, bool) and bool not in kinds:
        return given if isinstance(given, str) else {True: "yes", False: "no"}[value]
    return value


def _whole(number: float | None) -> int | None:
    return int(number) if number is not None and number.is_integer() else None


def _number(value: Any) -> float | None:
    """Return the value as a finite number, or None; YAML reads 5e-6 as text."""
    try:
        number = None if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        return None
    return number if number is not None and math.isfinite(number) else None
