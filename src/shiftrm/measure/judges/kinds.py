"""Make a judge of a given kind, for the command line and for recipes."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError, suggest
from shiftrm.measure.judges.comparing import Judge
from shiftrm.models.endpoint import EndpointConfig
from shiftrm.world.world import GOLD, gold_world

KINDS = ("endpoint", "reward-model", GOLD)


@dataclass(frozen=True)
class JudgeOptions:
    """The options of all kinds of judges; each kind reads its own and ignores the rest.

    Attributes:
        model: name at the endpoint; folder or hub name of the reward model.
        endpoint: the server.
        template: see `questions.load_template`.
        parameters, max_requests: see `EndpointJudge`.
        cache: file that keeps the endpoint's answers.
        tie_margin, batch_size: for judges that give scores.
    """

    model: str | None = None
    endpoint: EndpointConfig = EndpointConfig()  # noqa: RUF009 - frozen
    template: str = "general"
    parameters: Mapping[str, Any] | None = None
    max_requests: int | None = None
    cache: str | Path | None = None
    tie_margin: float = 0.0
    batch_size: int = 64


def check_kind(kind: str, said: str = "unknown judge") -> None:
    """Refuse what is not a kind of judge.

    Args:
        said: how the message starts.

    Raises:
        UserError: an unknown kind, or gold world.
    """
    if kind not in KINDS and gold_world(kind) is None:
        raise UserError(f"{said} {kind!r}{suggest(kind, list(KINDS))}")


def open_judge(kind: str, options: JudgeOptions | None = None) -> Judge:
    """Make a judge.

    Args:
        kind: one of `KINDS`, or "gold:NAME" for the reward of another gold world.

    Raises:
        UserError: an unknown kind, a missing model, or an invalid option.
    """
    options = options or JudgeOptions()
    check_kind(kind)
    world = gold_world(kind)
    if world is not None:
        from shiftrm.measure.judges.score_judges import GoldJudge

        return GoldJudge(world, tie_margin=options.tie_margin)
    if options.model is None:
        raise UserError(f"the judge {kind} needs a model: its name at the server, or its folder")
    if kind == "reward-model":
        from shiftrm.measure.judges.score_judges import RewardModelJudge
        from shiftrm.models.scoring import Scorer

        return RewardModelJudge(
            Scorer.from_pretrained(options.model).to_accelerator(),
            name=Path(options.model).name or options.model,
            tie_margin=options.tie_margin,
            batch_size=options.batch_size,
        )
    from shiftrm.measure.judges.cache import AnswerCache
    from shiftrm.measure.judges.endpoint_judge import EndpointJudge
    from shiftrm.measure.judges.questions import load_template
    from shiftrm.models.endpoint import Endpoint

    return EndpointJudge(
        Endpoint(options.endpoint),
        options.model,
        load_template(options.template),
        parameters=options.parameters,
        cache=AnswerCache(options.cache),
        max_requests=options.max_requests,
    )
