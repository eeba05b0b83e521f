"""`shiftrm score`: score the responses in a file with a reward model."""

from collections import Counter
from dataclasses import dataclass

from shiftrm.cli.checks import output_rows
from shiftrm.cli.options import About, inputs, option
from shiftrm.cli.progress import bar, only_on_terminals
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.errors import UserError
from shiftrm.files import json_line, write_jsonl

EPILOG = """examples:
  shiftrm score --model models/reward --data responses.jsonl --output scored.jsonl
  shiftrm score --model models/reward --data groups.jsonl --output scored.jsonl

Rows are {"prompt", "response"} (a `reward` is added), {"prompt", "responses"} (a list `rewards`),
or preference pairs {"prompt"?, "chosen", "rejected"} (`reward_chosen`, `reward_rejected`). Columns
of these names that a row already has are replaced, and counted in the last line.
"""

ABOUT = About(
    help="score responses with a reward model",
    description="Adds the rewards of a reward model to every row of some data, as JSONL.",
    epilog=EPILOG + SOURCE_HELP,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    model: str = option("DIR", "checkpoint or hub name", reads=True)
    data: str = option("DATA", "rows to score, see below", reads=True)
    output: str = option("FILE", "JSONL with rewards added")
    batch_size: int = option("N", default=64, least=1)


def run(options: Options) -> None:
    from shiftrm.data.sources import iterate_rows
    from shiftrm.models.scoring import Scorer, row_responses

    output = output_rows(options.output, apart_from=inputs(options))
    rows = [(row, where, row_responses(row, where)) for where, row in iterate_rows(options.data)]
    if not rows:
        raise UserError(f"{options.data}: the file has no rows")
    for row, where, _ in rows:
        try:
            json_line(row)
        except ValueError:  # before the slow scoring
            raise UserError(
                f"{where}: holds NaN or an infinity, which JSON cannot; write null instead"
            ) from None
    only_on_terminals()
    scorer = Scorer.from_pretrained(options.model).to_accelerator()
    sequences = [
        scorer.encode_response(text, name=where) for _, where, texts in rows for text in texts
    ]
    with bar("scoring", len(sequences)) as advance:
        scored = scorer.score_ids(sequences, batch_size=options.batch_size, progress=advance)
    scorer.require_finite(scored, [where for _, where, texts in rows for _ in texts])
    rewards = iter(scored)
    replaced: Counter[str] = Counter()
    for row, _, texts in rows:
        values = [next(rewards) for _ in texts]
        if "response" in row:
            found: dict[str, float | list[float]] = {"reward": values[0]}
        elif "responses" in row:
            found = {"rewards": values}
        else:
            found = dict(zip(("reward_chosen", "reward_rejected"), values, strict=True))
        replaced.update(name for name in found if row.get(name) is not None)
        row |= found
    write_jsonl(output, (row for row, _, _ in rows))
    print(f"{len(rows)} rows, {len(sequences)} responses scored: {output}")
    if replaced:
        words = ", ".join(f"{name} ({count})" for name, count in replaced.items())
        print(f"columns that rows already had, replaced: {words}")
