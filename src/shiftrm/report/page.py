"""A self-contained `report.html` from records: no script, no network, foreign text escaped."""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from matplotlib.figure import Figure

from shiftrm.files import atomic_write_text
from shiftrm.records import Record
from shiftrm.report import captions, narrative, plots, tables
from shiftrm.report.analysis import KL_MEANING
from shiftrm.report.arms import SFT, arm_name, arm_styles, in_order, is_metarm
from shiftrm.report.flags import flags
from shiftrm.report.measurements import Measurements

SAMPLES_PER_ARM = 4
RESPONSE_LIMIT = 2000  # characters shown of a response

GLOSSARY = (
    (
        "Gold",
        "The true reward of the test world, known and fixed. Preference labels are drawn from it.",
    ),
    ("Proxy", "What the arm's own reward model gives, standardised on SFT samples."),
    ("KL", KL_MEANING),
    ("Matched KL", "Arms compared at the same KL, since moving further alone changes gold."),
    ("SFT", "The supervised policy every arm starts from."),
    ("Vanilla", "The reward model trained once on the original pairs, and PPO with it kept fixed."),
    ("Round", "Sample from the policy, adapt the reward model, run PPO, evaluate."),
    ("Held-out pairs", "Preference pairs like those of the training set, not trained on."),
    ("Policy's pairs", "Pairs of fresh responses of today's policy, ranked by gold."),
    (
        "Relative variance",
        "Variance of reward differences on the policy's responses over that on SFT responses. "
        "Multiplying all rewards by a factor leaves it unchanged.",
    ),
    (
        "Influence of the meta step",
        "‖∇L(θ') - ∇L(θ)‖ / ‖∇L(θ)‖: how much looking ahead changes the training gradient. Below "
        "0.001 it is too small to matter.",
    ),
    ("Louder, not sharper", "Rewards lie further apart but rank the same responses no better."),
    ("Seed", "One complete run. Differences smaller than those between seeds mean nothing."),
)


@dataclass(frozen=True)
class Image:
    """A picture; `source` is a data URI, or None if nothing was measured."""

    title: str
    source: str | None
    alt: str


@dataclass(frozen=True)
class Picture:
    """Pictures side by side with one caption."""

    title: str
    images: tuple[Image, ...]
    caption: str


def write_report(
    records: list[Record],
    path: str | Path,
    *,
    config: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
) -> Path:
    """Write the page atomically.

    Args:
        records: of one run, or of several seeds merged.
        path: the HTML file, or an existing folder that gets `report.html`.
        config: the resolved configuration, which may be nested.
        samples: `{"method", "round", "prompt", "response", "gold", "proxy"}` each; missing keys
            read "not measured".

    Returns:
        The path of the page.
    """
    path = Path(path)
    if path.is_dir():
        path = path / "report.html"
    html = render_page(records, config=config, samples=samples)
    return atomic_write_text(path, html)


def render_page(
    records: list[Record],
    *,
    config: Mapping[str, Any] | None = None,
    samples: Sequence[Mapping[str, Any]] | None = None,
) -> str:
    """Return the page's HTML, which depends only on the arguments."""
    m = Measurements(records)
    return page_template("demo.html.j2").render(
        head=narrative.headline(m),
        compared=captions.arms_compared(m),
        same_coefficient=(config or {}).get("matched_kl") is False,
        kl_verdict=narrative.kl_verdict(m),
        blindness=narrative.blindness(m),
        flags=flags(m),
        blind_tables=[tables.blindness_table(m), tables.adaptation_table(m)],
        pictures=pictures(m),
        win_caption=captions.win_caption(m),
        win_tables=[tables.win_table(m), tables.best_round_table(m), tables.paper_table()],
        metric_tables=[tables.kl_table(m), tables.metrics_table(m)],
        samples=sample_groups(samples or []),
        config=tables.config_table(config or {}),
        world=tables.world_table(m),
        versions=tables.versions_table(m),
        several_versions=len(m.provenance) > 1,
        seeds=len(m.seeds),
        glossary=GLOSSARY,
        not_measured=tables.NOT_MEASURED,
    )


