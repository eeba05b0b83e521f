"""Checks of a meta-test, before anything is written: its domains, and the models it is given."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from shiftrm.data.domains import (
    Domain,
    DomainSplit,
    check_leaks,
    domain_names,
    load_domain,
    load_split,
)
from shiftrm.errors import UserError, first_line, suggest
from shiftrm.models.loading import explain_loading, refuse_adapter
from shiftrm.pipeline.engine import RECORDS_FILE
from shiftrm.pipeline.folder import CONFIG_FILE
from shiftrm.pipeline.jobs import Input, MetaTest
from shiftrm.policies.loading import check_policy, check_reward_model
from shiftrm.world.build_domains import WEIGHTS, read_table
from shiftrm.world.domain_gold import gold_of

__all__ = ["asked_domains", "check_models", "check_rows", "is_gold"]

TAKEN = ("reference", RECORDS_FILE, CONFIG_FILE, "README.txt")
"""What the output folder holds besides the domains' folders."""


def asked_domains(folder: Path, names: Sequence[str] | None) -> list[Domain]:
    """Return the domains of these names, or the held-out ones."""
    if names is None:
        found = list(load_split(folder).held_out)
    else:
        known = domain_names(folder)
        if not names:
            raise UserError("--only names no domain; name one, or leave it out for the held-out")
        for place, name in enumerate(names):
            if name not in known:
                raise UserError(f"{folder}: no domain {name!r}{suggest(name, known)}")
            if name in names[:place]:
                raise UserError(f"--only names {name!r} twice; name each domain once")
        domains = {name: load_domain(folder / name, labelled=False) for name in known}
        found = [domains.pop(name) for name in names]
        trained = [replace(domain, eval_pairs=(), prompts=()) for domain in domains.values()]
        check_leaks(DomainSplit(source=tuple(trained), held_out=tuple(found)))
    for domain in found:
        if domain.name in TAKEN:
            raise UserError(
                f"{folder}: a domain called {domain.name!r} cannot be tested, because a meta-test "
                "keeps its own files under such a name; rename its folder"
            )
    return found


def check_rows(domain: Domain, folder: Path, batch_size: int) -> None:
    """Refuse a domain with nothing to measure on, or with fewer fine-tuning rows than a batch."""
    if not domain.eval_pairs and not domain.prompts:
        raise UserError(
            f"{folder / domain.name}: neither eval_pairs.jsonl nor prompts.jsonl to measure on"
        )
    if len(domain.support) < batch_size:
        raise UserError(
            f"domain {domain.name!r}: {len(domain.support)} fine-tuning rows, but a batch takes "
            f"{batch_size}; set weighted.batch_size"
        )


def check_models(job: MetaTest, domains: Sequence[str]) -> None:
    """Refuse paths that are not what their options take, before anything is written."""
    for option in ("policy", "reference"):
        if (path := getattr(job, option)) is not None:
            check_policy(str(path), f"--{option}")
            _require_there(str(path), f"--{option}")
            refuse_adapter(str(path), f"and --{option} takes a whole model")
    if job.reference is not None:
        _require_one_vocabulary(str(job.policy), str(job.reference))
    for option in ("reward", "judge"):
        path = getattr(job, option)
        if option == "judge" and is_gold(path):
            if not Path(str(path)).is_file():
                raise UserError(f"{path}: no such file; give --judge a gold world's {WEIGHTS}")
            table = read_table(Path(str(path)).parent)
            for domain in domains:
                gold_of(domain, table)
        elif path is not None:
            check_reward_model(str(path), f"--{option}")
            _require_there(str(path), f"--{option}")


def _require_there(path: str, option: str) -> None:
    """Refuse a name on the hub under which there is no model."""
    from transformers.utils import cached_file, find_adapter_config_file

    if Path(path).is_dir():
        return
    try:
        if find_adapter_config_file(path) is None:
            cached_file(path, "config.json")
    except (OSError, ValueError) as error:
        raise UserError(
            f"{path}: no such folder, and no model on the hub that can be read "
            f"({first_line(error)}); give {option} a checkpoint folder or a hub name"
        ) from None


def _require_one_vocabulary(policy: str, reference: str) -> None:
    """Refuse a reference between which and the policy no KL is defined."""
    from transformers import AutoConfig, AutoTokenizer

    found = []
    for path in (policy, reference):
        with explain_loading(path, "a policy with its tokenizer"):
            size = AutoConfig.from_pretrained(path).get_text_config().vocab_size
            found.append((AutoTokenizer.from_pretrained(path).get_vocab(), size))
    if found[0] != found[1]:
        raise UserError(
            f"{reference}: has another vocabulary than the policy, so there is no KL between them; "
            "give --reference a model that the policy was made from"
        )


def is_gold(judge: Input | None) -> bool:
    """Whether this judge is a gold world's table of weights."""
    return judge is not None and Path(str(judge)).name == WEIGHTS
