"""`shiftrm meta-test`: optimise a policy against a frozen reward model in unseen domains."""

import argparse
from typing import Any

EPILOG = """examples:
  shiftrm meta-test --policy models/sft --reward models/reward --domains domains --output runs/test
  shiftrm meta-test --policy models/sft --reward models/reward --domains domains --way ppo \\
      --judge models/evaluation-reward --output runs/ppo ppo.steps=50 ppo.kl_target=6
  shiftrm meta-test --policy models/sft --domains domains --way plain --output runs/plain

Ways: weighted (fine-tuning on the domain's finetune.jsonl, weighted by exp(r/beta)), ppo (PPO with
a KL penalty on its prompts), rloo (the same by TRL's RLOO), plain (fine-tuning without a reward
model: the baseline).

Measured before and after, for every domain: A_PL on eval_pairs.jsonl, KL to the reference, the mean
reward of the guiding reward model and of the judge on responses to prompts.jsonl.

Settings, as key=value: seed, weighted.* (updates, batch_size, learning_rate, beta, ...), ppo.*
(steps, kl_coefficient, kl_target, ...), rloo.* (steps, kl_coefficient, ...), evaluation.*
(responses_per_prompt, pairs, sampling.*).
A command that was interrupted continues when it is given again.
"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "meta-test",
        help="make and measure policies for unseen domains under a frozen reward model (OODPL)",
        description="Makes a policy for every held-out domain, guided by a frozen reward model, "
        "and measures it against the reference policy.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--policy", required=True, metavar="DIR", help="the reference policy")
    parser.add_argument("--reward", metavar="DIR", help="reward model that guides")
    parser.add_argument("--domains", required=True, metavar="DIR", help="folder of domains")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder of the result")
    parser.add_argument(
        "--way", default="weighted", metavar="WAY", help="weighted (default), ppo, rloo or plain"
    )
    parser.add_argument("--only", metavar="NAME,NAME", help="default: the held-out domains")
    parser.add_argument("--judge", metavar="DIR", help="reward model that only evaluates")
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="default: 1")
    parser.add_argument("settings", nargs="*", metavar="key=value", help="any setting")
    parser.set_defaults(run=run, again="to continue")


def run(args: argparse.Namespace) -> None:
    from shiftrm.cli.checks import at_least_one, output_folder
    from shiftrm.cli.meta_train import names
    from shiftrm.cli.progress import only_on_terminals

    at_least_one(args.workers, "--workers")
    output = output_folder(
        args.output, apart_from=[args.policy, args.reward, args.domains, args.judge]
    )
    from shiftrm.pipeline.meta_test_run import meta_test

    only_on_terminals()
    print(
        meta_test(
            args.policy,
            reward=args.reward,
            domains=args.domains,
            output=output,
            way=args.way,
            names=names(args.only),
            judge=args.judge,
            settings=args.settings,
            workers=args.workers,
        )
    )
