"""The stages of a run over the gold world's domains, and what each reads."""

from dataclasses import asdict
from typing import Any

from shiftrm.config import to_mapping
from shiftrm.pipeline.domain_config import DomainRunConfig
from shiftrm.pipeline.engine import Stage
from shiftrm.world.domain_gold import HELD_OUT, SOURCES

__all__ = ["beta_name", "plan", "sources", "targets"]

STAGES = "shiftrm.pipeline.domain_stages"
SEARCH_TARGETS = 3


def targets(*, search: bool) -> tuple[str, ...]:
    """The domains that a policy is made for."""
    return SOURCES[-SEARCH_TARGETS:] if search else HELD_OUT


def sources(*, search: bool) -> tuple[str, ...]:
    """The domains whose pairs are learnt from."""
    return SOURCES[:-SEARCH_TARGETS] if search else SOURCES


def beta_name(beta: float) -> str:
    """How records call the reward model that was meta-trained for a beta."""
    return f"beta_{beta:g}"


def plan(config: DomainRunConfig) -> list[Stage]:
    """All stages; needs stand before those that need them."""
    labels = {  # what everything that learns from pairs shares
        "search": config.search,
        "steps": config.meta.outer_steps,
        "pairs": config.meta.domains_per_step * config.meta.query_batch_size,
        "learning_rate": config.pairs.learning_rate,
    }
    stages = [
        _stage("world", "make_world", {"world": asdict(config.world)}),
        Stage(
            "sft",
            f"{STAGES}:train_sft",
            asdict(config.sft),
            ("world",),
            {"stage": "sft", "method": "reference", "round": 0},
        ),
    ]
    stages += [
        _stage(
            f"meta/{beta_name(beta)}",
            "meta_train",
            {**asdict(config.meta), "beta": beta, "search": config.search},
            ("world", "sft"),
            method=beta_name(beta),
        )
        for beta in config.trained_betas
    ]
    if _wanted(config, "pooled"):
        stages.append(_stage("pooled", "train_on_pairs", labels, ("world", "sft")))
    if _wanted(config, "oracle"):
        stages += [
            _stage(f"oracle/{name}", "train_on_pairs", {**labels, "target": name}, ("world", "sft"))
            for name in targets(search=config.search)
        ]
    if "dpo" in config.methods:
        settings = {**labels, **asdict(config.dpo)}
        stages.append(_stage("dpo", "train_dpo", settings, ("world", "sft")))
    stages += [_policy(config, method, _model(config, method)) for method in config.methods]
    stages += [
        _policy(config, f"oodpl_{beta_name(beta)}", f"meta/{beta_name(beta)}", beta=beta)
        for beta in config.betas
    ]
    return stages


def _policy(
    config: DomainRunConfig, method: str, model: str | None, *, beta: float | None = None
) -> Stage:
    """Policies for all targets by one method, and their measurements."""
    needs = ["world", "sft"]
    if model == "oracle":
        needs += [f"oracle/{name}" for name in targets(search=config.search)]
    elif model is not None:
        needs.append(model)
    if beta is None:
        beta = config.beta if method.startswith("oodpl") else config.pairs.guide_beta
    settings: dict[str, Any] = {
        "method": method,
        "model": model,
        "search": config.search,
        "evaluation": to_mapping(config.evaluation),
    }
    if method.endswith("_ppo"):
        settings["ppo"] = to_mapping(config.ppo)
    elif method not in ("reference", "dpo"):
        settings["policy"] = {**asdict(config.policy), "beta": beta}
    return _stage(f"policies/{method}", "make_policies", settings, tuple(needs), method=method)


def _model(config: DomainRunConfig, method: str) -> str | None:
    """The stage whose model a method uses; "oracle" for one a target."""
    kind = method.partition("_")[0]
    if kind == "oodpl":
        return f"meta/{beta_name(config.beta)}"
    return kind if kind in ("pooled", "oracle", "dpo") else None


def _wanted(config: DomainRunConfig, kind: str) -> bool:
    return any(method.startswith(f"{kind}_") for method in config.methods)


def _stage(
    name: str,
    function: str,
    settings: dict[str, Any],
    needs: tuple[str, ...] = (),
    *,
    method: str | None = None,
) -> Stage:
    kind, _, rest = name.partition("/")
    record_as = {"stage": kind, "method": method or rest or kind, "round": 0}
    return Stage(name, f"{STAGES}:{function}", settings, needs, record_as)
