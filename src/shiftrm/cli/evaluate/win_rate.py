"""`shiftrm evaluate win-rate`: win rate of one set of responses over another by a judge."""

import argparse
from pathlib import Path
from typing import Any

from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm evaluate win-rate --ours ppo.jsonl --theirs sft.jsonl --output runs/ppo-sft \\
      --judge endpoint --model gpt-4o --price-in 2.5 --price-out 10
  shiftrm evaluate win-rate --ours ppo.jsonl --theirs sft.jsonl --output runs/ppo-sft \\
      --judge endpoint --base-url http://localhost:8000/v1 --model my-judge --template harmless
  shiftrm evaluate win-rate --ours ppo.jsonl --theirs sft.jsonl --output runs/ppo-sft \\
      --judge reward-model --model models/other-reward --tie-margin 0.1

Files hold {"prompt", "responses", "finished"?}, as `shiftrm sample` writes them, or {"prompt",
"response"}; the first response of a row is judged. Both files answer the same prompts.

A judge behind an endpoint (any server that speaks OpenAI's API) is asked twice a prompt, with
either response first; answers that disagree are a tie. Its key comes from the environment variable
OPENAI_API_KEY (or --key-variable) and is written nowhere. Before anything is sent, the number of
requests and tokens is shown. Up to --max-requests are sent without a word; more are sent with
--yes, or after a question on a terminal, and refused elsewhere. All answers are kept in --cache:
the same command given again asks only what is missing.

A template is general, helpful, harmless, summary, or a file: one message with {prompt},
{response_a}, {response_b} that asks for [[A]], [[B]] or [[C]] ({fence}, if used, is a mark that no
response can hold). A file called .j2 is a jinja template with the same variables.

The folder gets verdicts.jsonl (everything the judge said), win_rate.json, and win_rate.html.
"""

_FOR_ENDPOINTS = (
    "base_url",
    "template",
    "parameter",
    "concurrency",
    "timeout",
    "retries",
    "cache",
    "price_in",
    "price_out",
    "tokenizer",
)
"""Options that other judges do not take; None means not given."""

VERDICTS, NUMBERS, PAGE = FILES = ("verdicts.jsonl", "win_rate.json", "win_rate.html")
"""Files written into the folder besides the cache."""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "win-rate",
        help="who answers better, as a judge sees it?",
        description="Has a judge compare two sets of responses to the same prompts: wins, ties "
        "and losses with intervals, lengths, the rate at equal lengths, and what the order of "
        "responses does to the judge.",
        epilog=EPILOG + SOURCE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ours", required=True, metavar="DATA", help="responses of one policy")
    parser.add_argument("--theirs", required=True, metavar="DATA", help="and of the other")
    parser.add_argument(
        "--judge", required=True, metavar="KIND", help="endpoint, reward-model or gold"
    )
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--model", metavar="NAME", help="name at the endpoint; folder of a reward model"
    )
    parser.add_argument(
        "--limit", type=int, default=100, metavar="N", help="prompts, 0 for all; default: 100"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of drawing prompts; default: 0"
    )
    scores = parser.add_argument_group("judges that give numbers")
    scores.add_argument(
        "--tie-margin", type=float, metavar="X", help="differences that are a tie; default: 0"
    )
    scores.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    _add_endpoint_options(parser.add_argument_group("a judge behind an endpoint"))
    parser.set_defaults(run=run, again="to continue; answers that have come are in the cache")


def _add_endpoint_options(group: Any) -> None:
    group.add_argument("--base-url", metavar="URL", help="up to /v1; default: $OPENAI_BASE_URL")
    group.add_argument("--key-variable", default="OPENAI_API_KEY", metavar="NAME", help="see below")
    group.add_argument("--template", metavar="NAME|FILE", help="see below; default: general")
    group.add_argument(
        "--parameter",
        action="append",
        metavar="NAME=VALUE",
        help="of every request; null takes one away (default: temperature=0, max_tokens=1024)",
    )
    group.add_argument("--concurrency", type=int, metavar="N", help="requests at once; default: 8")
    group.add_argument("--timeout", type=float, metavar="S", help="of an attempt; default: 120")
    group.add_argument("--retries", type=int, metavar="N", help="default: 6, with back-off")
    group.add_argument("--cache", metavar="FILE", help="default: answers.jsonl in the folder")
    group.add_argument("--price-in", type=float, metavar="X", help="of a million tokens")
    group.add_argument("--price-out", type=float, metavar="X", help="of a million tokens")
    group.add_argument("--tokenizer", metavar="DIR", help="to count tokens with; else characters/4")
    group.add_argument("--max-requests", type=int, default=1000, metavar="N", help="default: 1000")
    group.add_argument("--yes", action="store_true", help="send them, however many")
    group.add_argument("--dry-run", action="store_true", help="say what would be asked, and stop")


def run(args: argparse.Namespace) -> None:
    from shiftrm.cli.progress import bar, only_on_terminals
    from shiftrm.data.sources import iterate_rows
    from shiftrm.errors import UserError
    from shiftrm.files import write_jsonl
    from shiftrm.measure.judges.comparing import draw, match_rows
    from shiftrm.measure.judges.win_rates import problems, summarise, verdict_rows

    _check(args)
    folder = _folder(args)
    sides = [[row for _, row in iterate_rows(source)] for source in (args.ours, args.theirs)]
    comparisons = match_rows(*sides, names=(args.ours, args.theirs))
    chosen = draw(comparisons, args.limit or None, seed=args.seed)
    if args.judge == "reward-model":
        only_on_terminals()
    judge = _open(args, folder)
    if args.judge == "endpoint" and not _approved(args, judge, chosen):
        return
    with bar("judging", len(chosen)) as advance:
        verdicts = _judge(judge, chosen, advance)
    write_jsonl(folder / VERDICTS, verdict_rows(verdicts))
    rate = summarise(verdicts, judge=judge.name, seed=args.seed)
    if rate is None:
        reasons = ", ".join(f"{word} ({n})" for word, n in problems(verdicts).items())
        raise UserError(
            f"not one of {len(verdicts)} comparisons has a verdict that can be read: {reasons}; "
            f"see what the judge said in {folder / VERDICTS}"
        )
    settings = _settings(args, judge, len(comparisons))
    _write_numbers(folder, rate, verdicts, settings)
    _show(rate, several=sum(len(row.get("responses", ())) > 1 for side in sides for row in side))
    if len(chosen) < len(comparisons):
        print(f"Judged: {len(chosen)} of {len(comparisons)} prompts, drawn with seed {args.seed}.")
    if args.judge == "endpoint":
        print(f"Requests sent: {judge.asked}, and {judge.endpoint.retries} sent again.")
    print(f"Page: {folder / PAGE}")


def _folder(args: argparse.Namespace) -> Path:
    """Return the output folder: new, or with earlier verdicts on the same two files."""
    import json

    from shiftrm.cli.checks import output_file, output_folder
    from shiftrm.errors import UserError

    inputs = [args.ours, args.theirs, None if args.judge == "endpoint" else args.model]
    folder = output_folder(args.output, apart_from=inputs)
    for name in FILES:
        output_file(str(folder / name), apart_from=inputs, may_exist=True)
    found = [folder / name for name in FILES if (folder / name).exists()]
    if not found:
        return folder
    try:
        judged = json.loads((folder / NUMBERS).read_bytes())["settings"]
        same = all(judged[side] == getattr(args, side) for side in ("ours", "theirs"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        same = found == [folder / VERDICTS] and _holds_verdicts(folder / VERDICTS)
    if not same:
        raise UserError(
            f"{found[0]}: already there and not of a judgement of these two files; choose another "
            "--output, or delete it first"
        )
    return folder


def _holds_verdicts(path: Path) -> bool:
    """Whether the file contains verdicts, as it does alone if none could be read."""
    from shiftrm.errors import UserError
    from shiftrm.files import iterate_jsonl

    try:
        return all({"ours", "theirs", "outcome"} <= set(row) for _, row in iterate_jsonl(path))
    except UserError:
        return False


def _check(args: argparse.Namespace) -> None:
    from shiftrm.cli.checks import at_least_one, not_negative
    from shiftrm.errors import UserError, suggest
    from shiftrm.measure.judges.kinds import KINDS

    if args.judge not in KINDS:
        raise UserError(f"--judge {args.judge!r} is unknown{suggest(args.judge, list(KINDS))}")
    at_least_one(args.batch_size, "--batch-size")
    for option in ("limit", "max_requests", "price_in", "price_out"):
        not_negative(getattr(args, option), _flag(option))
    if args.judge == "endpoint":
        if args.tie_margin is not None:
            raise UserError(
                "--tie-margin is for judges that give numbers, not for --judge endpoint"
            )
    else:
        for option in _FOR_ENDPOINTS:
            if getattr(args, option) is not None:
                raise UserError(f"{_flag(option)} is for --judge endpoint, not for {args.judge}")
    if (args.model is None) != (args.judge == "gold"):
        raise UserError(
            "--judge gold takes no --model"
            if args.judge == "gold"
            else f"--judge {args.judge} needs --model: its name at the server, or its folder"
        )


def _flag(option: str) -> str:
    return f"--{option.replace('_', '-')}"


def _open(args: argparse.Namespace, folder: Any) -> Any:
    from shiftrm.cli.checks import output_rows
    from shiftrm.measure.judges.kinds import JudgeOptions, open_judge
    from shiftrm.models.endpoint import EndpointConfig

    def given(**options: Any) -> dict[str, Any]:
        return {name: value for name, value in options.items() if value is not None}

    cache = None
    if args.judge == "endpoint":
        others = [folder / name for name in FILES]
        own = args.cache or str(folder / "answers.jsonl")
        cache = output_rows(own, apart_from=others, may_exist=True)  # the cache checks it itself
    server = given(
        base_url=args.base_url,
        key_variable=args.key_variable,
        concurrency=args.concurrency,
        timeout=args.timeout,
        max_retries=args.retries,
    )
    options = JudgeOptions(
        model=args.model,
        endpoint=EndpointConfig(**server),
        parameters=_parameters(args.parameter or []),
        cache=cache,
        batch_size=args.batch_size,
        **given(template=args.template, tie_margin=args.tie_margin),
    )
    return open_judge(args.judge, options)


def _parameters(words: list[str]) -> dict[str, Any]:
    from shiftrm.config import apply_overrides
    from shiftrm.errors import UserError

    owned = ("model", "messages", "stream", "n")
    found: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise UserError(f"--parameter {word!r}: write NAME=VALUE, such as max_tokens=2048")
        if name in owned:
            raise UserError(f"--parameter {name}: is set by the command; leave it out")
        # One at a time, so that a name may contain a dot.
        found[name] = apply_overrides({}, [f"value={value}"])["value"]
    return found


def _approved(args: argparse.Namespace, judge: Any, chosen: list[Any]) -> bool:
    """Show the estimate; return False if only the estimate was requested."""
    import sys

    from shiftrm.measure.judges.endpoint_judge import approve

    estimate = judge.estimate(
        chosen,
        price_in=args.price_in,
        price_out=args.price_out,
        tokenizer=_tokenizer(args.tokenizer),
    )
    print(estimate, flush=True)
    if args.dry_run:
        return False

    def ask(question: str) -> bool:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    approve(estimate, limit=args.max_requests, yes=args.yes, ask=ask if interactive else None)
    return True


def _tokenizer(option: str | None) -> Any:
    from shiftrm.errors import UserError

    if option is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(option)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{option}: cannot be loaded as a tokenizer ({reason})") from None


def _judge(judge: Any, chosen: list[Any], advance: Any) -> Any:
    from shiftrm.errors import UserError

    try:
        return judge.judge(
            chosen,  # the judge counts requests, the bar prompts
            progress=lambda done, total: advance(done * len(chosen) // total, len(chosen)),
        )
    except UserError as error:
        if not getattr(judge, "asked", 0):
            raise
        raise UserError(
            f"{error}. Answers so far are kept: the same command asks only for the others"
        ) from None


def _settings(args: argparse.Namespace, judge: Any, matched: int) -> dict[str, Any]:
    """Return the settings of the judge, without the API key and anything a rerun changes."""
    found = {
        "ours": args.ours,
        "theirs": args.theirs,
        "judge": args.judge,
        "model": args.model,
        "prompts in the files": matched,
        "limit": args.limit or None,
        "seed": args.seed,
    }
    if args.judge == "endpoint":
        found |= {
            "base_url": judge.endpoint.base_url,
            "template": judge.template.name,
            "parameters": judge.parameters,
        }
    else:
        found["tie_margin"] = judge.tie_margin
    return found


def _write_numbers(folder: Any, rate: Any, verdicts: list[Any], settings: dict[str, Any]) -> None:
    import json
    from dataclasses import asdict

    from shiftrm.files import atomic_write_text
    from shiftrm.measure.judges.win_rates import headline, sentences, warnings
    from shiftrm.records import library_versions, source_commit
    from shiftrm.report.win_rate import write_page

    content = {
        "headline": headline(rate),
        "sentences": [*sentences(rate)],
        "warnings": [*warnings(rate)],
        **asdict(rate),
        "settings": settings,
        "commit": source_commit(),
        "versions": library_versions(),
    }
    text = json.dumps(content, indent=2, ensure_ascii=True, allow_nan=False) + "\n"
    atomic_write_text(folder / NUMBERS, text)
    write_page(rate, verdicts, settings, folder / PAGE)


def _show(rate: Any, *, several: int) -> None:
    from shiftrm.measure.judges.win_rates import headline, sentences, warnings

    print(headline(rate))
    for sentence in sentences(rate):
        print(sentence)
    for warning in warnings(rate):
        print(f"! {warning}")
    if several:
        print(f"{several} rows have several responses; the first of each was judged.")
