"""Pictures: what is drawn, that bytes repeat, that nothing foreign breaks them."""

from xml.etree import ElementTree

import pytest

from shiftrm.records import Record
from shiftrm.report import figures, plots
from shiftrm.report.results import Results

from .records import DEMO, renamed

FIGURES = {
    "variance": lambda m: figures.variance_figure(m, m.vanilla),
    "by round": figures.variance_by_round_figure,
    "distribution": lambda m: figures.distribution_figure(m, m.vanilla),
    "accuracy": lambda m: figures.accuracy_curve_figure(m, "metarm_paper"),
    "normalised": figures.normalised_figure,
    "gold": lambda m: figures.kl_figure(m, "gold"),
    "proxy": lambda m: figures.kl_figure(m, "proxy"),
    "before": lambda m: figures.policy_accuracy_figure(m, "before"),
    "after": lambda m: figures.policy_accuracy_figure(m, "after"),
    "wins": lambda m: figures.win_figure(m, "win"),
    "influence": lambda m: figures.meta_figure(m, "meta_influence"),
}


def view(records: list[Record]) -> Results:
    return Results(records, DEMO)


@pytest.mark.parametrize("name", FIGURES)
def test_bytes_repeat_and_are_well_formed(three_seeds, name):
    first, second = (plots.render(FIGURES[name](view(three_seeds))) for _ in range(2))
    assert first == second
    assert b"<dc:date>" not in first
    ElementTree.fromstring(first)


def test_png(one_seed):
    figures = [FIGURES["variance"](view(one_seed)) for _ in range(2)]
    first, second = (plots.render(figure, format="png") for figure in figures)
    assert first == second
    assert first.startswith(b"\x89PNG\r\n")


@pytest.mark.parametrize("name", FIGURES)
def test_nothing_measured_gives_no_figure(name):
    assert FIGURES[name](view([])) is None


def test_variance_runs_on_over_the_rounds():
    records = [
        Record("ppo", "fixed", round_, "difference_variance", float(10 * round_ + step), step=step)
        for round_ in (1, 2)
        for step in (1, 2, 3)
    ]
    figure = figures.variance_figure(view(records), "fixed")
    curve, border = figure.axes[0].lines
    assert list(curve.get_xdata()) == [1, 2, 3, 4, 5, 6]
    assert list(curve.get_ydata()) == [11, 12, 13, 21, 22, 23]
    assert list(border.get_xdata()) == [3, 3]


@pytest.mark.parametrize("steps", [(1, 2), (2,), (5, 10)])
def test_the_text_of_a_round_lies_inside_the_picture_of_few_steps(steps):
    records = [
        Record("ppo", "fixed", 1, "difference_variance", float(step), step=step) for step in steps
    ]
    figure = figures.variance_figure(view(records), "fixed")
    plots.render(figure)  # matplotlib would warn, as text outside leaves no room for the axes
    [axes] = figure.axes
    box = axes.get_window_extent()
    assert all(box.x0 <= text.get_window_extent().x0 <= box.x1 for text in axes.texts)


def test_seeds_are_thin_lines_behind_their_mean():
    records = [
        Record("ppo", "fixed", 1, "difference_variance", float(seed + step), step=step, seed=seed)
        for seed in (0, 2)
        for step in (1, 2)
    ]
    figure = figures.variance_figure(view(records), "fixed")
    *thin, mean = figure.axes[0].lines
    assert len(thin) == 2
    assert list(mean.get_ydata()) == [2, 3]
    assert all(line.get_linewidth() < mean.get_linewidth() for line in thin)


@pytest.mark.parametrize(("points", "marker"), [(1, "o"), (2, "")])
def test_a_single_point_is_seen(points, marker):
    _, axes = plots.new_axes("x", "y", "")
    plots.draw_seeds(axes, [[(float(i), 1.0) for i in range(points)]], colour="black")
    assert axes.lines[-1].get_marker() == marker


def test_round_ends_against_kl(one_seed):
    m = view(one_seed)
    ends = figures._round_ends(m, "metarm_scale_free", "gold_mean")
    assert [(round_, kl) for round_, kl, _ in ends] == [(1, 2.0), (2, 4.0), (3, 6.0)]
    assert ends[-1][2] == pytest.approx(4.77)


def test_dots_are_means_over_blocks_of_steps():
    steps = range(1, 2 * figures._DOTS_PER_ROUND + 1)  # two steps a dot
    records = [
        Record("ppo", "fixed", 1, metric, factor * step, step=step)
        for metric, factor in (("sequence_kl", 1.0), ("gold_mean", 10.0))
        for step in steps
    ]
    dots = figures._policy_dots(view(records), "fixed", "gold_mean")
    assert len(dots) == figures._DOTS_PER_ROUND
    assert dots[:2] == [(1.5, 15.0), (3.5, 35.0)]


def test_histogram_heights_are_shares(one_seed):
    figure = figures.normalised_figure(view(one_seed))
    filled = [patch for patch in figure.axes[0].patches if hasattr(patch, "get_height")]
    assert sum(patch.get_height() for patch in filled) == pytest.approx(2.0)  # two of five arms
    assert figure.axes[0].get_title(loc="left") == "Normalised differences, round 3"
    assert "Retrained" in [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize(
    "name", [r"$\frac{", "_hidden", "<script>&", "a\x00b\x1b", "漢字", "\ud800", "x" * 300]
)
def test_odd_names_of_arms_are_drawn_literally(one_seed, name):
    odd = renamed(one_seed, "metarm_paper", method=name)
    m = view([*one_seed, *odd])
    for what in ("gold", "before"):
        figure = FIGURES[what](m)
        ElementTree.fromstring(plots.render(figure))
        assert len(figure.legends[0].get_texts()) == 6 + (2 if what == "gold" else 0)
    assert figures.accuracy_curve_figure(m, odd[0].method) is not None
