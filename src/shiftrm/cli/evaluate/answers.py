"""`shiftrm evaluate answers`: read and count raters' answers to a blind sheet."""

import argparse
from typing import Any

EPILOG = """examples:
  shiftrm evaluate answers --key sheet/key.json --answers answers-*.json --output human.jsonl
  shiftrm evaluate answers --key sheet/key.json --answers ann.csv bob.csv \\
      --verdicts judged/verdicts.jsonl --output human.jsonl

Answers are the files that sheet.html saves, or sheet.csv with A, B or tie under `answer`. A rater
is called by the column `rater`, or else by the file. --verdicts takes the verdicts.jsonl that
`shiftrm evaluate win-rate` wrote about the same two files. The output holds one line for each item
and rater, with the outcome for our response. All intervals are 95 % bootstrap intervals over
prompts.
"""


def register(subparsers: Any) -> None:
    parser = subparsers.add_parser(
        "answers",
        help="count raters' answers to a blind sheet",
        description="Reads raters' answers with the key of their sheet: wins, ties and losses, "
        "agreement of the raters, and agreement with a judge.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--key", required=True, metavar="FILE", help="the sheet's key.json")
    parser.add_argument(
        "--answers", required=True, nargs="+", metavar="FILE", help="CSV or JSON of each rater"
    )
    parser.add_argument("--verdicts", metavar="DATA", help="a judge's verdicts, to compare with")
    parser.add_argument("--output", required=True, metavar="FILE", help="JSONL to write")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the bootstrap")
    parser.set_defaults(run=run, again="to start anew; nothing was written")


def run(args: argparse.Namespace) -> None:
    from shiftrm.cli.checks import output_rows
    from shiftrm.files import write_jsonl
    from shiftrm.measure.people.answers import read_answers
    from shiftrm.measure.people.key_files import read_key, read_verdicts
    from shiftrm.measure.people.result import human_result, human_sentences

    output = output_rows(args.output, apart_from=[args.key, *args.answers, args.verdicts])
    key = read_key(args.key)
    answers = read_answers(args.answers, key)
    judge = None if args.verdicts is None else read_verdicts(args.verdicts, key)
    result = human_result(answers, judge=judge, seed=args.seed)
    rows = [
        {
            "id": answer.pair,
            "prompt": key.pairs[answer.pair].prompt,
            "ours": key.pairs[answer.pair].ours,
            "theirs": key.pairs[answer.pair].theirs,
            "outcome": answer.outcome,
            "rater": answer.rater,
            "choice": answer.choice,
            "ours_was": answer.ours,
            "comment": answer.comment,
        }
        for answer in answers
    ]
    write_jsonl(output, rows)
    for sentence in human_sentences(result):
        print(sentence)
    print(f"{len(rows)} rows: {output}")
