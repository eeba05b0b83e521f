"""A self-contained page and the terminal summary from the records of `shiftrm run`.

Only the sample responses are read from the run's folder.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftrm.files import atomic_write_text
from shiftrm.records import Record
from shiftrm.report import tables
from shiftrm.report.measurements import Measurements
from shiftrm.report.page import page_template
from shiftrm.report.recipe_arms import Arms, arms_of
from shiftrm.report.recipe_gold import best_of_n_table, over_optimisation_table
from shiftrm.report.recipe_notes import GLOSSARY, HOW
from shiftrm.report.recipe_plots import recipe_pictures
from shiftrm.report.recipe_samples import SamplePrompt, read_samples
from shiftrm.report.recipe_summary import summary
from shiftrm.report.recipe_tables import (
    all_rounds,
    arms_table,
    best_round_table,
    blindness_table,
    data_table,
    diversity_table,
    judging_table,
    metrics_table,
    paper_diversity_table,
    win_table,
)
from shiftrm.report.recipe_words import blindness, headline, kl_sentence, why_no_wins

__all__ = ["is_recipe", "render_recipe_page", "summary", "write_recipe_report"]

PAGE_FILE = "report.html"


def is_recipe(config: Mapping[str, Any] | None) -> bool:
    """Whether a configuration is of a recipe; the demo has no preference data."""
    data = (config or {}).get("data")
    return isinstance(data, Mapping) and "pairs" in data and isinstance(data["pairs"], Mapping)


def write_recipe_report(
    records: Sequence[Record],
    path: str | Path,
    folder: str | Path | None,
    config: Mapping[str, Any] | None,
    *,
    notes: Sequence[str] = (),
) -> Path:
    """Write the page atomically.

    Args:
        records: of one run, or of several seeds merged.
        path: the HTML file, or an existing folder that gets `report.html`.
        folder: the (first) run's, for sample responses; None for no samples.
        config: the resolved recipe, which names the kinds of the arms.
        notes: remarks, shown at the top.

    Returns:
        The path of the page.
    """
    path = Path(path)
    if path.is_dir():
        path = path / PAGE_FILE
    arms = arms_of(Measurements(records), records, config)
    samples = [] if folder is None else read_samples(Path(folder), arms)
    html = render_recipe_page(records, config=config, samples=samples, notes=notes)
    return atomic_write_text(path, html)


def render_recipe_page(
    records: Sequence[Record],
    *,
    config: Mapping[str, Any] | None = None,
    samples: Sequence[SamplePrompt] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the page's HTML, which depends only on the arguments."""
    m = Measurements(records)
    arms = arms_of(m, records, config)
    return page_template("recipe.html.j2").render(
        name=str((config or {}).get("name", "a recipe")),
        head=headline(m, arms, config),
        compared=_compared(m, arms),
        notes=list(notes),
        arms_table=arms_table(m, arms),
        judged=any(m.rounds(arm, "evaluate", "win_vs_sft") for arm in arms.trained),
        no_judge=why_no_wins(m, arms),
        win_tables=[
            win_table(m, arms),
            best_round_table(m, arms),
            judging_table(m, arms),
            tables.paper_table("another model and perhaps another judge"),
        ],
        blindness=blindness(m, arms),
        blind_table=blindness_table(m, arms),
        pictures=recipe_pictures(m, arms),
        gold_tables=[over_optimisation_table(m, arms), best_of_n_table(m)],
        diversity_tables=[diversity_table(m, arms), paper_diversity_table()],
        kl_sentence=kl_sentence(m, arms),
        metrics=metrics_table(m, arms),
        samples=samples,
        data=data_table(m, sorted({r.metric for r in records if r.stage == "data"})),
        config=tables.config_table(_without_passwords(config or {})),
        versions=tables.versions_table(m),
        several_versions=len(m.provenance) > 1,
        seeds=len(m.seeds),
        how=HOW,
        glossary=GLOSSARY,
        not_measured=tables.NOT_MEASURED,
    )


def _compared(m: Measurements, arms: Arms) -> str:
    """Describe the number of arms, rounds and seeds."""
    counts = (len(arms.trained), "arm"), (len(all_rounds(m, arms)), "round"), (len(m.seeds), "seed")
    return ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts) + "."


def _without_passwords(value: Any) -> Any:
    """Remove users and passwords of URLs from a configuration."""
    if isinstance(value, Mapping):
        return {key: _without_passwords(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_passwords(inner) for inner in value]
    return re.sub(r"://[^/@\s]*@", "://…@", value) if isinstance(value, str) else value
