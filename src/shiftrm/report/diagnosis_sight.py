"""Tables of sight tests: how often a model prefers a response to one that is presumably worse."""

from __future__ import annotations

from collections.abc import Sequence

from shiftrm.measure.diagnosis.diagnosis import Diagnosis
from shiftrm.measure.sight import SightTest
from shiftrm.report.diagnosis_tables import NONE, interval
from shiftrm.report.tables import Table


def sight_tables(diagnoses: Sequence[Diagnosis]) -> list[Table]:
    """Return tables with a row for each sight test; none if no file has any.

    One model has one table with a column per file of groups; several have a table per file with a
    column per model.
    """
    found = [d for d in diagnoses if d.sight]
    if not found:
        return []
    title = "Sight tests: how often the response is preferred"
    if len({d.model for d in found}) == 1:
        return [_table(title, [(d.name, d) for d in found])]
    return [
        _table(f"{title} · {name}", [(d.model, d) for d in found if d.name == name])
        for name in dict.fromkeys(d.name for d in found)
    ]


def _table(title: str, columns: Sequence[tuple[str, Diagnosis]]) -> Table:
    by_kind = [{test.kind: test for test in d.sight} for _, d in columns]
    kinds = dict.fromkeys(kind for tests in by_kind for kind in tests)
    rows = []
    for kind in kinds:
        tests = [found[kind] for found in by_kind if kind in found]
        cells = (_cell(found.get(kind)) for found in by_kind)
        rows.append((f"to {tests[0].label}", tests[0].meaning, *cells))
    note = "Brackets: 95 % intervals over prompts. A coin: 0.5."
    reasons = dict.fromkeys(
        test.reason for found in by_kind for test in found.values() if test.reason
    )
    if reasons:
        note += f" “{NONE}”: does not apply ({'; '.join(reasons)})."
    headings = (name for name, _ in columns)
    return Table(title, ("", "What a low number means", *headings), tuple(rows), note, 2)


def _cell(test: SightTest | None) -> str:
    if test is None or test.share is None:
        return NONE
    return f"{interval(test.share)} of {test.pairs}"
