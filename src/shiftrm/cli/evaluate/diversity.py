"""`shiftrm evaluate diversity`: similarity of the responses in files."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.cli.options import About, option, optional
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.errors import UserError, suggest

EPILOG = """examples:
  shiftrm evaluate diversity sft.jsonl ppo.jsonl --output diversity.json
  shiftrm evaluate diversity sft=a.jsonl round3=b.jsonl --embedder models/all-MiniLM-L6-v2 \\
      --output diversity.json
  shiftrm evaluate diversity chinese.jsonl --tokenize char --scope across --output diversity.json

Rows are {"prompt", "responses": [...]}, as `shiftrm sample` writes them, or {"prompt", "response"}.
Within prompts, the responses to one prompt are compared with each other; across prompts, one
response each to different prompts. Lower Self-BLEU, embedding similarity and compression are more
diverse, and so are higher distinct shares. "similarity" is the MetaRM paper's sum: Self-BLEU as a
share (n = 2..5) plus the mean cosine with negative values as 0, in [0, 2]; the paper does not say
how it normalises. All files are cut to one number of prompts and responses, since every one of
these numbers depends on it.
"""

ABOUT = About(
    help="how alike are the responses? Self-BLEU, embeddings, distinct n-grams, compression",
    description="Measures how alike responses are, file beside file; the others are compared "
    "with the first one.",
    epilog=EPILOG + SOURCE_HELP,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    files: list[str] = option(
        "[NAME=]FILE",
        "responses; NAME is what the table calls it",
        positional=True,
        nargs="+",
    )
    embedder: str | None = optional(
        "DIR",
        "embedding model: for sentence-transformers (if installed), or a plain transformers "
        "model, which is mean-pooled; without one, there is no embedding similarity and no sum",
    )
    scope: str = option(choices=("both", "within", "across"), default="both")
    tokenize: str = option("NAME", "sacrebleu's: 13a, intl, char, zh, none", default="13a")
    prompts: int | None = optional(
        "N", "compare at most N prompts, drawn with the seed", shown="all", least=2
    )
    output: str | None = optional("FILE", "all numbers, as JSON")
    batch_size: int = option("N", default=64, least=1)
    seed: int = option("N", "seed of draws and intervals", default=0)


def run(options: Options) -> None:
    from shiftrm.cli.checks import named_paths, output_file
    from shiftrm.cli.progress import bar, only_on_terminals
    from shiftrm.measure.diversity import TOKENIZERS
    from shiftrm.measure.diversity_files import ACROSS, WITHIN, measure_diversity, read_responses
    from shiftrm.measure.embeddings import load_embedder

    if options.tokenize not in TOKENIZERS:
        advice = suggest(options.tokenize, list(TOKENIZERS))
        raise UserError(f"--tokenize {options.tokenize!r}: unknown tokenizer{advice}")
    named = named_paths(options.files)
    output = None
    if options.output is not None:
        output = output_file(options.output, apart_from=[*named.values(), options.embedder])
    only_on_terminals()
    files = [read_responses(source, name) for name, source in named.items()]
    embed = None
    if options.embedder is not None:
        embed = load_embedder(options.embedder, batch_size=options.batch_size)
    scopes = {"both": (WITHIN, ACROSS), "within": (WITHIN,), "across": (ACROSS,)}[options.scope]
    with bar("measuring diversity", None) as advance:  # the total is not yet known
        report = measure_diversity(
            files,
            embed=embed,
            scopes=scopes,
            tokenizer=options.tokenize,
            max_prompts=options.prompts,
            seed=options.seed,
            progress=advance,
        )
    if output is not None:
        _write(output, options, named, report)
    _show(report)
    if output is not None:
        print(f"Numbers: {output}")


def _write(path: Path, options: Options, named: dict[str, str], report: Any) -> None:
    from dataclasses import asdict

    from shiftrm.cli.evaluate.output import write_numbers

    content = {
        **asdict(report),
        "files": named,
        "embedder": options.embedder,
        "tokenize": options.tokenize,
        "seed": options.seed,
    }
    write_numbers(path, content)


ROWS = {
    "similarity": "similarity (sum)",
    "self_bleu": "Self-BLEU, n = 2..5",
    "embedding_similarity": "embedding similarity",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
    "distinct_3": "distinct 3-grams",
    "compression_ratio": "compression ratio",
}


def _show(report: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    from shiftrm.cli.evaluate.output import console

    out = console()
    for scope in dict.fromkeys(d.scope for d in report.diversities):
        found = [d for d in report.diversities if d.scope == scope]
        table = Table(title=f"Diversity {scope}", title_justify="left")
        table.add_column("")
        for each in found:
            table.add_column(Text(each.name), justify="right")
        table.add_row("prompts", *(str(each.prompts) for each in found))
        table.add_row("responses", *(str(each.responses) for each in found))
        for metric, label in ROWS.items():
            if any(metric in each.values for each in found):
                cells = (str(each.values.get(metric, "-")) for each in found)
                table.add_row(label, *(Text(cell) for cell in cells))
        out.print(table)
    for line in report.lines:
        out.print(Text(line))
