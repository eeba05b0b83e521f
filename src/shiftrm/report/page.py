"""A self-contained `report.html` from records: no script, no network, foreign text escaped."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from shiftrm.files import atomic_write_text
from shiftrm.measure.people.blinding import UNSHOWABLE
from shiftrm.records import Record
from shiftrm.report import blindness, paying, setup_tables, sight, tables, win_tables
from shiftrm.report.headline import headline, kl_sentences, why_no_wins
from shiftrm.report.opening import opening_picture, opening_sentence
from shiftrm.report.pictures import pictures
from shiftrm.report.results import Results
from shiftrm.report.samples import SamplePrompt
from shiftrm.report.tables import Table
from shiftrm.report.warnings import flags, warnings

PAGE_FILE = "report.html"


def write_report(
    records: Iterable[Record],
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    samples: Sequence[SamplePrompt] = (),
    notes: Sequence[str] = (),
) -> Path:
    """Write the page atomically.

    Args:
        records: of one run, or of several seeds merged.
        path: the HTML file, or an existing folder that gets `report.html`.
        config: the resolved configuration, which says what the arms are.
        samples: responses to show (`samples.read_samples`).
        notes: remarks, shown at the top.

    Returns:
        The path of the page.
    """
    path = Path(path)
    if path.is_dir():
        path = path / PAGE_FILE
    html = render_page(records, config=config, samples=samples, notes=notes)
    return atomic_write_text(path, html)


def render_page(
    records: Iterable[Record],
    *,
    config: Mapping[str, Any] | None = None,
    samples: Sequence[SamplePrompt] = (),
    notes: Sequence[str] = (),
) -> str:
    """Return the page's HTML, which depends only on the arguments."""
    m = Results(records, config)
    over = _with_rows(tables.over_optimisation_table(m), tables.best_of_n_table(m))
    diversity = _with_rows(tables.diversity_table(m))
    name = m.config.get("name")
    head = headline(m)
    blocks = {
        "title": f"shiftrm run: {name}" if name else "shiftrm: does the reward model still see?",
        "opening": opening_sentence(m, head),
        "opening_picture": opening_picture(m),
        "head": head,
        "compared": _compared(m),
        "warnings": [*notes, *warnings(m)],
        "arms_table": setup_tables.arms_table(m),
        "blindness": [*blindness.blindness(m), *blindness.others_spread(m)],
        "flags": flags(m),
        "blindness_tables": blindness.blindness_tables(m),
        "sight_sentences": sight.sight_sentences(m),
        "sight_tables": _with_rows(sight.sight_table(m)),
        "paying": paying.paying_sentences(m),
        "paying_tables": paying.paying_tables(m),
        "paying_pictures": paying.paying_pictures(m),
        "pictures": pictures(m),
        "no_wins": None if m.judged else why_no_wins(m),
        "win_tables": [
            win_tables.win_table(m),
            *_with_rows(win_tables.best_round_table(m), win_tables.judging_table(m)),
        ],
        "over_optimisation": over,
        "diversity": diversity,
        "kl": kl_sentences(m),
        "metric_tables": [*_with_rows(tables.kl_table(m)), tables.metrics_table(m)],
        "missing": _missing(over, diversity),
        "samples": [(s.prompt, _known(m, s)) for s in samples],
        "data_tables": _with_rows(setup_tables.data_table(m), setup_tables.world_table(m)),
        "config": setup_tables.config_table(m.config),
        "versions": setup_tables.versions_table(m),
    }
    others = _with_rows(tables.other_table(m))  # what no block above has asked for
    return page_template("report.html.j2").render(
        m=m, others=others, not_measured=tables.NOT_MEASURED, **blocks
    )


def _with_rows(*found: Table) -> list[Table]:
    return [table for table in found if table.rows]


def _compared(m: Results) -> str:
    """Describe the number of arms, rounds and seeds."""
    counts = (len(m.trained), "arm"), (len(m.all_rounds), "round"), (len(m.seeds), "seed")
    return ", ".join(f"{count} {word}{'' if count == 1 else 's'}" for count, word in counts) + "."


def _missing(over: Sequence[Table], diversity: Sequence[Table]) -> str:
    """Name the optional measurements that the records do not hold."""
    titles = {table.title for table in over}
    absent = [
        name
        for name, there in (
            ("gold along policy training", "Gold along policy training" in titles),
            ("best of n (evaluation.best_of_n)", "Best of n responses of SFT" in titles),
            ("diversity", bool(diversity)),
        )
        if not there
    ]
    return f"Not measured in this run: {', '.join(absent)}." if absent else ""


def _known(m: Results, sample: SamplePrompt) -> list[tuple[Any, Any]]:
    """Return (arm, answer) in the order of the arms; arms without records are left out."""
    by_arm = {answer.arm: answer for answer in sample.answers}
    return [(arm, by_arm[name]) for name, arm in m.arms.items() if name in by_arm]


def page_template(name: str) -> Template:
    """Return a template of this package. Values are escaped; a missing value is an error.

    Characters that no page may hold, which models can write, are replaced.
    """
    environment = Environment(
        finalize=_showable,
        loader=PackageLoader("shiftrm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def _showable(value: Any) -> Any:
    """Replace control characters in text, also in text that is escaped already."""
    if not isinstance(value, str):
        return value
    shown = UNSHOWABLE.sub("\ufffd", value)
    return Markup(shown) if isinstance(value, Markup) else shown