def page_template(name: str) -> Template:
    """Return a template of this package. Values are escaped; a missing value is an error."""
    environment = Environment(
        loader=PackageLoader("shiftrm.report", "."),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return environment.get_template(name)


def pictures(m: Measurements) -> list[Picture]:
    """Return the five pictures of the page."""
    variance = captions.variance_caption(m)
    curves = captions.accuracy_curve_caption(m)
    normalised = captions.normalised_caption(m)
    kl = captions.kl_caption(m)
    accuracy = captions.policy_accuracy_caption(m)
    metarm = [arm for arm in m.policy_arms() if is_metarm(arm)]
    return [
        Picture(
            "Reward differences while the policy moves (the paper's Figure 1)",
            (
                image_of(plots.variance_figure(m), "Variance of reward differences", variance),
                image_of(plots.distribution_figure(m), "Distribution of |r_i - r_j|", variance),
            ),
            variance,
        ),
        Picture(
            "Held-out accuracy while the reward model trains (Figure 4)",
            tuple(
                image_of(plots.accuracy_curve_figure(m, arm), arm_name(arm), curves)
                for arm in metarm
            )
            or (Image("MetaRM", None, ""),),
            curves,
        ),
        Picture(
            "Normalised reward differences, vanilla against MetaRM (Figure 5)",
            (image_of(plots.normalised_figure(m), "Normalised reward differences", normalised),),
            normalised,
        ),
        Picture(
            "Gold and proxy against KL",
            (
                image_of(plots.kl_figure(m, "gold"), "Gold against KL", kl),
                image_of(plots.kl_figure(m, "proxy"), "Proxy against KL", kl),
            ),
            kl,
        ),
        Picture(
            "Accuracy on the policy's own pairs, by round",
            (
                image_of(plots.policy_accuracy_figure(m, "before"), "Before PPO", accuracy),
                image_of(plots.policy_accuracy_figure(m, "after"), "After PPO", accuracy),
            ),
            accuracy,
        ),
    ]


def image_of(figure: Figure | None, title: str, caption: str) -> Image:
    """Return a figure as a data URI, with its caption in the alternative text."""
    if figure is None:
        return Image(title, None, "")
    data = base64.b64encode(plots.render(figure)).decode("ascii")
    return Image(title, f"data:image/svg+xml;base64,{data}", captions.alt(title, caption))


@dataclass(frozen=True)
class SampleGroup:
    """The samples shown of one arm."""

    name: str
    colour: str
    samples: tuple[dict[str, str], ...]
    left_out: int


def sample_groups(samples: Sequence[Mapping[str, Any]]) -> list[SampleGroup]:
    """Return the first few samples of each arm, the latest rounds first."""
    by_method: dict[str, list[Mapping[str, Any]]] = {}
    for sample in samples:
        by_method.setdefault(str(sample.get("method", "unknown")), []).append(sample)
    styles = arm_styles(by_method)
    groups = []
    # SFT comes first, as the baseline.
    for method in sorted(in_order(by_method), key=lambda name: name != SFT):
        rows = sorted(by_method[method], key=lambda row: -_round_of(row))
        shown = tuple(_sample(row) for row in rows[:SAMPLES_PER_ARM])
        left_out = len(rows) - len(shown)
        groups.append(SampleGroup(arm_name(method), styles[method].colour, shown, left_out))
    return groups


def _round_of(sample: Mapping[str, Any]) -> float:
    value = sample.get("round")
    return float(value) if isinstance(value, int | float) else 0.0


def _sample(sample: Mapping[str, Any]) -> dict[str, str]:
    def text(key: str) -> str:
        value = sample.get(key)
        if value is None:
            return tables.NOT_MEASURED
        if isinstance(value, float):
            return tables.fixed_point(value)
        shown = str(value)
        return shown if len(shown) <= RESPONSE_LIMIT else shown[:RESPONSE_LIMIT] + " …"

    return {key: text(key) for key in ("round", "prompt", "response", "gold", "proxy")}
