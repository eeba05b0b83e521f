"""`shiftrm evaluate answers`: read and count raters' answers to a blind sheet."""

from dataclasses import dataclass

from shiftrm.cli.checks import output_rows
from shiftrm.cli.options import About, inputs, option, optional
from shiftrm.files import write_jsonl

EPILOG = """examples:
  shiftrm evaluate answers --key sheet/key.json --answers answers-*.json --output human.jsonl
  shiftrm evaluate answers --key sheet/key.json --answers ann.csv bob.csv \\
      --verdicts judged/verdicts.jsonl --output human.jsonl

Answers are the files that sheet.html saves, or sheet.csv with A, B or tie under `answer`. The
column `rater` names the rater, or else the file does. --verdicts takes the verdicts.jsonl that
`shiftrm evaluate win-rate` wrote about the same two files. The output holds one line for each item
and rater, with the outcome for our response. All intervals are 95 % bootstrap intervals over
prompts.
"""

ABOUT = About(
    help="count raters' answers to a blind sheet",
    description="Reads raters' answers with the key of their sheet: wins, ties and losses, "
    "agreement of the raters, and agreement with a judge.",
    epilog=EPILOG,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    key: str = option("FILE", "the sheet's key.json", reads=True)
    answers: list[str] = option("FILE", "CSV or JSON of each rater", nargs="+", reads=True)
    verdicts: str | None = optional("DATA", "a judge's verdicts, to compare with", reads=True)
    output: str = option("FILE", "JSONL to write")
    seed: int = option("N", "seed of the bootstrap", default=0)


def run(options: Options) -> None:
    from shiftrm.measure.people.answers import read_answers
    from shiftrm.measure.people.key_files import read_key, read_verdicts
    from shiftrm.measure.people.result import human_result, human_sentences

    output = output_rows(options.output, apart_from=inputs(options))
    key = read_key(options.key)
    answers = read_answers(options.answers, key)
    judge = None if options.verdicts is None else read_verdicts(options.verdicts, key)
    result = human_result(answers, judge=judge, seed=options.seed)
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
