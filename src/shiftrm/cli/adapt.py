"""`shiftrm adapt`: adapt a reward model to the current policy, and diagnose both."""

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

from shiftrm.cli import settings
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.errors import UserError

EPILOG = """examples:
  shiftrm adapt --model models/reward --pairs pairs.jsonl --groups groups.jsonl \\
      --eval-pairs heldout.jsonl --output models/reward-2 preset=scale_free learning_rate=5e-6
  shiftrm adapt --model models/reward --pairs pairs.jsonl --policy models/ppo-1 \\
      --prompts prompts.jsonl --responses 5 --temperature 0.8 --output models/reward-2
  shiftrm adapt --config adapt.yaml --eval-groups other=groups-of-other-prompts.jsonl

It is `shiftrm train` with groups, from a trained reward model (of a policy, `shiftrm train` makes
one), and the diagnosis of `shiftrm diagnose` before and after. That is measured on what the
training has not seen: --eval-pairs, and a share of the prompts of the groups, unless --eval-groups
gives others. Only labels can show that the model became sharper, so give --eval-pairs, best of
today's policy. The output folder holds the model, before_after.html, before_after.json, the groups
held out and those sampled.

"""

FILES = """
FILE.yaml holds the same options and settings in one flat mapping; the command line wins.

Samples and checkpoints are written into .NAME.work beside the output. A command that was
interrupted, killed or stopped by a full disk continues from there when it is given again.
"""

SAMPLING: dict[str, tuple[Callable[[str], float], float, str, str]] = {
    "responses": (int, 5, "K", "responses to each prompt"),
    "max_new_tokens": (int, 128, "N", "longest response"),
    "temperature": (float, 1.0, "T", "of sampling"),
    "top_p": (float, 1.0, "P", "of sampling"),
    "repetition_penalty": (float, 1.0, "X", "1 is none"),
    "sampling_batch_size": (int, 32, "N", "prompts a batch"),
}
"""Type, default, placeholder and help of the options for --policy."""

TEXT = ("config", "method", "model", "pairs", "eval_pairs", "groups", "output", "policy", "prompts")

OPTIONS = (*TEXT, "eval_groups", "holdout", *SAMPLING)


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "adapt",
        help="adapt a reward model to responses of today's policy; before and after",
        description="Adapts a trained reward model to unlabelled responses of today's policy "
        "(MetaRM), and says whether it became sharper or only louder.",
        epilog=EPILOG + settings.HELP + FILES + SOURCE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    settings.add_arguments(parser)
    parser.add_argument(
        "--method",
        metavar="NAME",
        help="metarm (default), retrained, another registered method, or package.module:attribute",
    )
    parser.add_argument("--groups", metavar="DATA", help="response groups of today's policy")
    parser.add_argument("--policy", metavar="DIR", help="or: the policy to sample them from")
    parser.add_argument("--prompts", metavar="DATA", help="with --policy: rows with `prompt`")
    for name, (_, default, placeholder, text) in SAMPLING.items():
        parser.add_argument(
            f"--{name.replace('_', '-')}",
            metavar=placeholder,
            help=f"with --policy: {text}; default: {default:g}",
        )
    parser.add_argument(
        "--holdout",
        metavar="SHARE",
        help="share of the prompts of the groups to measure on only; default: 0.2",
    )
    parser.add_argument(
        "--eval-groups",
        metavar="[NAME=]DATA",
        action="append",
        help="other groups to measure on; none are held out then; may be repeated",
    )
    parser.set_defaults(run=run, again="to continue: samples and checkpoints are kept")


def fold_flags(arguments: Sequence[str]) -> list[str]:
    """See `settings.fold_flags`."""
    return settings.fold_flags(arguments, OPTIONS)


def run(args: argparse.Namespace) -> None:
    from pathlib import Path

    from shiftrm.cli.diagnose import show_tables
    from shiftrm.cli.progress import bar, only_on_terminals

    options, chosen = settings.merged(args, OPTIONS, numbers=(*SAMPLING, "holdout"))
    output = settings.output(options, args.config)  # before the slow imports
    numbers = {key: _number(key, options[key]) for key in (*SAMPLING, "holdout") if key in options}
    _check_policy(options, numbers)
    settings.quieten_libraries()
    from shiftrm.methods.adapt import Request, adapt
    from shiftrm.report.adaptation import PAGE, write_before_after

    only_on_terminals()
    request = Request(
        options["model"],
        pairs=options["pairs"],
        output=Path(output),
        settings=chosen,
        method=options.get("method", "metarm"),
        groups=options.get("groups"),
        samples=_samples(options, numbers),
        eval_pairs=settings.named(options.get("eval_pairs"), "eval_pairs"),
        eval_groups=settings.named(options.get("eval_groups"), "eval_groups"),
        holdout=numbers.get("holdout"),
        command=shlex.join(["shiftrm", *sys.argv[1:]]),
    )
    found = adapt(request, present=write_before_after, bar=bar)
    if found is not None:
        show_tables(found.findings)
        print(f"{found.summary}\nPage: {output / PAGE}")


def _number(name: str, given: Any) -> Any:
    """Parse an option as a number."""
    kind = float if name == "holdout" else SAMPLING[name][0]
    try:
        if isinstance(given, bool) or (kind is int and isinstance(given, float)):
            raise ValueError
        return kind(given)
    except (TypeError, ValueError):
        expected = "a whole number" if kind is int else "a number"
        flag = f"--{name.replace('_', '-')}"
        raise UserError(f"{flag} is {given!r}; expected {expected}") from None


def _check_policy(options: dict[str, Any], numbers: dict[str, Any]) -> None:
    """Check that --policy and --prompts are given together, and sampling options only with them."""
    if "policy" in options and "prompts" not in options:
        raise UserError("--policy without --prompts: give the prompts that it shall answer")
    if "prompts" in options and "policy" not in options:
        raise UserError("--prompts without --policy: give the policy that shall answer them")
    idle = [key for key in SAMPLING if key in numbers]
    if idle and "policy" not in options:
        raise UserError(f"--{idle[0].replace('_', '-')} goes with --policy, which is not there")


def _samples(options: dict[str, Any], numbers: dict[str, Any]) -> Any:
    from shiftrm.methods.adapt import PolicySamples
    from shiftrm.models.sampling import SamplingConfig

    if "policy" not in options:
        return None
    value = {key: numbers.get(key, default) for key, (_, default, _, _) in SAMPLING.items()}
    return PolicySamples(
        policy=options["policy"],
        prompts=options["prompts"],
        responses=value.pop("responses"),
        batch_size=value.pop("sampling_batch_size"),
        config=SamplingConfig(**value),
    )
