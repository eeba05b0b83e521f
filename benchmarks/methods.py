"""Runs the study of ways to adapt a reward model, and writes its table and picture.

    python benchmarks/methods.py run --seeds 0 1 2 3 4 5 6 7 8 9 --kl 6 12 --output runs/methods
    python benchmarks/methods.py report

`run` adds every finished arm to benchmarks/methods_study/results.jsonl and leaves out what is there
so that the study can be made in parts, on several machines or days (about 35 seconds of CPU per
arm and round). `report` writes docs/methods.md and docs/methods.png from that file alone.
"""

import argparse
import sys
from pathlib import Path

from shiftrm.errors import UserError

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "methods_study" / "results.jsonl"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run_ = commands.add_parser("run", help="run arms of the study and add them to the results")
    run_.add_argument("--seeds", type=int, nargs="+", required=True, metavar="N")
    run_.add_argument("--kl", type=float, nargs="+", default=[6.0, 12.0], metavar="NATS")
    run_.add_argument("--arms", nargs="+", default=["all"], metavar="NAME", help="default: all")
    run_.add_argument("--rounds", type=int, default=3, metavar="N", help="default 3")
    run_.add_argument("--world", default="", metavar="NAME", help="default: the first gold world")
    run_.add_argument("--output", type=Path, default=Path("runs/methods"), metavar="DIR")
    run_.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    run_.add_argument("--workers", type=int, default=1, metavar="N", help="processes; default 1")
    report_ = commands.add_parser("report", help="write the page and the picture")
    report_.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    report_.add_argument("--docs", type=Path, default=HERE.parent / "docs", metavar="DIR")
    args = parser.parse_args()
    try:
        return run(args) if args.command == "run" else report(args)
    except UserError as error:
        print(f"methods: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    from methods_study.arms import arms_of
    from methods_study.plan import StudyConfig, plan_study
    from methods_study.results import add_results, read_results, results_of
    from shiftrm.pipeline.engine import RECORDS_FILE, run_stages
    from shiftrm.records import read_records
    from stage_clock import StageClock

    arms = arms_of(args.arms)
    for kl in args.kl:
        for seed in dict.fromkeys(args.seeds):
            done = {r.key for r in read_results(args.results)}
            missing = {
                name: arm
                for name, arm in arms.items()
                if (args.world, kl, seed, name, args.rounds) not in done
            }
            if not missing:
                continue
            root = args.output / (args.world or "world") / f"kl-{kl:g}" / f"seed-{seed}"
            config = StudyConfig(seed, kl, missing, rounds=args.rounds, world=args.world)

            clock = StageClock(str(root))
            stages = plan_study(config)
            run_stages(stages, root, seed=seed, workers=args.workers, on_progress=clock)
            found = results_of(
                read_records(root / RECORDS_FILE),
                world=args.world,
                kl_target=kl,
                resets=[name for name, about in missing.items() if about.arm.resets_reference],
                seconds=clock.seconds,
            )
            add_results(args.results, [r for r in found if r.key not in done])
    return 0


def report(args: argparse.Namespace) -> int:
    from gold_world.report import replace_block
    from methods_study.report import pages, picture, studies
    from methods_study.results import read_results
    from shiftrm.report.plots import render

    results = read_results(args.results)
    if not results:
        raise UserError(f"{args.results}: no results; make some with `methods.py run`")
    for name, content in pages(results).items():
        replace_block(args.docs / "methods.md", name, content)
    (args.docs / "methods.png").write_bytes(render(picture(studies(results)), format="png"))
    print(f"{args.docs / 'methods.md'}, {args.docs / 'methods.png'}")
    return 0


if __name__ == "__main__":  # the engine's workers import this file again
    sys.exit(main())
