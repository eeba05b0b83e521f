"""`shiftrm sample`: K responses per prompt of a policy, as a group file."""

import argparse
from typing import Any

from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm sample --policy models/ppo-round-1 --prompts prompts.jsonl --output groups.jsonl
  shiftrm sample --policy models/ppo-round-1 --prompts prompts.jsonl --output groups.jsonl \\
      --responses 5 --temperature 0.8 --top-p 0.9 --repetition-penalty 1.1

Each row of the prompts holds {"prompt": "text"} or {"prompt": [chat messages]}. Each line of the
output holds {"prompt", "responses", "finished"}. An interrupted call continues when repeated.
"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "sample",
        help="sample K responses per prompt from a policy",
        description="Samples several responses to each prompt from a causal language model and "
        "writes them as groups, which `shiftrm train --groups` adapts a reward model to.",
        epilog=EPILOG + SOURCE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--policy", required=True, metavar="DIR", help="checkpoint or hub name")
    parser.add_argument("--prompts", required=True, metavar="DATA", help="rows with `prompt`")
    parser.add_argument("--output", required=True, metavar="FILE", help="group file to write")
    parser.add_argument("--responses", type=int, default=5, metavar="K", help="default: 5")
    parser.add_argument("--max-new-tokens", type=int, default=128, metavar="N", help="default: 128")
    parser.add_argument("--temperature", type=float, default=1.0, metavar="T", help="default: 1")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="default: 1 (none)"
    )
    parser.add_argument("--batch-size", type=int, default=32, metavar="N", help="prompts a batch")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    parser.set_defaults(run=run, again="to continue")


def run(args: argparse.Namespace) -> None:
    from shiftrm.cli.checks import at_least_one, output_rows, to_accelerator
    from shiftrm.cli.progress import bar, only_on_terminals
    from shiftrm.data.group_files import holds_groups
    from shiftrm.data.prompts import read_prompts
    from shiftrm.errors import UserError
    from shiftrm.sampling import SamplingConfig, encode_prompts, load_policy, sample_groups

    at_least_one(args.batch_size, "--batch-size")
    if args.responses < 2:
        raise UserError(f"--responses is {args.responses}; a group needs at least two responses")
    config = SamplingConfig(
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        repetition_penalty=args.repetition_penalty,
    )
    output = output_rows(args.output)
    names, prompts = read_prompts(args.prompts)
    if holds_groups(output, prompts, num_responses=args.responses):
        print(
            f"{output}: already there, {len(prompts)} groups of {args.responses} responses to "
            "these prompts; left as it is, whatever settings it was sampled with"
        )
        return
    only_on_terminals()
    model, tokenizer = load_policy(args.policy)
    to_accelerator(model)
    # Once more below, but only here do errors know the line.
    encode_prompts(model, tokenizer, prompts, room=config.max_new_tokens, names=names)
    with bar("sampling", len(prompts)) as advance:
        sample_groups(
            model,
            tokenizer,
            prompts,
            output,
            config=config,
            num_responses=args.responses,
            batch_size=args.batch_size,
            seed=args.seed,
            progress=advance,
        )
    print(f"{len(prompts)} groups of {args.responses} responses: {output}")
