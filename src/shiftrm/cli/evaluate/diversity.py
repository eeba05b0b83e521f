"""`shiftrm evaluate diversity`: similarity of the responses in files."""

from dataclasses import asdict, dataclass
from typing import Any

from shiftrm.cli.checks import named_paths, output_file
from shiftrm.cli.options import About, option, optional
from shiftrm.cli.output import print_tables, write_numbers
from shiftrm.cli.progress import bar, only_on_terminals
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
how it normalises. All files are cut to the same number of prompts and responses, since all of
these numbers depend on it.
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
        names = ("embedder", "tokenize", "seed")
        settings = {name: getattr(options, name) for name in names}
        write_numbers(output, {**asdict(report), "files": named, **settings})
    print_tables(_tables(report), report.lines)
    if output is not None:
        print(f"Numbers: {output}")


ROWS = {
    "similarity": "similarity (sum)",
    "self_bleu": "Self-BLEU, n = 2..5",
    "embedding_similarity": "embedding similarity",
    "distinct_1": "distinct 1-grams",
    "distinct_2": "distinct 2-grams",
    "distinct_3": "distinct 3-grams",
    "compression_ratio": "compression ratio",
}


def _tables(report: Any) -> Any:
    """Yield a table for each scope: a column for each file."""
    from shiftrm.report.tables import Table

    for scope in dict.fromkeys(d.scope for d in report.diversities):
        found = [d for d in report.diversities if d.scope == scope]
        rows = [
            ("prompts", *(str(each.prompts) for each in found)),
            ("responses", *(str(each.responses) for each in found)),
        ]
        for metric, label in ROWS.items():
            if any(metric in each.values for each in found):
                rows.append((label, *(str(each.values.get(metric, "-")) for each in found)))
        yield Table(f"Diversity {scope}", ("", *(each.name for each in found)), tuple(rows))
