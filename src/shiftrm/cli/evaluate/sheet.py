"""`shiftrm evaluate sheet`: write blind sheets of responses for human raters."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from shiftrm.cli.checks import output_folder
from shiftrm.cli.options import About, inputs, option
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text, remove_unfinished, together

EPILOG = """examples:
  shiftrm evaluate sheet --ours metarm.jsonl --theirs sft.jsonl --output sheet
  shiftrm evaluate sheet --ours metarm.jsonl --theirs sft.jsonl --output sheet \\
      --limit 60 --raters 3 --question "Which response is more helpful?"

Rows are {"prompt", "responses"} as `shiftrm sample` writes them (the first response is taken), or
{"prompt", "response"}. Both files answer the same prompts; --limit of them are drawn, the same as
`shiftrm evaluate win-rate` draws with this seed. Order and sides are drawn from a number that only
the key holds, so no two sheets are the same.

The folder gets sheet.html, a page that needs no network, sheet.csv for a spreadsheet (A, B or tie
under `answer`), and key.json, which says whose response is whose: give raters one of the first
two, and keep the key. With --raters R there are sheets 1 to R: the same items in orders of their
own, and for every second rater A and B the other way round. Raters save their answers as a file;
`shiftrm evaluate answers` reads those.
"""

ABOUT = About(
    help="write a blind sheet of two models' responses for human raters",
    description="Writes a blind, shuffled sheet that asks which of two responses is better.",
    epilog=EPILOG + SOURCE_HELP,
    again="to start anew",
)


KEY = "key.json"


@dataclass(frozen=True, kw_only=True)
class Options:
    ours: str = option("DATA", "responses of our model", reads=True)
    theirs: str = option("DATA", "responses of the other", reads=True)
    output: str = option("DIR", "folder to write")
    limit: int = option("N", "items, 0 for all", default=100, least=0)
    seed: int = option("N", "seed with which prompts are drawn", default=0)
    raters: int = option("R", "number of sheets", default=1, least=1)
    question: str = option("TEXT", "what the page asks", default="Which response is better?")


def run(options: Options) -> None:
    import secrets

    from shiftrm.data.sources import iterate_rows
    from shiftrm.measure.judges.comparing import draw, match_rows
    from shiftrm.measure.people.blinding import distinct, make_sheet, place
    from shiftrm.measure.people.key_files import key_text, sheet_csv, too_long_for_cells
    from shiftrm.report.sheet import sheet_page

    output = sheet_folder(options.output, inputs(options))
    sides = [[row for _, row in iterate_rows(source)] for source in (options.ours, options.theirs)]
    matched = match_rows(*sides, names=(options.ours, options.theirs))
    drawn = draw(matched, options.limit or None, seed=options.seed)
    pairs = distinct(drawn)
    secret = secrets.randbelow(2**63)
    placements = place(len(pairs), raters=options.raters, seed=secret)
    sheets = [
        make_sheet(pairs, placed, rater=rater) for rater, placed in enumerate(placements, start=1)
    ]
    names = ("ours", "theirs", "limit", "seed")
    settings = {name: getattr(options, name) for name in names}
    key = key_text(pairs, sheets, placements, settings={**settings, "secret": secret})
    files = {}
    for number, sheet in enumerate(sheets, start=1):
        name = "sheet" if len(sheets) == 1 else f"sheet-{number}"
        files[f"{name}.csv"] = sheet_csv(sheet)
        files[f"{name}.html"] = sheet_page(sheet, question=options.question)
    _write(output, {**files, KEY: key})  # the key last: see `together`
    if len(drawn) < len(matched):
        print(f"{len(drawn)} of {len(matched)} prompts, drawn with seed {options.seed}.")
    if len(pairs) < len(drawn):
        print(f"Left out: {len(drawn) - len(pairs)} pairs of responses that came before.")
    if long := too_long_for_cells(sheets[0]):
        print(f"{long} items are too long for a spreadsheet's cells: use the page for those.")
    which = "sheet.html or sheet.csv" if len(sheets) == 1 else "one sheet-N.html or .csv each"
    print(f"{len(pairs)} items: {output}. Give raters {which}; keep {output / KEY} from them.")


def _write(output: Path, files: dict[str, str]) -> None:
    """Write all files or none: some of them would block the next try."""
    with together():
        for name, text in files.items():
            atomic_write_text(output / name, text)


def sheet_folder(option: str, inputs: Iterable[str]) -> Path:
    """Return the folder for a sheet; `inputs` are the files that the command reads.

    Raises:
        UserError: it cannot be a folder, or already contains a sheet, whose answers need its key.
    """

    output = output_folder(option, apart_from=inputs)
    remove_unfinished(output / KEY)
    found = [path for name in ("sheet*.csv", "sheet*.html") for path in output.glob(name)]
    if not (output / KEY).exists():  # with a key they are finished
        for path in found:
            remove_unfinished(path)
    if (output / KEY).exists() or any(path.exists() for path in found):
        raise UserError(
            f"{output}: holds a sheet already, and its answers can only be read with its key; "
            "choose another --output"
        )
    return output
