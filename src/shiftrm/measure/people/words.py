"""A human evaluation in sentences."""

from shiftrm.core.intervals import Measured
from shiftrm.measure.people.result import Agreement, HumanResult

FEW = 30  # items; below this, an interval of the bootstrap is too narrow to be believed


def human_sentences(result: HumanResult) -> list[str]:
    """What came of it, a sentence a line."""
    raters = len(result.answers)
    given, missing = sum(result.answers.values()), sum(result.missing.values())
    lines = [
        f"{given} answers of {_count(raters, 'rater')} to {_count(result.items, 'item')}"
        + (f"; {missing} are missing." if missing else "."),
        f"Ours wins {_percent(result.win)}, ties {_percent(result.tie)}, loses "
        f"{_percent(result.lose)}.",
        f"Win rate, a tie counting half: {_percent(result.win_rate)}: {_verdict(result.win_rate)}.",
    ]
    if result.items < FEW:
        lines.append(
            f"{_count(result.items, 'item')}: too few to trust the intervals; {FEW} are the least."
        )
    if result.first is not None and _off_half(result.first):
        side = "first" if result.first.value > 0.5 else "second"
        lines.append(
            f"Raters lean to the {side} response: A was chosen in {_percent(result.first)} of the "
            "decided answers."
        )
    if result.raters is not None:
        lines.append("Raters: " + _agreement(result.raters))
    if result.judge is not None:
        left_out = f"; {result.judge_missing} without a verdict" if result.judge_missing else ""
        lines.append("Raters' majority and the judge: " + _agreement(result.judge, left_out))
    return lines


def _verdict(rate: Measured) -> str:
    if not _off_half(rate):
        return "no clear difference"
    return "ours is preferred" if rate.value > 0.5 else "theirs is preferred"


def _off_half(rate: Measured) -> bool:
    return rate.low is not None and rate.high is not None and not rate.low <= 0.5 <= rate.high


def _agreement(found: Agreement, left_out: str = "") -> str:
    if found.share is None:
        return f"no item with two answers{left_out}."
    parts = [f"agree on {_percent(found.share)} of {_count(found.items, 'item')}{left_out}"]
    if found.kappa is not None:
        parts.append(f"Cohen's kappa {found.kappa}")
    if found.alpha is not None:
        parts.append(f"Krippendorff's alpha {found.alpha}")
    else:
        parts.append("alpha is not defined: all answers are the same")
    return "; ".join(parts) + "."


def _percent(rate: Measured) -> str:
    value = f"{100 * rate.value:.0f} %"
    if rate.low is None or rate.high is None:
        return value
    return f"{value} [{100 * rate.low:.0f}, {100 * rate.high:.0f}]"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")
