"""A judge by its kind: one call for the command line and for recipes."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiftrm.errors import UserError, suggest
from shiftrm.measure.judges.comparing import Judge

__all__ = ["KINDS", "open_judge"]

KINDS = ("endpoint", "reward-model", "gold")


def open_judge(
    kind: str,
    *,
    model: str | None = None,
    base_url: str | None = None,
    key_variable: str = "OPENAI_API_KEY",
    template: str = "general",
    parameters: Mapping[str, Any] | None = None,
    concurrency: int = 8,
    timeout: float = 120.0,
    max_retries: int = 6,
    cache: str | Path | None = None,
    max_requests: int | None = None,
    tie_margin: float = 0.0,
    batch_size: int = 64,
) -> Judge:
    """Make a judge; options of other kinds than the one asked for are not looked at.

    Args:
        kind: one of `KINDS`.
        model: name at the endpoint; folder or hub name of the reward model.
        base_url, key_variable, concurrency, timeout, max_retries: see `EndpointConfig`.
        template: see `judge_prompts.load_template`.
        parameters, cache, max_requests: see `EndpointJudge`; `cache` is a file.
        tie_margin, batch_size: of judges that give numbers.

    Raises:
        UserError: an unknown kind, no model where one is needed, and what the parts refuse.
    """
    if kind not in KINDS:
        raise UserError(f"unknown judge {kind!r}{suggest(kind, list(KINDS))}")
    if kind == "gold":
        from shiftrm.measure.judges.score_judges import GoldJudge

        return GoldJudge(tie_margin=tie_margin)
    if model is None:
        raise UserError(f"the judge {kind} needs a model: its name at the server, or its folder")
    if kind == "reward-model":
        from shiftrm.cli.checks import to_accelerator
        from shiftrm.measure.judges.score_judges import RewardModelJudge
        from shiftrm.models.scoring import Scorer

        scorer = Scorer.from_pretrained(model)
        to_accelerator(scorer.model)
        name = Path(model).name or model
        return RewardModelJudge(scorer, name=name, tie_margin=tie_margin, batch_size=batch_size)
    from shiftrm.measure.judges.cache import AnswerCache
    from shiftrm.measure.judges.endpoint_judge import EndpointJudge
    from shiftrm.measure.judges.questions import load_template
    from shiftrm.models.endpoint import Endpoint, EndpointConfig

    config = EndpointConfig(
        base_url=base_url,
        key_variable=key_variable,
        timeout=timeout,
        max_retries=max_retries,
        concurrency=concurrency,
    )
    return EndpointJudge(
        Endpoint(config),
        model,
        load_template(template),
        parameters=parameters,
        cache=AnswerCache(cache),
        max_requests=max_requests,
    )
