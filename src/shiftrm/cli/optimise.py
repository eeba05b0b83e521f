"""`shiftrm optimise`: a policy optimised against a reward model, or on preference pairs."""

import argparse
import shlex
import sys
from collections.abc import Sequence
from typing import Any

from shiftrm.cli import settings
from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm optimise ppo --policy models/sft --reward models/reward --prompts prompts.jsonl \\
      --output models/ppo preset=paper steps=200 kl_target=8
  shiftrm optimise rloo --policy models/sft --reward models/reward --prompts prompts.jsonl \\
      --output models/rloo num_generations=4 beta=0.05 max_completion_length=256
  shiftrm optimise grpo --policy models/ppo --reference models/sft --reward models/reward-2 \\
      --prompts prompts.jsonl --output models/grpo beta=0.04 use_peft=true lora_r=16
  shiftrm optimise dpo --policy models/sft --pairs pairs.jsonl --output models/dpo beta=0.1
  accelerate launch -m shiftrm optimise rloo --config rloo.yaml

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
        usage="%(prog)s METHOD --policy DIR [--reference DIR] [--reward DIR] [--watch DIR] "
        "(--prompts DATA | --pairs DATA) --output DIR [--config FILE] [key=value ...]",
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
    return settings.fold_flags(arguments, OPTIONS)


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from shiftrm.cli.progress import only_on_terminals

    first = args.settings[:1]
    if first and "=" not in first[0]:  # METHOD; it may stand in the file instead
        args.method, args.settings = first[0], args.settings[1:]
    options, chosen = settings.merged(args, OPTIONS, needed=("method", "policy", "output"))
    output = settings.output(options, args.config)  # before the seconds that the next import takes
    settings.quieten_libraries()
    from shiftrm.trainers.policy.commands import optimise

    only_on_terminals()
    summary = optimise(
        options["method"],
        options["policy"],
        reference=options.get("reference"),
        reward=options.get("reward"),
        prompts=options.get("prompts"),
        pairs=options.get("pairs"),
        watch=options.get("watch"),
        output=Path(output),
        settings=chosen,
        command=shlex.join(["shiftrm", *sys.argv[1:]]),
    )
    if summary is not None:
        print(summary)
