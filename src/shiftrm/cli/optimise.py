"""`shiftrm optimise`: optimise a policy with a reward model or on preference pairs."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from shiftrm.cli import settings
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
`shiftrm score` does, so its tokenizer and chat template may be others than the policy's; responses
that the length limit cut off are scored as unfinished. Rewards are used as they are, except by ppo,
which first standardises them by mean and spread over responses of the reference (reward_mean,
reward_std).

The KL to the reference (--reference, or else the policy as it was) is held by beta (rloo, grpo,
dpo; grpo's default is 0) or kl_coefficient and kl_target (ppo). It is logged as sequence_kl, nats a
response, and measured on kl_samples fresh responses at the end. With use_peft=true the reference
is the base model with the adapter off, unless --reference names another.

"""

CONFIGS = """PPOConfig with its sampling (ppo), trl.RLOOConfig,
trl.GRPOConfig or trl.DPOConfig, kl_samples and max_prompt_length"""

METHODS: dict[str, tuple[tuple[str, str, str], ...]] = {
    "ppo": (
        ("shiftrm", "policies/ppo_config.py", "PPOConfig"),
        ("shiftrm", "models/generation.py", "SamplingConfig"),
        ("shiftrm", "policies/configs.py", "_PPOCommand"),
    ),
    "rloo": (
        ("trl", "trainer/rloo_config.py", "RLOOConfig"),
        ("shiftrm", "policies/configs.py", "RLOOConfig"),
    ),
    "grpo": (
        ("trl", "trainer/grpo_config.py", "GRPOConfig"),
        ("shiftrm", "policies/configs.py", "GRPOConfig"),
    ),
    "dpo": (
        ("trl", "trainer/dpo_config.py", "DPOConfig"),
        ("shiftrm", "policies/configs.py", "DPOConfig"),
    ),
}
"""Methods to optimise a policy, and where their settings are declared."""

NO_SETTINGS = ("sampling",)
"""Fields that are settings classes, whose own fields are listed."""

OPTIONS = (
    "config",
    "method",
    "policy",
    "reference",
    "reward",
    "watch",
    "prompts",
    "pairs",
    "output",
)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "optimise",
        help="optimise a policy by ppo, rloo, grpo or dpo",
        description="Optimises a policy against a reward model, or on preference pairs.",
        epilog=EPILOG + settings.POLICY_HELP.format(configs=CONFIGS) + SOURCE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        add_help=False,
        usage="%(prog)s METHOD --policy DIR [--reference DIR] [--reward DIR] [--watch DIR] "
        "(--prompts DATA | --pairs DATA) --output DIR [--config FILE] [key=value ...]",
    )
    parser.add_argument(
        "-h", "--help", nargs="?", action=_Help, help="this text; of METHOD: its settings"
    )
    parser.add_argument("--method", help=argparse.SUPPRESS)
    parser.add_argument("--policy", metavar="DIR", help="checkpoint or hub name (needed)")
    parser.add_argument("--reference", metavar="DIR", help="the model to stay close to")
    parser.add_argument("--reward", metavar="DIR", help="reward model (ppo, rloo, grpo)")
    parser.add_argument(
        "--watch",
        metavar="DIR",
        help="second reward model (or gold, the gold world's) that scores the samples and trains "
        "nothing: logged as gold_mean",
    )
    parser.add_argument("--prompts", metavar="DATA", help="rows with `prompt` (ppo, rloo, grpo)")
    parser.add_argument("--pairs", metavar="DATA", help="preference pairs (dpo)")
    settings.add_common(parser)
    parser.set_defaults(run=run, again="to continue from the last checkpoint, if there is one")


def fold_flags(arguments: Sequence[str]) -> list[str]:
    """See `settings.fold_flags`."""
    if {"-h", "--help"} & set(arguments):
        return ["--help", *[word for word in arguments if word in METHODS][:1]]
    return settings.fold_flags(arguments, OPTIONS)


class _Help(argparse.Action):
    """Show the command's help or, after a method's name, the settings of that method."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option: Any = None) -> None:
        print(parser.format_help() if values is None else method_help(values), end="")
        parser.exit()


def method_help(method: str) -> str:
    """Return examples and settings of a method."""
    from shiftrm.cli import option_help
    from shiftrm.policies.refused import refused

    examples = EPILOG.partition("\n\n")[0].split("\n  shiftrm ")[1:]
    own = [line for line in examples if line.startswith(f"optimise {method} ")]
    found: dict[str, option_help.Option] = {}
    for package, file, name in METHODS[method]:
        source = option_help.source_of(package, file)
        found |= {o.name: o for o in option_help.options_in(source, name)}
    for name in (*NO_SETTINGS, *refused(method)):
        found.pop(name, None)
    lines = ["examples:", *(f"  shiftrm {line}" for line in own), ""]
    lines += [f"settings of {method}, as key=value or --key value, with their defaults:"]
    lines += [option_help.told(list(found.values())), ""]
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


def _require_method(name: str) -> None:
    """Reject an unknown method before the slow imports."""
    if name not in METHODS:
        raise UserError(f"unknown method {name!r}{suggest(name, list(METHODS))}")


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from shiftrm.cli.progress import only_on_terminals

    first = args.settings[:1]
    if first and "=" not in first[0]:  # METHOD; it may be in the file instead
        args.method, args.settings = first[0], args.settings[1:]
    if args.method is not None:
        _require_method(args.method)
    options, chosen = settings.merged(args, OPTIONS, needed=("method", "policy", "output"))
    _require_method(options["method"])
    output = settings.output(options, args.config)  # before the slow import
    settings.quieten_libraries()
    from shiftrm.pipeline.jobs import Optimise

    only_on_terminals()
    job = Optimise(
        options["method"],
        options["policy"],
        reference=options.get("reference"),
        reward=options.get("reward"),
        prompts=options.get("prompts"),
        pairs=options.get("pairs"),
        watch=options.get("watch"),
        settings=chosen,
        told=shlex.join(["shiftrm", *sys.argv[1:]]),
    )
    summary = job.run(Path(output))
    if summary is not None:
        print(summary)
