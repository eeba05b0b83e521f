"""`shiftrm evaluate sheet`: write blind sheets of responses for human raters."""

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm evaluate sheet --ours metarm.jsonl --theirs sft.jsonl --output sheet
  shiftrm evaluate sheet --ours metarm.jsonl --theirs sft.jsonl --output sheet \\
      --limit 60 --raters 3 --question "Which response is more helpful?"

Rows are {"prompt", "responses"} as `shiftrm sample` writes them (the first response is taken), or
{"prompt", "response"}. Both files answer the same prompts; --limit of them are drawn, the same as
`shiftrm evaluate win-rate` draws with this seed. Order and sides are drawn from a number that only
the key holds, so two sheets are never the same.

The folder gets sheet.html, a page that needs no network, sheet.csv for a spreadsheet (A, B or tie
under `answer`), and key.json, which says whose response is whose: give raters one of the first
two, and keep the key. With --raters R there are sheets 1 to R: the same items in orders of their
own, and for every second rater A and B the other way round. Raters save their answers as a file;
`shiftrm evaluate answers` reads those.
"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "sheet",
        help="write a blind sheet of two models' responses for human raters",
        description="Writes a blind, shuffled sheet that asks which of two responses is better.",
        epilog=EPILOG + SOURCE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--ours", required=True, metavar="DATA", help="responses of our model")
    parser.add_argument("--theirs", required=True, metavar="DATA", help="responses of the other")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--limit", type=int, default=100, metavar="N", help="items, 0 for all; default: 100"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of drawing prompts; default: 0"
    )
    parser.add_argument("--raters", type=int, default=1, metavar="R", help="sheets; default: 1")
    parser.add_argument(
        "--question",
        default="Which response is better?",
        metavar="TEXT",
        help="what the page asks; default: Which response is better?",
    )
    parser.set_defaults(run=run, again="to start anew")


def run(args: argparse.Namespace) -> None:
    import secrets

    from shiftrm.cli.checks import at_least_one, not_negative
    from shiftrm.data.sources import iterate_rows
    from shiftrm.measure.judges.comparing import draw, match_rows
    from shiftrm.measure.people.blinding import distinct, make_sheet, place
    from shiftrm.measure.people.key_files import key_text, sheet_csv, too_long_for_cells
    from shiftrm.report.sheet import sheet_page

    not_negative(args.limit, "--limit")
    at_least_one(args.raters, "--raters")
    output = sheet_folder(args.output, [args.ours, args.theirs])
    sides = [[row for _, row in iterate_rows(source)] for source in (args.ours, args.theirs)]
    matched = match_rows(*sides, names=(args.ours, args.theirs))
    drawn = draw(matched, args.limit or None, seed=args.seed)
    pairs = distinct(drawn)
    secret = secrets.randbelow(2**63)
    placements = place(len(pairs), raters=args.raters, seed=secret)
    sheets = [
        make_sheet(pairs, placed, rater=rater) for rater, placed in enumerate(placements, start=1)
    ]
    settings = {"ours": args.ours, "theirs": args.theirs, "limit": args.limit, "seed": args.seed}
    key = key_text(pairs, sheets, placements, settings={**settings, "secret": secret})
    files = {"key.json": key}
    for number, sheet in enumerate(sheets, start=1):
        name = "sheet" if len(sheets) == 1 else f"sheet-{number}"
        files[f"{name}.csv"] = sheet_csv(sheet)
        files[f"{name}.html"] = sheet_page(sheet, question=args.question)
    _write(output, files)
    if len(drawn) < len(matched):
        print(f"{len(drawn)} of {len(matched)} prompts, drawn with seed {args.seed}.")
    if len(pairs) < len(drawn):
        print(f"Left out: {len(drawn) - len(pairs)} pairs of responses that came before.")
    if long := too_long_for_cells(sheets[0]):
        print(f"{long} items are too long for a spreadsheet's cells: use the page for those.")
    which = "sheet.html or sheet.csv" if len(sheets) == 1 else "one sheet-N.html or .csv each"
    print(
        f"{len(pairs)} items: {output}. Give raters {which}; keep {output / 'key.json'} from them."
    )


def _write(output: Path, files: dict[str, str]) -> None:
    """Write all files; if one fails, remove the others, which would block the next try."""
    from shiftrm.files import atomic_write_text

    try:
        for name, text in files.items():  # the key first: a sheet is useless without it
            atomic_write_text(output / name, text)
    except BaseException:
        for name in files:
            (output / name).unlink(missing_ok=True)
        raise


def sheet_folder(option: str, inputs: Iterable[str]) -> Path:
    """Return the folder for a sheet; `inputs` are the files that the command reads.

    Raises:
        UserError: it cannot be a folder, or already contains a sheet, whose answers need its key.
    """
    from shiftrm.cli.checks import output_folder
    from shiftrm.errors import UserError

    output = output_folder(option, apart_from=inputs)
    names = ["key.json", "sheet*.csv", "sheet*.html"]
    if any(path for name in names for path in output.glob(name)):
        raise UserError(
            f"{output}: holds a sheet already, and its answers can only be read with its key; "
            "choose another --output"
        )
    return output
