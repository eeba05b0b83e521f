"""Runs a gold world's controls, prints which checks hold, and draws the picture.

    python benchmarks/gold_world_controls.py --seeds 0 1 2 --output runs/controls --workers 2
    python benchmarks/gold_world_controls.py --world adverts --quick --seeds 0 --output runs/adverts

About 13 minutes a seed on one core. An interrupted run continues when the same command is given
again. Exit status: 0 all checks hold, 1 one fails, 2 bad input. See docs/gold-world.md.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError
from shiftrm.files import atomic_write_text
from shiftrm.pipeline.engine import RECORDS_FILE, run_stages
from shiftrm.records import Record, read_records, write_records
from shiftrm.world.world import DEFAULT_WORLD, WORLDS, World


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--output", type=Path, default=Path("runs/controls"), metavar="DIR")
    parser.add_argument("--world", default=DEFAULT_WORLD, metavar="NAME", help="default topics")
    parser.add_argument(
        "--quick", action="store_true", help="a third of the time, for a first look"
    )
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes; default 1")
    parser.add_argument(
        "--docs",
        type=Path,
        metavar="DIR",
        help="also update the picture and the world's tables of gold-world.md in this folder",
    )
    args = parser.parse_args()
    from gold_world.controls import QUICK  # takes seconds, which --help need not

    try:
        settings = {"settings": (f"world.kind={args.world}",), **(QUICK if args.quick else {})}
        world = WORLDS.get(args.world)
        return run(world, settings, args.seeds, args.output, args.workers, args.docs)
    except UserError as error:
        print(f"gold_world_controls: error: {error}", file=sys.stderr)
        return 2


def run(
    world: World,
    settings: dict[str, Any],
    seeds: list[int],
    output: Path,
    workers: int,
    docs: Path | None,
) -> int:
    """Run the controls with these settings of `ControlsConfig`; return the exit status."""
    from gold_world.checks import check_controls
    from gold_world.controls import ControlsConfig, plan_controls
    from gold_world.report import (
        checks_table,
        controls_figure,
        controls_tables,
        feature_table,
        replace_block,
    )
    from shiftrm.report.plots import render

    suffix = "" if world.name == DEFAULT_WORLD else f"-{world.name}"
    records: list[Record] = []
    for seed in dict.fromkeys(seeds):
        root = output / f"seed-{seed}"
        stages = plan_controls(ControlsConfig(seed=seed, **settings))

        def progress(event: str, name: str, seed: int = seed) -> None:
            if event == "done":
                print(f"seed {seed}: {name} done", file=sys.stderr, flush=True)

        run_stages(stages, root, seed=seed, workers=workers, on_progress=progress)
        records += read_records(root / RECORDS_FILE)

    config = ControlsConfig(**settings)
    checks = check_controls(records, config)
    write_records(output / RECORDS_FILE, records)
    picture = render(controls_figure(records, config), format="png")
    tables = controls_tables(records, config, checks)
    name = f"gold-world-controls{suffix}"
    (output / f"{name}.png").write_bytes(picture)
    atomic_write_text(output / f"{name}.md", tables + "\n")
    if docs is not None:
        (docs / f"{name}.png").write_bytes(picture)
        replace_block(docs / "gold-world.md", f"features{suffix}", feature_table(world))
        replace_block(docs / "gold-world.md", f"controls{suffix}", tables)
    print(checks_table(checks))
    failed = sum(not check.holds for check in checks)
    print(f"\n{len(checks) - failed} of {len(checks)} checks hold. Picture: {output}")
    return 1 if failed else 0


if __name__ == "__main__":  # the engine's workers import this file again
    sys.exit(main())
