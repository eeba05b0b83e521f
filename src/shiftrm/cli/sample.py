"""`shiftrm sample`: sample K responses per prompt from a policy into a group file."""

import argparse
from typing import Any

from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm sample --policy models/ppo-round-1 --prompts prompts.jsonl --output groups.jsonl
  shiftrm sample --policy models/ppo-round-1 --prompts prompts.jsonl --output groups.jsonl \\
      --responses 5 --temperature 0.8 --top-p 0.9 --repetition-penalty 1.1
  shiftrm sample --policy models/ppo-round-1 --prompts prompts.jsonl --output groups.jsonl --vllm
  shiftrm sample --policy models/ppo-round-1 --prompts prompts.jsonl --output groups.jsonl \\
      --server http://localhost:8000/v1 --served-model policy

Each row of the prompts holds {"prompt": "text"} or {"prompt": [chat messages]}; a chat that ends
with the assistant's words is continued. Each line of the output holds {"prompt", "responses",
"finished", "prompt_ids", "response_ids", "tokenizer"}: the text for people, and the tokens that
were sampled. A group for `shiftrm adapt` needs at least two responses. A response ends with the
tokenizer's EOS, the end tokens of the policy's generation config, or the token with which the chat
template closes a turn. An interrupted call continues when repeated.
With vLLM the tokenizer of --policy makes and reads the tokens, and the server only continues them;
a server that needs a key gets that of the environment variable VLLM_API_KEY.
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
    parser.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="default: 1; 0: greedy"
    )
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="default: 1")
    parser.add_argument(
        "--repetition-penalty", type=float, default=1.0, metavar="X", help="default: 1 (none)"
    )
    parser.add_argument(
        "--batch-size",
        type=int,
        default=32,
        metavar="N",
        help="prompts a batch; with vLLM, prompts under way at one time",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="default: 0")
    by_server = parser.add_argument_group("sampling by vLLM")
    which = by_server.add_mutually_exclusive_group()
    which.add_argument("--server", metavar="URL", help="a running server, up to and with /v1")
    which.add_argument(
        "--vllm", action="store_true", help="start `vllm serve` for the policy, and end it after"
    )
    by_server.add_argument(
        "--served-model", metavar="NAME", help="what --server calls the policy, if not --policy"
    )
    by_server.add_argument(
        "--vllm-arguments",
        metavar="WORDS",
        help='further options of vllm serve, as --vllm-arguments="--tensor-parallel-size 2"',
    )
    parser.set_defaults(run=run, again="to continue")


def run(args: argparse.Namespace) -> None:
    from shiftrm.cli.checks import at_least_one, output_rows
    from shiftrm.cli.progress import bar, only_on_terminals
    from shiftrm.models.sampling import SamplingConfig
    from shiftrm.pipeline.jobs import Sample

    at_least_one(args.batch_size, "--batch-size")
    at_least_one(args.responses, "--responses")
    job = Sample(
        args.policy,
        args.prompts,
        responses=args.responses,
        sampling=SamplingConfig(
            max_new_tokens=args.max_new_tokens,
            temperature=args.temperature,
            top_p=args.top_p,
            repetition_penalty=args.repetition_penalty,
        ),
        batch_size=args.batch_size,
        seed=args.seed,
        server=args.server,
        served_model=args.served_model,
        vllm=args.vllm,
        vllm_arguments=tuple(_check_server_options(args)),
    )
    output = output_rows(
        args.output,
        apart_from=[args.policy, args.prompts],
        beside=["{name}.partial", "{name}.vllm.log"],
        may_exist=True,  # with the same groups; the job checks that
    )
    only_on_terminals()
    print(job.run(output, bar=bar))


def _check_server_options(args: argparse.Namespace) -> list[str]:
    """Return the words of --vllm-arguments; raise when an option would have no effect."""
    import shlex

    from shiftrm.errors import UserError

    if args.served_model and not args.server:
        raise UserError("--served-model is for --server; give its address, too")
    if args.vllm_arguments and not args.vllm:
        raise UserError("--vllm-arguments are for --vllm; add it")
    try:
        return shlex.split(args.vllm_arguments or "")
    except ValueError as error:
        raise UserError(f"--vllm-arguments: {args.vllm_arguments!r}: {error}") from None
