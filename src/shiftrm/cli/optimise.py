"""`shiftrm optimise`: optimise a policy with a reward model or on preference pairs."""

from collections.abc import Sequence
from dataclasses import dataclass

from shiftrm.cli.options import About, option, optional
from shiftrm.cli.training import POLICY_HELP, TrainingOptions, run_job
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.errors import UserError, suggest

EPILOG = """examples:
  shiftrm optimise ppo --policy models/sft --reward models/reward --prompts prompts.jsonl \\
      --output models/ppo preset=paper steps=200 kl_target=8
  shiftrm optimise rloo --policy models/sft --reward models/reward --prompts prompts.jsonl \\
      --output models/rloo num_generations=4 beta=0.05 max_completion_length=256
  shiftrm optimise grpo --policy models/ppo --reference models/sft --reward models/reward-2 \\
      --prompts prompts.jsonl --output models/grpo beta=0.04 use_peft=true lora_r=16
  shiftrm optimise dpo --policy models/sft --pairs pairs.jsonl --output models/dpo beta=0.1
  accelerate launch -m shiftrm optimise rloo --config rloo.yaml

`shiftrm optimise METHOD --help` lists the method's settings.

METHOD is ppo (this project's), rloo, grpo or dpo (TRL's). The reward model scores text as
`shiftrm score` does, so its tokenizer and chat template may differ from the policy's; responses
that the length limit cut off are scored as unfinished. Rewards are used as they are, except by ppo,
which first standardises them by mean and spread over responses of the reference (reward_mean,
reward_std).

The KL to the reference (--reference, or else the initial policy) is controlled by beta (rloo, grpo,
dpo; grpo's default is 0) or kl_coefficient and kl_target (ppo). It is logged as sequence_kl, in
nats per response, and measured on kl_samples fresh responses at the end. With use_peft=true the
reference is the base model with the adapter off, unless --reference names another.

"""

CONFIGS = """PPOConfig with its sampling (ppo), trl.RLOOConfig,
trl.GRPOConfig or trl.DPOConfig, kl_samples and max_prompt_length"""

ABOUT = About(
    help="optimise a policy by ppo, rloo, grpo or dpo",
    description="Optimises a policy against a reward model, or on preference pairs.",
    epilog=EPILOG + POLICY_HELP.format(configs=CONFIGS) + SOURCE_HELP,
    again="to continue from the last checkpoint, if there is one",
)

METHODS: dict[str, tuple[str, ...]] = {
    "ppo": (
        "shiftrm.policies.ppo_config:PPOConfig",
        "shiftrm.models.generation:SamplingConfig",
        "shiftrm.policies.configs:_PPOCommand",
    ),
    "rloo": ("trl.trainer.rloo_config:RLOOConfig", "shiftrm.policies.configs:RLOOConfig"),
    "grpo": ("trl.trainer.grpo_config:GRPOConfig", "shiftrm.policies.configs:GRPOConfig"),
    "dpo": ("trl.trainer.dpo_config:DPOConfig", "shiftrm.policies.configs:DPOConfig"),
}
"""Methods to optimise a policy, and the classes that declare their settings."""

NO_SETTINGS = ("sampling",)
"""Fields that are settings classes, whose own fields are listed."""


@dataclass(frozen=True, kw_only=True)
class Options(TrainingOptions):
    method: str = option("METHOD", "ppo, rloo, grpo or dpo", positional=True)
    policy: str = option("DIR", "checkpoint or hub name", reads=True)
    reference: str | None = optional(
        "DIR", "the model to stay close to", shown="the policy", reads=True
    )
    reward: str | None = optional(
        "DIR", "reward model, or gold or gold:WORLD, a gold world's (ppo, rloo, grpo)", reads=True
    )
    scale: str | None = optional(
        "DATA",
        "responses of the reference that standardise the rewards (ppo)",
        shown="ppo samples its own",
        reads=True,
    )
    watch: str | None = optional(
        "DIR",
        "second reward model (or gold, or gold:WORLD) that scores the samples and trains "
        "nothing: logged as gold_mean",
        reads=True,
    )
    prompts: str | None = optional("DATA", "rows with `prompt` (ppo, rloo, grpo)", reads=True)
    pairs: str | None = optional("DATA", "preference pairs (dpo)", reads=True)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise UserError(f"unknown method {self.method!r}{suggest(self.method, list(METHODS))}")


def run(options: Options) -> None:
    run_job("Optimise", options)


def topic_help(words: Sequence[str]) -> str | None:
    """Return examples and settings of the method that is named; None without one."""
    from shiftrm.cli.class_fields import listed, own_fields
    from shiftrm.policies.refused import refused

    method = next((word for word in words if word in METHODS), None)
    if method is None:
        return None
    examples = EPILOG.partition("\n\n")[0].split("\n  shiftrm ")[1:]
    own = [line for line in examples if line.startswith(f"optimise {method} ")]
    found = {o.name: o for place in METHODS[method] for o in own_fields(place)}
    for name in (*NO_SETTINGS, *refused(method)):
        found.pop(name, None)
    lines = ["examples:", *(f"  shiftrm {line}" for line in own), ""]
    lines += [f"settings of {method}, as key=value or --key value, with their defaults:"]
    lines += [listed(list(found.values())), ""]
    if method != "ppo":
        lines += [
            "and those of transformers.TrainingArguments: num_train_epochs, max_steps,",
            "per_device_train_batch_size, gradient_accumulation_steps, lr_scheduler_type,",
            "warmup_steps, logging_steps, save_steps, seed, bf16, report_to, ...",
        ]
    lines += [
        "and of trl.ModelConfig: dtype, attn_implementation, use_peft, lora_r, lora_alpha, ...",
        "",
        "`shiftrm optimise --help` says what --policy, --reward, --prompts and the others are.",
    ]
    return "\n".join(lines) + "\n"
