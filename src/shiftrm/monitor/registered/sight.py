"""The sight tests of `measure.sight` as signals: does the reward see that a text got worse?"""

from shiftrm.data.negatives import NEGATIVES
from shiftrm.measure.sight import sight_tests
from shiftrm.monitor.signals import SIGNALS, Signal, Step

KINDS = ("other_prompt", "repeated", "cut", "shuffled")


def _share(step: Step, kind: str) -> float | None:
    # Pairs are drawn anew in each step: a fixed seed would choose the same places every time.
    (test,) = sight_tests(step.score, step.groups, kinds=[kind], count=step.pairs, seed=step.number)
    return None if test.share is None else test.share.value


for _kind in KINDS:
    SIGNALS.register(f"sight_{_kind}")(
        Signal(
            f"sight: {_kind.replace('_', ' ')}",
            "share of responses with a higher reward than " + NEGATIVES.get(_kind).label,
            "low",
            lambda step, kind=_kind: _share(step, kind),  # type: ignore[misc]
            scores=True,
        )
    )
