"""`shiftrm evaluate rewardbench`: RewardBench 1 and 2."""

from dataclasses import asdict, dataclass
from typing import Any

from shiftrm.cli.checks import output_file, output_rows
from shiftrm.cli.options import About, inputs, option, optional
from shiftrm.cli.output import print_tables, write_numbers
from shiftrm.cli.progress import bar, only_on_terminals
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.files import together, write_jsonl

EPILOG = """examples:
  shiftrm evaluate rewardbench --model models/reward --data allenai/reward-bench-2
  shiftrm evaluate rewardbench --model models/reward --data reward_bench_1.jsonl \\
      --output rewardbench.json

RewardBench 1 has rows {"prompt", "chosen", "rejected", "subset", "id"}; rows of the prior sets
(anthropic_helpful, anthropic_hhh, shp, summarize) may be among them and count as half a section.
RewardBench 2 has lists: {"id", "prompt", "chosen": [...], "rejected": [...], "num_correct",
"num_incorrect", "total_completions", "subset"}. The rows show which one it is. Scores are those
of reward-bench's own scripts: weighted sections in version 1; best of 4 and Ties in version 2.
"""

ABOUT = About(
    help="score a reward model on RewardBench 1 or 2",
    description="Scores the responses of RewardBench with a reward model, and prints what the "
    "leaderboard would.",
    epilog=EPILOG + SOURCE_HELP,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = option("DIR", "checkpoint or hub name", reads=True)
    data: str = option("DATA", "file or hub name, see below", reads=True)
    output: str | None = optional("FILE", "all numbers, as JSON")
    scores: str | None = optional("FILE", "the scores of every row, as JSON lines")
    max_length: int = option(
        "N",
        "tokens after which a text is cut, as in reward-bench",
        default=2048,
        shown="2048, or the model's context",
        least=1,
    )
    batch_size: int = option("N", default=64, least=1)


def run(options: Options) -> None:
    from shiftrm.measure.rewardbench import describe, rewardbench_1, rewardbench_2
    from shiftrm.measure.rewardbench_files import read_rewardbench, score_rewardbench
    from shiftrm.models.scoring import Scorer

    output = rows_file = None
    if options.output is not None:
        output = output_file(options.output, apart_from=inputs(options))
    if options.scores is not None:
        rows_file = output_rows(options.scores, apart_from=[*inputs(options), options.output])
    only_on_terminals()
    data = read_rewardbench(options.data)
    scorer = Scorer.from_pretrained(options.model).to_accelerator()
    total = sum(len(row.chosen) + len(row.rejected) for row in data.rows)
    with bar(f"RewardBench {data.version}", total) as progress:
        scores = score_rewardbench(
            scorer,
            data,
            batch_size=options.batch_size,
            max_length=options.max_length,
            progress=progress,
        )
    found: Any = (rewardbench_1 if data.version == 1 else rewardbench_2)(scores.rows)
    _write(options, output, rows_file, found, scores, data.version)
    lines = [*describe(found)]
    if scores.truncated:
        cut = f"{scores.truncated} of {scores.responses} responses were cut"
        lines.append(f"! {cut} to {scores.limit} tokens.")
    print_tables([_table(data.version, found)], lines)
    for name, path in (("Numbers", output), ("Scores", rows_file)):
        if path is not None:
            print(f"{name}: {path}")


def _write(
    options: Options, output: Any, rows_file: Any, found: Any, scores: Any, version: int
) -> None:
    content = {
        "benchmark": f"RewardBench {version}",
        "model": options.model,
        "data": options.data,
        **asdict(found),
        "responses": scores.responses,
        "truncated": scores.truncated,
        "max_length": scores.limit,
    }
    with together():
        if rows_file is not None:
            write_jsonl(rows_file, (row._asdict() for row in scores.rows))
        if output is not None:
            write_numbers(output, content)


def _table(version: int, found: Any) -> Any:
    """Return the table of scores, part by part."""
    from shiftrm.measure.rewardbench import PRIOR_SETS, SECTIONS
    from shiftrm.report.tables import Table

    lines: list[tuple[str, float | None, int]] = []
    rows = found.rows
    if version == 1:
        for section, score in found.sections.items():
            names = [name for name in SECTIONS[section] if name in found.subsets]
            lines.append((section, score, sum(rows[name] for name in names)))
            lines += [(f"  {name}", found.subsets[name], rows[name]) for name in names]
        if found.prior_sets is not None:
            count = sum(rows.get(name, 0) for name in PRIOR_SETS)
            lines.append(("Prior sets (weight 0.5)", found.prior_sets, count))
    else:
        lines += [(name, score, rows.get(name, 0)) for name, score in found.domains.items()]
    lines += [(f"{name} (apart)", score, rows[name]) for name, score in found.other.items()]
    lines.append(("overall", found.overall, sum(rows.values())))
    cells = tuple(
        (name, "-" if score is None else f"{score:.3f}", str(count)) for name, score, count in lines
    )
    return Table(f"RewardBench {version}", ("part", "score", "rows"), cells)
