"""What the reward models of a run pay for that gold does not: sentences, tables and a picture."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from shiftrm.core.intervals import Measured
from shiftrm.report.pictures import Picture, image_of
from shiftrm.report.plots import HEIGHT, WIDTH, plain_label
from shiftrm.report.results import SFT, Results
from shiftrm.report.tables import Table, fixed_point, number, seed_note

_PAYS, _OVER = "pays_", "overpays_"
_LOW, _HIGH, _EXPLAINED = "overpays_low_", "overpays_high_", "pays_explained"
NAMED = 0.1
"""A sentence names a feature from this many SFT spreads on."""
_MOST_NAMED = 3
NONE = "—"


def features(m: Results, prefix: str = _PAYS) -> list[str]:
    """Return the features of any arm, in the order of their names."""
    return [
        name.removeprefix(prefix)
        for name in m.metrics("evaluate")
        if name.startswith(prefix) and name != _EXPLAINED and not name.startswith((_LOW, _HIGH))
    ]


def label(feature: str) -> str:
    return feature.replace("_", " ")


def overpaid(m: Results, arm: str, round_: int, feature: str) -> Measured | None:
    """Return what an arm overpays, with its interval: over seeds, or of one seed over prompts."""
    found = m.estimate("evaluate", arm, round_, _OVER + feature)
    low, high = (m.mean(arm, round_, end + feature) for end in (_LOW, _HIGH))
    if found is None:
        return None
    if found.half_width is not None:
        return Measured(found.mean, found.low, found.high)
    return Measured(found.mean, low, high)


def paying_sentences(m: Results) -> list[str]:
    """Say for each arm which features its last reward model overpays and underpays most."""
    texts = []
    for arm in m.with_rewards:
        rounds = [r for r in m.rounds(arm) if m.mean(arm, r, _EXPLAINED) is not None]
        if not rounds or not features(m, _OVER):
            continue
        found = [(f, overpaid(m, arm, rounds[-1], f)) for f in features(m, _OVER)]
        clear = [(f, value) for f, value in found if value is not None and _clear(value)]
        clear.sort(key=lambda entry: -abs(entry[1].value))
        parts = [
            f"{word} {', '.join(said)}"
            for word, sign in (("pays too much for", 1), ("too little for", -1))
            if (said := [_named(f, v) for f, v in clear if v.value * sign > 0][:_MOST_NAMED])
        ]
        text = ", and ".join(parts) or "no feature is clearly paid otherwise than by gold"
        texts.append(f"{m.name(arm)}, round {rounds[-1]}: {text}.")
    return texts


def _clear(found: Measured) -> bool:
    if abs(found.value) < NAMED or found.low is None or found.high is None:
        return False
    return found.low > 0 or found.high < 0


def _named(feature: str, found: Measured) -> str:
    return f"{label(feature)} ({fixed_point(found.value, sign=True)})"


def paying_tables(m: Results) -> list[Table]:
    """Return what is overpaid (where gold was measured) and what is paid, by arm and round."""
    tables = []
    if over := features(m, _OVER):
        rows = [[_signed(overpaid(m, arm, r, f)) for f in over] for arm, r in _keys(m)]
        note = (
            "The price of a feature under the reward model less its price under gold, with its "
            f"95 % interval ({'over the seeds' if len(m.seeds) > 1 else 'clustered by prompt'}). "
        )
        title = "Overpaid (+) and underpaid (-) against gold"
        tables.append(_table(m, title, [label(f) for f in over], rows, note + _PRICE))
    if paid := features(m):
        rows = [
            [*(_number(m, arm, r, _PAYS + f) for f in paid), _number(m, arm, r, _EXPLAINED)]
            for arm, r in _keys(m)
        ]
        headings = [*(label(f) for f in paid), "Explained (R²)"]
        title = "Prices under the reward model"
        tables.append(_table(m, title, headings, rows, _PRICE + seed_note(m)))
    return tables


_PRICE = (
    "A price is the change of the reward by one standard deviation more of a feature, all others "
    "equal, in standard deviations of the same model's rewards on SFT responses. Fitted on the "
    f"responses of the trained policy, within prompts. “{NONE}”: the feature hardly varies."
)


def _keys(m: Results) -> list[tuple[str, int]]:
    """Return the (arm, round) with prices, SFT first."""
    return [(a, r) for a in _arms(m) for r in m.rounds(a, "evaluate", _EXPLAINED)]


def _arms(m: Results) -> list[str]:
    return [*([SFT] if SFT in m.arms else []), *m.with_rewards]


def _table(m: Results, title: str, headings: list[str], rows: list[list[str]], note: str) -> Table:
    return Table(
        title,
        ("Arm", "Round", *headings),
        tuple((m.name(a), str(r), *row) for (a, r), row in zip(_keys(m), rows, strict=True)),
        note,
        text_columns=2,
    )


def _signed(found: Measured | None) -> str:
    if found is None:
        return NONE
    text = fixed_point(found.value, sign=True)
    if found.low is None or found.high is None:
        return text
    return f"{text} [{fixed_point(found.low)}, {fixed_point(found.high)}]"


def _number(m: Results, arm: str, round_: int, metric: str) -> str:
    found = m.estimate("evaluate", arm, round_, metric)
    return NONE if found is None else number(found)


# -- picture -----------------------------------------------------------------------------------


def paying_pictures(m: Results) -> list[Picture]:
    """Return a heat map of what is overpaid, by feature, arm and round; none without gold."""
    figure = paying_figure(m)
    if figure is None:
        return []
    title = "What the reward model pays for that gold does not"
    caption = (
        "Red: the reward model pays too much for the feature, or charges too little; blue: too "
        "little. Every arm has one column a round."
    )
    return [Picture(title, (image_of(figure, title, caption),), caption)]


def paying_figure(m: Results) -> Figure | None:
    """Draw what is overpaid as a heat map: a row for each feature, a column for each round."""
    over, keys = features(m, _OVER), _keys(m)
    if not over or not keys:
        return None
    values = np.full((len(over), len(keys)), np.nan)
    for column, (arm, round_) in enumerate(keys):
        for row, feature in enumerate(over):
            found = m.mean(arm, round_, _OVER + feature)
            values[row, column] = np.nan if found is None else found
    most = float(np.nanmax(np.abs(values))) or 1.0
    figure = Figure(figsize=(WIDTH, HEIGHT), layout="constrained")
    axes = figure.add_subplot()
    axes.set_facecolor("#eeeeee")  # not measured
    image = axes.imshow(values, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    figure.colorbar(image, ax=axes, label="SFT spreads")
    axes.set_yticks(range(len(over)), [plain_label(label(f)) for f in over], fontsize=8)
    axes.set_xticks(range(len(keys)), [str(round_) for _, round_ in keys], fontsize=7)
    axes.tick_params(length=0)
    for arm in dict.fromkeys(arm for arm, _ in keys):
        columns = [i for i, (other, _) in enumerate(keys) if other == arm]
        axes.axvline(columns[-1] + 0.5, color="white", linewidth=3)
        axes.text(
            columns[0] - 0.4, -0.7, plain_label(m.short(arm), 22), rotation=30, fontsize=8,
            rotation_mode="anchor",
        )  # fmt: skip
    axes.set_xlabel("round")
    return figure
