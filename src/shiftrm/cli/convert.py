"""`shiftrm convert`: convert a public data set to preference pairs, prompts or demonstrations."""

import argparse
import os
from collections.abc import Sequence
from typing import Any

from shiftrm.data.named import COMMON, FORMATS, KINDS, Loaded
from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm convert hh_rlhf Anthropic/hh-rlhf --kind pairs --output pairs.jsonl subset=helpful
  shiftrm convert pku pku.jsonl --kind pairs --output pairs.jsonl preference=harmless \\
      --dropped dropped.jsonl --eval-output eval.jsonl --eval-share 0.1
  shiftrm convert oasst1 OpenAssistant/oasst1 --kind prompts --output prompts.jsonl lang=en \\
      --evaluation eval.jsonl

Pairs are {"prompt", "chosen", "rejected"}, prompts {"prompt"}, demonstrations {"prompt",
"completion"} or {"messages"}; dialogues are chat messages, summaries text. Rows that cannot be used
are dropped, counted by reason, and listed in --dropped as {"where", "reason"}.

Formats and their options, given as name=value:
"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "convert",
        help="read a public data set as pairs, prompts or demonstrations",
        description="Reads a public data set and writes rows that the other commands take.",
        epilog=EPILOG + formats_help() + SOURCE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "format",
        metavar="FORMAT",
        help="a name from the list below, or package.module:FORMAT for your own",
    )
    parser.add_argument("source", metavar="SOURCE", help="file, folder or hub name, see below")
    parser.add_argument("--kind", required=True, choices=KINDS, help="what the rows are for")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL to write")
    parser.add_argument("--dropped", metavar="FILE", help="JSONL of what was dropped, and why")
    parser.add_argument("--split", metavar="NAME", help="of a folder or hub name; default: train")
    parser.add_argument(
        "--evaluation",
        action="append",
        metavar="DATA",
        help="rows that are evaluated on: what has a prompt of theirs is dropped; may be repeated",
    )
    parser.add_argument("--eval-output", metavar="FILE", help="also split off rows to evaluate on")
    parser.add_argument(
        "--eval-share", type=float, metavar="X", help="of the prompts that go there; default: 0.1"
    )
    parser.add_argument("options", nargs="*", metavar="name=value", help="the format's options")
    parser.set_defaults(run=run, again="to start anew; nothing was written")


def words_last(words: Sequence[str]) -> list[str]:
    """Move flags first, since argparse needs consecutive positional arguments."""
    flags: list[str] = []
    others: list[str] = []
    rest = list(words)
    while rest:
        word = rest.pop(0)
        (flags if word.startswith("-") else others).append(word)
        if word.startswith("--") and "=" not in word and word != "--help" and rest:
            flags.append(rest.pop(0))
    return [*flags, *others]


def formats_help() -> str:
    """List the formats with their kinds, hub names and options."""
    import textwrap

    def wrapped(first: str, text: str) -> str:
        return textwrap.fill(
            text,
            width=96,
            initial_indent=first,
            subsequent_indent=" " * len(first),
            break_long_words=False,
            break_on_hyphens=False,
        )

    lines: list[str] = []
    for name in FORMATS.names():
        form = FORMATS.get(name)
        lines.append(wrapped(f"  {name:15}", f"{form.about}; {', '.join(form.kinds)}"))
        if form.hub:
            lines.append(wrapped(" " * 19, f"on the hub: {', '.join(form.hub)}"))
        own = {o: text for o, text in form.option_help().items() if o not in COMMON}
        lines += [wrapped(f"    {option:15}", text) for option, text in own.items()]
    lines.append("  every format")
    lines += [wrapped(f"    {option:15}", text) for option, text in COMMON.items()]
    return "\n".join(lines) + "\n"


def run(args: argparse.Namespace) -> None:
    from shiftrm.cli.progress import bar, only_on_terminals
    from shiftrm.data.named import load, parse_options
    from shiftrm.data.splits import read_rows_with_prompts, split_by_prompt, without_evaluated
    from shiftrm.errors import UserError
    from shiftrm.files import write_jsonl

    options = parse_options(args.format, args.options)
    one_file = os.path.isfile(args.source)
    if args.split is not None and one_file and not FORMATS.get(args.format).rows_say_split:
        raise UserError(f"{args.source}: is one file, so --split has no effect; leave it out")
    files = _outputs(args)
    evaluated = [read_rows_with_prompts(source) for source in args.evaluation or ()]
    only_on_terminals()
    with bar(f"{args.format} rows", None) as progress:
        loaded = load(
            args.format,
            args.source,
            kind=args.kind,
            split=args.split,
            progress=lambda done: progress(done, None),
            **options,
        )
    loaded = without_evaluated(loaded, *evaluated)
    if not loaded.rows:
        raise UserError(f"{args.source}: every prompt is also in --evaluation; nothing is left")
    held_out = None
    if args.eval_output is not None:
        share = 0.1 if args.eval_share is None else args.eval_share
        loaded, held_out = split_by_prompt(loaded, share=share, seed=options.get("seed", 0))
        write_jsonl(files["eval_output"], held_out.rows)
    if args.dropped is not None:
        write_jsonl(files["dropped"], loaded.dropped)
    write_jsonl(files["output"], loaded.rows)
    print(summary(loaded, args.kind, args.output))
    if held_out is not None:
        print(f"{len(held_out.rows)} {args.kind} to evaluate on: {args.eval_output}")


def summary(loaded: Loaded, kind: str, output: str) -> str:
    """Describe what was kept and what was dropped."""
    dropped = len(loaded.dropped)
    total = len(loaded.rows) + dropped
    kept = f"{len(loaded.rows)} {kind} kept: {output}"
    if not dropped:
        return f"{kept}\nNothing was dropped."
    reasons = ", ".join(
        f"{reason.replace('_', ' ')} {count} ({count / total:.1%})"
        for reason, count in loaded.counts().items()
    )
    return f"{kept}\n{dropped} dropped ({dropped / total:.1%}): {reasons}"


def _outputs(args: argparse.Namespace) -> dict[str, Any]:
    """Return the files to write, checked to be writable and distinct."""
    from shiftrm.cli.checks import output_rows
    from shiftrm.errors import UserError

    if args.eval_share is not None and args.eval_output is None:
        raise UserError("--eval-share needs --eval-output; give the file for those rows")
    names = ("output", "dropped", "eval_output")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    taken = [args.source, *(args.evaluation or ())]
    files = {}
    for name, value in given.items():
        files[name] = output_rows(value, apart_from=taken)
        taken.append(value)
    return files
