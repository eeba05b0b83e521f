"""Score files under reward models and diagnose the rewards, for `diagnose` and `adapt`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

from shiftrm.files import Row
from shiftrm.measure.diagnosis.comparison import ModelChange, compare
from shiftrm.measure.diagnosis.diagnosis import Diagnosis, ScoredFile, diagnose
from shiftrm.measure.diagnosis.scored_files import DataFile, score_data
from shiftrm.measure.diagnosis.verdict import DiagnosisVerdict, Overall, overall, verdicts
from shiftrm.models.scoring import Scorer

Bar = Callable[[str, int | None], AbstractContextManager[Callable[[int, int], None]]]
"""`bar(label, total)` yields a function to call with (done, total); total None is unknown."""


def no_bar(label: str, total: int | None) -> AbstractContextManager[Callable[[int, int], None]]:
    """A progress bar that shows nothing."""
    return nullcontext(lambda done, total: None)


@dataclass(frozen=True)
class Findings:
    """Everything that is shown. The first four lists correspond entry by entry."""

    files: list[ScoredFile]
    rows: list[list[Row]]
    diagnoses: list[Diagnosis]
    verdicts: list[DiagnosisVerdict]
    overall: list[Overall]
    comparisons: list[ModelChange]
    change: DiagnosisVerdict | None = None
    """The effect of an adaptation over all files."""


def find(
    models: Mapping[str, str],
    data: Sequence[DataFile],
    *,
    load: Callable[[str], Scorer],
    batch_size: int = 64,
    seed: int = 0,
    bar: Bar = no_bar,
) -> Findings:
    """Score every file under every model, one model in memory at a time, and judge the rewards.

    Args:
        models: paths by name; the others are compared with the first.
        data: files; the first is the reference.
        load: loads the scorer of a path onto its device.
        batch_size: rows per forward pass.
        seed: of the bootstrap.
        bar: shows progress, in token sequences of a file.

    Raises:
        UserError: as `load` and `score_data`.
    """
    files, rows = [], []
    for model, path in models.items():
        scorer = load(path)
        for file in data:
            with bar(f"scoring {file.name} with {model}", None) as update:
                scored, behind = score_data(
                    scorer,
                    file,
                    model=model,
                    batch_size=batch_size,
                    progress=update,
                )
            files.append(scored)
            rows.append(behind)
        del scorer
    diagnoses = diagnose(files, seed=seed)
    words = verdicts(diagnoses)
    return Findings(
        files=files,
        rows=rows,
        diagnoses=diagnoses,
        verdicts=words,
        overall=overall(list(zip(diagnoses, words, strict=True))),
        comparisons=compare(files, diagnoses, seed=seed),
    )
