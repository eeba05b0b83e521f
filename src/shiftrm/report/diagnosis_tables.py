"""Text tables of diagnoses, for the terminal and the page."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from shiftrm.core.intervals import Measured
from shiftrm.measure.diagnosis.comparison import ModelChange
from shiftrm.measure.diagnosis.diagnosis import Diagnosis, Labels, Shift
from shiftrm.measure.diagnosis.verdict import DiagnosisVerdict
from shiftrm.report.tables import Table, fixed_point

NONE = "—"  # not applicable or not measurable on this file

Cell = Callable[[Diagnosis], str]


def source_names(diagnoses: Sequence[Diagnosis]) -> list[str]:
    """Return each file's display name, with its model if there are several."""
    several = len({d.model for d in diagnoses}) > 1
    return [f"{d.name} · {d.model}" if several else d.name for d in diagnoses]


def short(value: float | None, digits: int = 2, *, sign: bool = False) -> str:
    """Format a number with `digits` decimals, or in scientific notation if it is too small."""
    if value is None:
        return NONE
    if value and abs(value) < 0.5 * 10**-digits:
        return f"{value:{'+' if sign else ''}.1e}"
    return fixed_point(value, digits, sign=sign)


def interval(found: Measured | None, digits: int = 2) -> str:
    """Format an estimate as `0.71 [0.66, 0.76]`."""
    if found is None:
        return NONE
    if found.low is None or found.high is None:
        return short(found.value, digits)
    ends = f"[{short(found.low, digits)}, {short(found.high, digits)}]"
    return f"{short(found.value, digits)} {ends}"


def _percent(share: float | None) -> str:
    if share is None:
        return NONE
    return "< 0.1 %" if 0 < share < 0.001 else f"{100 * share:.1f} %"


def numbers_tables(
    diagnoses: Sequence[Diagnosis], verdicts: Sequence[DiagnosisVerdict]
) -> list[Table]:
    """Return tables of all numbers, one per row.

    One model has one table with a column per file; several have a table per file with a column
    per model.
    """
    found = list(zip(diagnoses, verdicts, strict=True))
    if len({d.model for d in diagnoses}) == 1:
        return [_numbers("Side by side", [(d.name, d, v) for d, v in found])]
    return [
        _numbers(name, [(d.model, d, v) for d, v in found if d.name == name])
        for name in dict.fromkeys(d.name for d in diagnoses)
    ]


def _numbers(title: str, columns: Sequence[tuple[str, Diagnosis, DiagnosisVerdict]]) -> Table:
    rows = [("Verdict", *(v.word for _, _, v in columns))]
    for label, cell in _ROWS:
        cells = tuple(cell(d) for _, d, _ in columns)
        if any(text not in (NONE, "reference") for text in cells):
            rows.append((label, *cells))
    note = (
        "Brackets: 95 % bootstrap intervals over prompts. Differences are between distinct "
        f"responses to one prompt. “{NONE}”: does not apply or cannot be measured."
    )
    return Table(title, ("", *(name for name, _, _ in columns)), tuple(rows), note)


def _labelled(cell: Callable[[Labels], str]) -> Cell:
    return lambda d: NONE if d.labels is None else cell(d.labels)


def _shifted(cell: Callable[[Shift], str]) -> Cell:
    return lambda d: "reference" if d.shift is None else cell(d.shift)


def _by_length(d: Diagnosis, which: str) -> str:
    if d.labels is None:
        return NONE
    found: Measured | None = getattr(d.labels, f"accuracy_{which}")
    count: int = getattr(d.labels, f"pairs_{which}")
    return NONE if found is None else f"{interval(found)} of {count}"


def _longest_best(d: Diagnosis) -> str:
    share, chance = d.lengths.longest_best_share, d.lengths.longest_best_chance
    return NONE if share is None else f"{_percent(share)} (chance {_percent(chance)})"


