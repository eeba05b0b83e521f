"""`shiftrm diagnose`: check whether a reward model still tells responses apart."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.cli.checks import named_paths, output_file, output_folder
from shiftrm.cli.options import About, option, optional
from shiftrm.cli.output import print_tables
from shiftrm.cli.progress import bar, only_on_terminals
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.files import together

EPILOG = """examples:
  shiftrm diagnose --model models/reward --data sft.jsonl policy.jsonl
  shiftrm diagnose --model models/reward --data sft=sft.jsonl round3=policy.jsonl \\
      heldout=pairs.jsonl --output diagnosis
  shiftrm diagnose --model before=models/reward --model after=models/adapted \\
      --data policy.jsonl labelled=pairs.jsonl --output change.html --json change.json

A file holds groups {"prompt", "responses", "finished"?}, as `shiftrm sample` writes them, or
labelled pairs {"prompt"?, "chosen", "rejected"}. The first file is the reference (such as samples
of the SFT policy); the next ones are compared with it (such as samples of the current policy). Only
labels can show that a model sees; without them the verdict is about spread. Sight tests need no
labels: they ask how often the model prefers a response to one that is presumably worse, such as a
response to another prompt.
"""

ABOUT = About(
    help="does a reward model still tell responses apart?",
    description="Scores files of groups or labelled pairs, prints the numbers side by side "
    "with a verdict in words, and writes them as a page and as JSON.",
    epilog=EPILOG + SOURCE_HELP,
)


@dataclass(frozen=True, kw_only=True)
class Options:
    model: list[str] = option(
        "[NAME=]DIR",
        "checkpoint or hub name; given twice or more, the others are compared with the first",
    )
    data: list[str] = option(
        "[NAME=]FILE",
        "groups or pairs, the reference first; NAME is what the tables call it",
        nargs="+",
    )
    output: str | None = optional(
        "PATH",
        "a name that ends in .html: the page; any other: a folder for page and numbers",
    )
    json: str | None = optional("FILE", "all numbers as JSON")
    batch_size: int = option("N", default=64, least=1)
    sight_pairs: int = option(
        "N",
        "pairs of each sight test: a response against one that is presumably worse; 0: no tests",
        default=500,
        least=0,
    )
    seed: int = option("N", "seed of the bootstrap and of the sight tests", default=0)


def run(options: Options) -> None:
    from shiftrm.measure.diagnosis.findings import find, read_data
    from shiftrm.models.scoring import Scorer
    from shiftrm.report.diagnosis import write_numbers, write_page

    sources = named_paths(options.data, "--data")
    models = named_paths(options.model, "--model", suffix=True)
    read = [*sources.values(), *models.values()]
    page, json_files = _outputs(options.output, options.json, read)
    data = [read_data(source, name) for name, source in sources.items()]
    only_on_terminals()
    found = find(
        models,
        data,
        load=lambda path: Scorer.from_pretrained(path).to_accelerator(),
        batch_size=options.batch_size,
        seed=options.seed,
        sight_pairs=options.sight_pairs,
        bar=bar,
    )
    with together():
        for file in reversed(json_files):
            write_numbers(found, file)
        if page is not None:
            write_page(found, page)
    show(found)
    for path in (page, *json_files):
        if path is not None:
            print(f"{'Page' if path == page else 'Numbers'}: {path}")


def _outputs(
    output: str | None, json_file: str | None, sources: list[str]
) -> tuple[Path | None, list[Path]]:
    """Return the paths of the page and the JSON files."""
    page: Path | None = None
    json_files: list[Path] = []
    if output is not None and output.lower().endswith((".html", ".htm")):
        page = output_file(output, apart_from=sources)
    elif output is not None:
        folder = output_folder(output, apart_from=sources)
        page = output_file(str(folder / "diagnosis.html"), apart_from=sources)
        json_files.append(output_file(str(folder / "diagnosis.json"), apart_from=sources))
    if json_file is not None:
        taken = [*sources, page, *json_files]
        json_files.append(output_file(json_file, apart_from=taken))
    return page, json_files


def show_tables(found: Any) -> Any:
    """Print the tables. Return the console."""
    from shiftrm.report.diagnosis_features import pays_tables
    from shiftrm.report.diagnosis_sight import sight_tables
    from shiftrm.report.diagnosis_tables import comparison_table, numbers_tables

    tables = [*numbers_tables(found.diagnoses, found.verdicts), *sight_tables(found.diagnoses)]
    if found.comparisons:
        tables.append(comparison_table(found.comparisons))
    return print_tables([*tables, *pays_tables(found, most=6)])


def show(found: Any) -> None:
    """Print the tables, the verdicts and the next steps."""
    from rich.text import Text

    from shiftrm.report.diagnosis_features import pays_sentences
    from shiftrm.report.diagnosis_tables import source_names

    console = show_tables(found)
    advice: dict[str, list[str]] = {}
    for name, verdict in zip(source_names(found.diagnoses), found.verdicts, strict=True):
        console.print()
        console.print(Text(f"{name}: {verdict.word}", style="bold"))
        console.print(Text(verdict.sentence))
        for warning in verdict.warnings:
            console.print(Text(f"! {warning}"))
        for text in verdict.advice:
            advice.setdefault(text, []).append(name)
    if advice:
        console.print(Text("\nWhat to do next", style="bold"))
    for text, names in advice.items():
        console.print(Text(f"> {text} ({', '.join(names)})"))
    if found.pays:
        console.print(Text("\nWhat the reward pays for", style="bold"))
    for name, text in pays_sentences(found):
        console.print(Text(f"{name}: {text}"))
    console.print()
    for entry in found.overall:
        of_model = f"{entry.model}: " if len(found.overall) > 1 else ""
        console.print(Text(of_model + entry.sentence, style="bold"))
