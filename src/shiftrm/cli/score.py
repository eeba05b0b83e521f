"""`shiftrm score`: rewards of responses in a file."""

import argparse
from typing import Any

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
        description="Adds the rewards of a reward model to every row of a JSONL file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, metavar="DIR", help="checkpoint or hub name")
    parser.add_argument("--data", required=True, metavar="FILE", help="JSONL to score")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL with rewards added")
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="default: 64")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    from shiftrm.files import iterate_jsonl, write_jsonl
    from shiftrm.scoring import Scorer, scorable_texts

    rows = [(where, row) for where, row in iterate_jsonl(args.data)]
    texts = [scorable_texts(row, where) for where, row in rows]
    scorer = Scorer.from_pretrained(args.model)
    flat = [text for row_texts in texts for text in row_texts]
    rewards = iter(
        scorer(
            [t.prompt for t in flat],
            [t.response for t in flat],
            finished=[t.finished for t in flat],
            batch_size=args.batch_size,
        )
    )
    for (_, row), row_texts in zip(rows, texts, strict=True):
        values = [next(rewards) for _ in row_texts]
        if "response" in row:
            row["reward"] = values[0]
        elif "responses" in row:
            row["rewards"] = values
        else:
            row["reward_chosen"], row["reward_rejected"] = values
    write_jsonl(args.output, (row for _, row in rows))
    print(f"{len(rows)} rows, {len(flat)} responses scored: {args.output}")
