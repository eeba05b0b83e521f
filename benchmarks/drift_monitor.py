"""Runs the study of the drift monitor in the gold world, and writes its page.

    python benchmarks/drift_monitor.py run --runs free:0-19 kl:0-19 gold:0-19 squashed:0-19 \\
        --output runs/drift --workers 2
    python benchmarks/drift_monitor.py replay --output runs/drift --seeds 0-19
    python benchmarks/drift_monitor.py report

`run` trains what is not in the folder yet, one file a run (about a minute of CPU each), so the
study can be made in parts and on several machines; it needs torch, transformers and accelerate.
`replay` has a monitor with labels watch every run, and writes benchmarks/drift_study/results.jsonl.
`report` writes docs/monitor.md and docs/monitor.png from that file alone.
"""

import argparse
import sys
import time
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from multiprocessing import get_context
from pathlib import Path

from seed_range import seeds_of
from shiftrm.errors import UserError

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "drift_study" / "results.jsonl"
OUTPUT = Path("runs/drift")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run_ = commands.add_parser("run", help="train runs")
    run_.add_argument("--runs", nargs="+", required=True, metavar="KIND:SEEDS")
    run_.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
    run_.add_argument("--workers", type=int, default=1, metavar="N", help="processes; default 1")
    run_.add_argument("--steps", type=int, default=None, metavar="N", help="default 70")
    run_.add_argument(
        "--seconds", type=float, default=None, metavar="S", help="begin no run after S seconds"
    )
    replay_ = commands.add_parser("replay", help="have a monitor watch the runs")
    replay_.add_argument("--output", type=Path, default=OUTPUT, metavar="DIR")
    replay_.add_argument("--seeds", default="0-19", metavar="FIRST-LAST")
    replay_.add_argument("--workers", type=int, default=1, metavar="N", help="processes; default 1")
    replay_.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    report_ = commands.add_parser("report", help="write the page and the picture")
    report_.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    report_.add_argument("--docs", type=Path, default=HERE.parent / "docs", metavar="DIR")
    args = parser.parse_args()
    try:
        return {"run": run, "replay": replay, "report": report}[args.command](args)
    except UserError as error:
        print(f"drift_monitor: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    from drift_study.runs import STEPS, parse_runs

    wanted = parse_runs(args.runs)
    began, steps = time.monotonic(), args.steps or STEPS
    until = None if args.seconds is None else began + args.seconds
    context = get_context("spawn")
    with ProcessPoolExecutor(args.workers, context, initializer=_one_thread) as pool:
        seeds = list(dict.fromkeys(seed for _, seed in wanted))
        waiting = {pool.submit(_start, seed, args.output, until) for seed in seeds}
        while waiting:
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for seed, said in (one.result() for one in done):
                print(f"{time.monotonic() - began:.0f} s: {said}", file=sys.stderr, flush=True)
                if seed is not None:  # its start is there: the runs can begin
                    names = [name for name, other in wanted if other == seed]
                    tasks = [(name, seed, args.output, steps) for name in names]
                    waiting |= {pool.submit(_run, task, until) for task in tasks}
    return 0


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _late(until: float | None) -> bool:
    """Whether the time is up; the clock is the machine's, the same in every process."""
    return until is not None and time.monotonic() > until


def _start(seed: int, output: Path, until: float | None) -> tuple[int | None, str]:
    from drift_study.start import make_start

    if _late(until):
        return None, f"start {seed} left out"
    return seed, str(make_start(seed, output / f"start-{seed}"))


def _run(task: tuple[str, int, Path, int], until: float | None) -> tuple[None, str]:
    from drift_study.runs import make_run

    if _late(until):
        return None, f"{task[0]} {task[1]} left out"
    return None, str(make_run(*task))


def replay(args: argparse.Namespace) -> int:
    from drift_study.replay import replay_all

    seeds = seeds_of(args.seeds, f"--seeds {args.seeds}: write SEED or FIRST-LAST")
    count = replay_all(args.output, seeds, args.results, args.workers)
    print(f"{count} runs: {args.results}")
    return 0


def report(args: argparse.Namespace) -> int:
    from drift_study.report import write_report

    for path in write_report(args.results, args.docs):
        print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
