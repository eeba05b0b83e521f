"""`shiftrm score`: score the responses in a file with a reward model."""

import argparse
from typing import Any

from shiftrm.data.sources import SOURCE_HELP

EPILOG = """examples:
  shiftrm score --model models/reward --data responses.jsonl --output scored.jsonl
  shiftrm score --model models/reward --data groups.jsonl --output scored.jsonl

Rows are {"prompt", "response"} (a `reward` is added), {"prompt", "responses"} (a list `rewards`),
or preference pairs {"prompt"?, "chosen", "rejected"} (`reward_chosen`, `reward_rejected`).
"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "score",
        help="score responses with a reward model",
        description="Adds the rewards of a reward model to every row of some data, as JSONL.",
        epilog=EPILOG + SOURCE_HELP,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint or hub name")
    parser.add_argument("--data", required=True, metavar="DATA", help="rows to score, see below")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL with rewards added")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.set_defaults(run=run, again="to start anew; nothing was written")


def run(args: argparse.Namespace) -> None:
    from shiftrm.cli.checks import at_least_one, output_rows
    from shiftrm.cli.progress import bar, only_on_terminals
    from shiftrm.data.sources import iterate_rows
    from shiftrm.errors import UserError
    from shiftrm.files import json_line, write_jsonl
    from shiftrm.models.loading import to_accelerator
    from shiftrm.models.scoring import Scorer, row_responses

    at_least_one(args.batch_size, "--batch-size")
    output = output_rows(args.output, apart_from=[args.model, args.data])
    rows = [(row, where, row_responses(row, where)) for where, row in iterate_rows(args.data)]
    if not rows:
        raise UserError(f"{args.data}: the file has no rows")
    for row, where, _ in rows:
        try:
            json_line(row)
        except ValueError:  # before the slow scoring
            raise UserError(
                f"{where}: holds NaN or an infinity, which JSON cannot; write null instead"
            ) from None
    only_on_terminals()
    scorer = Scorer.from_pretrained(args.model)
    to_accelerator(scorer.model)
    sequences = [
        scorer.encode_response(text, name=where) for _, where, texts in rows for text in texts
    ]
    with bar("scoring", len(sequences)) as advance:
        scored = scorer.score_ids(sequences, batch_size=args.batch_size, progress=advance)
    scorer.require_finite(scored, [where for _, where, texts in rows for _ in texts])
    rewards = iter(scored)
    for row, _, texts in rows:
        values = [next(rewards) for _ in texts]
        if "response" in row:
            row["reward"] = values[0]
        elif "responses" in row:
            row["rewards"] = values
        else:
            row["reward_chosen"], row["reward_rejected"] = values
    write_jsonl(output, (row for row, _, _ in rows))
    print(f"{len(rows)} rows, {len(sequences)} responses scored: {output}")
