"""`shiftrm report`: write the page of one or several runs from their records."""

from dataclasses import dataclass

from shiftrm.cli.checks import output_file
from shiftrm.cli.options import About, option, optional

EPILOG = """examples:
  shiftrm report runs/demo
  shiftrm report runs/seed-0 runs/seed-1 runs/seed-2 --output three-seeds.html

Takes the folders of `shiftrm demo` and of `shiftrm run`.
"""

ABOUT = About(
    help="make the page of a run, or of several seeds together",
    description="Reads the records of finished runs and writes one self-contained HTML page. "
    "Runs of several seeds are shown together, with intervals.",
    epilog=EPILOG,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    runs: list[str] = option("DIR", "output folder of a run", positional=True, nargs="+")
    output: str | None = optional("FILE", "page to write", shown="report.html in the first folder")


def run(options: Options) -> None:
    from pathlib import Path

    from shiftrm.pipeline.engine import RECORDS_FILE
    from shiftrm.pipeline.folder import CONFIG_FILE
    from shiftrm.report.runs import PAGE_FILE, write_page

    runs = [Path(run) for run in options.runs]
    inputs = [run / name for run in runs for name in (RECORDS_FILE, CONFIG_FILE)]
    own = Path(options.output or runs[0] / PAGE_FILE)
    again = own in [run / PAGE_FILE for run in runs]  # a run's own page is rewritten
    output = output_file(str(own), apart_from=inputs, may_exist=again)
    print(f"Page: {write_page(runs, output)}")
