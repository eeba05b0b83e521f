"""`shiftrm evaluate diversity`: similarity of the responses in files."""

import argparse
from pathlib import Path
from typing import Any

from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm evaluate diversity sft.jsonl ppo.jsonl --output diversity.json
  shiftrm evaluate diversity sft=a.jsonl round3=b.jsonl --embedder models/all-MiniLM-L6-v2 \\
      --output diversity.json
  shiftrm evaluate diversity chinese.jsonl --tokenize char --scope across --output diversity.json

Rows are {"prompt", "responses": [...]}, as `shiftrm sample` writes them, or {"prompt", "response"}.
Within prompts, the responses to one prompt are compared with each other; across prompts, one
response each to different prompts. Lower Self-BLEU, embedding similarity and compression are more
diverse, and so are higher distinct shares. "similarity" is the MetaRM paper's sum: Self-BLEU as a
share (n = 2..5) plus the mean cosine with negative values as 0, in [0, 2]; the paper does not say
how it normalises. All files are cut to one number of prompts and responses, since every one of
these numbers depends on it.
"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "diversity",
        help="how alike are the responses? Self-BLEU, embeddings, distinct n-grams, compression",
        description="Measures how alike responses are, file beside file; the others are compared "
        "with the first one.",
        epilog=EPILOG + SOURCE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "files", nargs="+", metavar="[NAME=]FILE", help="responses; NAME is how the table calls it"
    )
    parser.add_argument(
        "--embedder",
        metavar="DIR",
        help="embedding model: for sentence-transformers (if installed), or a plain transformers "
        "model, which is mean-pooled; without one, there is no embedding similarity and no sum",
    )
    parser.add_argument(
        "--scope", choices=("both", "within", "across"), default="both", help="default: both"
    )
    parser.add_argument(
        "--tokenize",
        default="13a",
        metavar="NAME",
        help="sacrebleu's: 13a, intl, char, zh, none; default: 13a",
    )
    parser.add_argument(
        "--prompts", type=int, metavar="N", help="compare at most N, drawn by seed; default: all"
    )
    parser.add_argument("--output", metavar="FILE", help="all numbers, as JSON")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of draws and intervals; default: 0"
    )
    parser.set_defaults(run=run, again="to start anew; nothing was written")


def run(args: argparse.Namespace) -> None:
    from shiftrm.cli.checks import named_paths, output_file
    from shiftrm.cli.progress import bar, only_on_terminals
    from shiftrm.measure.diversity_files import ACROSS, WITHIN, measure_diversity, read_responses
    from shiftrm.measure.embeddings import load_embedder

    _check(args)
    named = named_paths(args.files)
    output = None
    if args.output is not None:
        output = output_file(args.output, apart_from=[*named.values(), args.embedder])
    only_on_terminals()
    files = [read_responses(source, name) for name, source in named.items()]
    embed = None
    if args.embedder is not None:
        embed = load_embedder(args.embedder, batch_size=args.batch_size)
    scopes = {"both": (WITHIN, ACROSS), "within": (WITHIN,), "across": (ACROSS,)}[args.scope]
    with bar("measuring diversity", None) as advance:  # the total is not yet known
        report = measure_diversity(
            files,
            embed=embed,
            scopes=scopes,
            tokenizer=args.tokenize,
            max_prompts=args.prompts,
            seed=args.seed,
            progress=advance,
        )
    if output is not None:
        _write(output, args, named, report)
    _show(report)
    if output is not None:
        print(f"Numbers: {output}")


def _check(args: argparse.Namespace) -> None:
    from shiftrm.cli.checks import at_least_one
    from shiftrm.errors import UserError, suggest
    from shiftrm.measure.diversity import TOKENIZERS

    at_least_one(args.batch_size, "--batch-size")
    if args.prompts is not None and args.prompts < 2:
        raise UserError(f"--prompts is {args.prompts}; it must be at least 2")
    if args.tokenize not in TOKENIZERS:
        advice = suggest(args.tokenize, list(TOKENIZERS))
        raise UserError(f"--tokenize {args.tokenize!r}: unknown tokenizer{advice}")


def _write(path: Path, args: argparse.Namespace, named: dict[str, str], report: Any) -> None:
    from dataclasses import asdict

    from shiftrm.cli.evaluate.output import write_numbers

    content = {
        **asdict(report),
        "files": named,
        "embedder": args.embedder,
        "tokenize": args.tokenize,
        "seed": args.seed,
    }
    write_numbers(path, content)


ROWS = {
    "similarity": "similarity (sum)",
    "self_bleu": "Self-BLEU, n = 2..5",
    "embedding_similarity": "embedding similarity",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
    "distinct_3": "distinct 3-grams",
    "compression_ratio": "compression ratio",
}


def _show(report: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from shiftrm.cli.evaluate.output import console

    out = console()
    for scope in dict.fromkeys(d.scope for d in report.diversities):
        found = [d for d in report.diversities if d.scope == scope]
        table = Table(title=f"Diversity {scope}", title_justify="left")
        table.add_column("")
        for each in found:
            table.add_column(Text(each.name), justify="right")
        table.add_row("prompts", *(str(each.prompts) for each in found))
        table.add_row("responses", *(str(each.responses) for each in found))
        for metric, label in ROWS.items():
            if any(metric in each.values for each in found):
                cells = (str(each.values.get(metric, "-")) for each in found)
                table.add_row(label, *(Text(cell) for cell in cells))
        out.print(table)
    for line in report.lines:
        out.print(Text(line))
