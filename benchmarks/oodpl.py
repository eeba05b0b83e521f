"""Runs the study of OODPL over domains, and writes its part of docs/oodpl.md.

    python benchmarks/oodpl.py inner --world tastes --seeds 100-103
    python benchmarks/oodpl.py sweep --world tastes --seeds 100-103
    python benchmarks/oodpl.py arms --world tastes --seeds 0-9
    python benchmarks/oodpl.py arms --world signed --seeds 0-9
    python benchmarks/oodpl.py convergence --world tastes --seeds 100
    python benchmarks/oodpl.py report

The first four add what is missing to benchmarks/oodpl_study/results.jsonl, a row for every seed and
setting, so that the study can be made in parts; several processes may share the file. `inner`,
`sweep` and `convergence` use the last source domains and never read a held-out one. `report` writes
the page's blocks and pictures from the rows alone.
"""

import argparse
import sys
import time
from pathlib import Path

from seed_range import seeds_of
from shiftrm.errors import UserError

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "oodpl_study" / "results.jsonl"
WORLDS = ("tastes", "signed", "named", "topics")
OUTPUT = Path("runs/oodpl-study")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, about in (
        ("inner", "what inner steps do at best, under gold weights"),
        ("sweep", "settings of OODPL on the watched domains"),
        ("arms", "all methods in the held-out domains"),
        ("convergence", "the gradient's norm by outer step, for several beta"),
    ):
        command = commands.add_parser(name, help=about)
        command.add_argument("--world", choices=WORLDS, default="tastes")
        command.add_argument("--seeds", default="100", metavar="FIRST-LAST")
        command.add_argument("--names", nargs="+", default=[], metavar="NAME", help="default: all")
        command.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
        command.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
        command.add_argument(
            "--seconds", type=float, default=None, metavar="S", help="begin nothing after S seconds"
        )
    report_ = commands.add_parser("report", help="write the page's blocks and pictures")
    report_.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    report_.add_argument("--docs", type=Path, default=HERE.parent / "docs", metavar="DIR")
    args = parser.parse_args()
    try:
        return report(args) if args.command == "report" else make(args)
    except UserError as error:
        print(f"oodpl: error: {error}", file=sys.stderr)
        return 2


def make(args: argparse.Namespace) -> int:
    import torch

    from oodpl_study.plan import make_rows

    torch.set_num_threads(1)
    until = None if args.seconds is None else time.monotonic() + args.seconds
    for line in make_rows(
        args.command,
        args.world,
        seeds_of(args.seeds, f"--seeds {args.seeds}: write SEED or FIRST-LAST"),
        args.names,
        folder=args.output,
        results=args.results,
        until=until,
    ):
        print(line, flush=True)
    return 0


def report(args: argparse.Namespace) -> int:
    from oodpl_study.report import write_report

    for path in write_report(args.results, args.docs):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