def _difference_loss(d: Diagnosis) -> str:
    s = d.spread
    return (
        f"{s.difference_loss:.3f} ({s.difference_loss_lowest:.3f} to "
        f"{s.difference_loss_highest:.3f})"
    )


_ROWS: tuple[tuple[str, Cell], ...] = (
    ("Rows", lambda d: f"{d.rows} {d.kind}"),
    ("Rows left out, too long", lambda d: str(d.left_out) if d.left_out else NONE),
    ("Prompts / responses", lambda d: f"{d.spread.prompts} / {d.spread.responses}"),
    ("Accuracy on labels (coin: 0.5)", _labelled(lambda found: interval(found.accuracy))),
    ("Accuracy, chosen is shorter", lambda d: _by_length(d, "shorter")),
    ("Accuracy, chosen is longer", lambda d: _by_length(d, "longer")),
    ("AUC over all chosen and rejected", _labelled(lambda found: interval(found.auc))),
    ("Calibration error", _labelled(lambda found: short(found.calibration_error, 3))),
    ("Mean margin, chosen - rejected", _labelled(lambda found: interval(found.margin_mean))),
    ("Mean |difference|", lambda d: interval(d.spread.difference_mean)),
    ("Variance of differences", lambda d: interval(d.spread.difference_variance)),
    (
        "… over the reference's",
        _shifted(lambda shift: interval(shift.variance_ratio)),
    ),
    ("Std within prompts / overall", lambda d: short(d.spread.relative_std)),
    ("Share of variance within prompts", lambda d: interval(d.spread.within_share)),
    ("Median |difference|", lambda d: short(d.spread.difference_quantiles.get("0.5"), 3)),
    ("Comparisons", lambda d: str(d.spread.comparisons)),
    ("… exactly equal", lambda d: _percent(d.spread.equal_share)),
    ("… equal up to rounding (1e-6)", lambda d: _percent(d.spread.noise_share)),
    ("… stated at 0.49 to 0.51", lambda d: _percent(d.spread.coin_share)),
    ("… stated above 0.99", lambda d: _percent(d.spread.saturated_share)),
    ("Difference loss J (lowest to highest)", _difference_loss),
    ("Repeated responses", lambda d: _percent(d.spread.duplicate_share)),
    ("Prompts with one response only", lambda d: _percent(d.spread.collapsed_share)),
    ("Reward and length, within prompts", lambda d: short(d.lengths.correlation_within)),
    ("Reward and length, overall", lambda d: short(d.lengths.correlation)),
    ("Best response is the longest", _longest_best),
    ("Mean length, tokens", lambda d: short(d.lengths.length_mean, 1)),
    (
        "… over the reference's",
        _shifted(lambda shift: short(shift.length_ratio)),
    ),
    ("Cut off by a limit", lambda d: _percent(d.lengths.truncated_share)),
    ("… their reward against finished ones", lambda d: short(d.lengths.truncated_gap, sign=True)),
    ("Mean reward", lambda d: short(d.spread.reward_mean)),
    ("Standard deviation of rewards", lambda d: short(d.spread.reward_std)),
    (
        "Mean reward against the reference, in its std",
        _shifted(lambda shift: short(shift.reward_shift, sign=True)),
    ),
)


def comparison_table(comparisons: Sequence[ModelChange]) -> Table:
    """Return the table of changes between models, file by file."""
    rows = tuple(
        (
            c.name,
            f"{c.before} → {c.after}",
            c.reading,
            interval(c.accuracy_change, 3),
            short(c.variance_factor),
            short(c.relative_factor),
        )
        for c in comparisons
    )
    return Table(
        "Models compared on the same rows",
        (
            "File",
            "Models",
            "Reading",
            "Accuracy, change",
            "Variance of differences, factor",
            "… relative to the reference",
        ),
        rows,
        "Sharper or duller: the interval of the change in accuracy, prompts resampled for both "
        "models together, lies on one side of 0. Louder: the variance grew by more than 1.25 "
        "times. Louder is not sharper.",
        text_columns=3,
    )
