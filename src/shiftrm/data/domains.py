"""Data of many domains, checked on reading.

On disk a domain is a folder inside DIR:

    DIR/<domain>/finetune.jsonl     {"prompt", "response", "finished"?}: support, to fine-tune on
    DIR/<domain>/pairs.jsonl        {"prompt", "chosen", "rejected", ...}: query, to learn from
    DIR/<domain>/eval_pairs.jsonl   the same columns: to measure preference accuracy on
    DIR/<domain>/prompts.jsonl      {"prompt"}: to sample responses for
    DIR/splits.json                 {"source": [...], "held_out": [...], "validation": [...]}

`finetune.jsonl` is required, as is `pairs.jsonl` in a source domain; the other files are optional.
Source domains are for meta-training, validation domains monitor it, and held-out domains are for
the meta-test: their `pairs.jsonl`, if any, is for the baseline that may see it. A held-out domain
may also be named as a validation domain, to be watched. Folders whose names begin with a dot are
not domains. The columns `margin` and `weight` of pairs are not used: every pair counts alike.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from shiftrm.data.pairs import check_pair, read_pairs
from shiftrm.data.prompt_keys import prompt_key
from shiftrm.data.prompts import read_prompts
from shiftrm.data.sources import read_rows
from shiftrm.errors import UserError, suggest
from shiftrm.files import (
    BEYOND_JSON,
    Row,
    atomic_write_text,
    json_line,
    require_columns,
    together,
    write_jsonl,
)
from shiftrm.models.rendering import Text, check_text

FINETUNE, PAIRS = "finetune.jsonl", "pairs.jsonl"
EVAL_PAIRS, PROMPTS = "eval_pairs.jsonl", "prompts.jsonl"
SPLITS = "splits.json"
LONGEST_NAME = 255
"""Bytes of a folder's name: what common file systems take."""


@dataclass(frozen=True)
class Domain:
    """One domain's data; rows keep their other columns."""

    name: str
    support: tuple[Row, ...]  # {"prompt", "response", "finished"?}
    query: tuple[Row, ...] = ()  # {"prompt", "chosen", "rejected", ...}
    eval_pairs: tuple[Row, ...] = ()
    prompts: tuple[Text, ...] = ()  # to evaluate on


@dataclass(frozen=True)
class DomainSplit:
    """The domains for training, for validation, and held out for the meta-test."""

    source: tuple[Domain, ...]
    held_out: tuple[Domain, ...]
    validation: tuple[Domain, ...] = ()

    @property
    def all(self) -> tuple[Domain, ...]:
        """Return every domain once."""
        named = {d.name: d for d in (*self.source, *self.validation, *self.held_out)}
        return tuple(named.values())


def load_split(
    folder: str | Path,
    *,
    source: Sequence[str] | None = None,
    held_out: Sequence[str] | None = None,
    validation: Sequence[str] | None = None,
    support_batch: int = 1,
    query_batch: int = 1,
) -> DomainSplit:
    """Read the domains of a folder and make every check that training needs.

    Args:
        folder: DIR of the layout above.
        source, held_out, validation: names; None uses those of `splits.json`. Without that file,
            `source` is every domain not named elsewhere.
        support_batch, query_batch: the rows of a source domain that one step uses.

    Raises:
        UserError: as `load_domain`, `split_domains`, `check_batches` or `check_leaks`.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder; give the folder that holds one per domain")
    names = domain_names(folder)
    if not names:
        raise UserError(f"{folder}: no domains; expected DOMAIN/{FINETUNE} in it")
    named = _read_splits(folder / SPLITS)
    held_out = named.get("held_out", []) if held_out is None else held_out
    validation = named.get("validation", []) if validation is None else validation
    if source is None:
        taken = {*held_out, *validation}
        source = [name for name in named.get("source", names) if name not in taken]
        if "source" not in named:
            _refuse_halves(folder, {*names, *taken})
    _check_names(names, source, held_out, validation, where=str(folder))
    domains = {
        name: load_domain(folder / name, labelled=name in source)
        for name in (*source, *validation, *held_out)
    }
    split = split_domains(domains.values(), source=source, held_out=held_out, validation=validation)
    check_batches(split, support_batch=support_batch, query_batch=query_batch)
    check_leaks(split)
    return split


def domain_names(folder: Path) -> list[str]:
    """Return the names of the folders that are domains, in order."""
    return sorted(path.parent.name for path in _in_domains(folder, FINETUNE))


def _in_domains(folder: Path, name: str) -> list[Path]:
    """Return the files of this name in the folders of domains, of which none is hidden."""
    return [path for path in folder.glob(f"*/{name}") if not path.parent.name.startswith(".")]


def _refuse_halves(folder: Path, known: set[str]) -> None:
    """Reject a domain without its support, which would otherwise be silently missing."""
    for name in (PAIRS, EVAL_PAIRS, PROMPTS):
        for path in sorted(_in_domains(folder, name)):
            if path.parent.name not in known:
                raise UserError(
                    f"{path.parent}: it has {name} but no {FINETUNE}; add it, or name the sources "
                    f"in {SPLITS}"
                )


def load_domain(folder: str | Path, *, labelled: bool) -> Domain:
    """Read one domain's folder; its name is the folder's.

    Args:
        labelled: whether `pairs.jsonl` must be there.

    Raises:
        UserError: a missing or empty file, or an invalid support row, pair or prompt.
    """
    folder = Path(folder)
    if labelled and not (folder / PAIRS).exists():
        raise UserError(
            f"{folder / PAIRS}: no such file; a source domain needs preference pairs: add them or "
            "hold the domain out"
        )
    return Domain(
        name=folder.name,
        support=tuple(read_rows(folder / FINETUNE, _check_support, what="fine-tuning rows")),
        query=_pair_rows(folder / PAIRS),
        eval_pairs=_pair_rows(folder / EVAL_PAIRS),
        prompts=_prompts(folder / PROMPTS),
    )


def split_domains(
    domains: Iterable[Domain],
    *,
    source: Sequence[str],
    held_out: Sequence[str],
    validation: Sequence[str] = (),
) -> DomainSplit:
    """Sort domains into a split.

    Raises:
        UserError: no source or no held-out domain, an unknown name, a name given twice.
    """
    by_name: dict[str, Domain] = {}
    for domain in domains:
        if domain.name in by_name:
            raise UserError(f"domain {domain.name!r}: given twice; merge or rename one of them")
        by_name[domain.name] = domain
    _check_names(list(by_name), source, held_out, validation, where="domains")
    return DomainSplit(
        source=tuple(by_name[name] for name in source),
        held_out=tuple(by_name[name] for name in held_out),
        validation=tuple(by_name[name] for name in validation),
    )


def check_batches(split: DomainSplit, *, support_batch: int, query_batch: int) -> None:
    """Reject a domain with fewer rows than one step uses.

    Args:
        support_batch: support rows per step, of any domain.
        query_batch: query pairs per step, of a source domain.

    Raises:
        UserError: the first domain that is too small.
    """
    wanted = [(domain, "fine-tuning rows", domain.support, support_batch) for domain in split.all]
    wanted += [(domain, "preference pairs", domain.query, query_batch) for domain in split.source]
    for domain, what, rows, batch in wanted:
        if len(rows) < batch:
            raise UserError(
                f"domain {domain.name!r}: {len(rows)} {what}, but a batch takes {batch}; add rows, "
                "lower the batch or leave the domain out"
            )


def check_leaks(split: DomainSplit) -> None:
    """Reject an evaluation prompt that a domain trains on; differences in spaces are ignored.

    Raises:
        UserError: names the domain, the prompt and the domain that trains on it.
    """
    trained = _trained_prompts(split.all)
    for domain in split.all:
        for prompt in (*(row["prompt"] for row in domain.eval_pairs), *domain.prompts):
            if (other := trained.get(prompt_key(prompt))) is not None:
                raise UserError(
                    f"domain {domain.name!r}: the evaluation prompt {_short(prompt)} is also "
                    f"trained on in domain {other!r}; remove it from one of them"
                )


def drop_leaks(domains: Sequence[Domain]) -> tuple[list[Domain], int]:
    """Drop evaluation pairs and prompts that `check_leaks` would reject, and count them."""
    trained = _trained_prompts(domains)
    kept = [
        replace(
            domain,
            eval_pairs=tuple(
                r for r in domain.eval_pairs if prompt_key(r["prompt"]) not in trained
            ),
            prompts=tuple(p for p in domain.prompts if prompt_key(p) not in trained),
        )
        for domain in domains
    ]
    dropped = sum(
        len(old.eval_pairs) + len(old.prompts) - len(new.eval_pairs) - len(new.prompts)
        for old, new in zip(domains, kept, strict=True)
    )
    return kept, dropped


def write_domains(
    folder: str | Path,
    domains: Sequence[Domain],
    *,
    held_out: Sequence[str],
    source: Sequence[str] | None = None,
    validation: Sequence[str] = (),
) -> Path:
    """Write domains in the layout above; `splits.json` comes last and marks them complete.

    Args:
        source: names; None uses every domain not named elsewhere.

    Raises:
        UserError: a split that `split_domains` or `check_leaks` rejects, a domain without support
            rows, a source without pairs, a row that `load_domain` would reject or JSON cannot hold,
            a name that is not a valid folder name, or a folder that already exists. Nothing is
            written then.
    """
    folder = Path(folder)
    if source is None:
        taken = {*held_out, *validation}
        source = [domain.name for domain in domains if domain.name not in taken]
    split = split_domains(domains, source=source, held_out=held_out, validation=validation)
    for domain in split.all:
        _check_writable(domain)
    check_leaks(split)
    for domain in split.all:
        if not domain.support:
            raise UserError(f"domain {domain.name!r}: no fine-tuning rows; leave the domain out")
        if domain in split.source and not domain.query:
            raise UserError(f"domain {domain.name!r}: no preference pairs; hold the domain out")
    for path in (folder / SPLITS, *(folder / domain.name for domain in split.all)):
        if path.exists():
            raise UserError(f"{path}: already exists; choose an empty folder for the domains")
    names = {"source": list(source), "held_out": list(held_out), "validation": list(validation)}
    with together():
        for domain in split.all:
            for name, rows in _files(domain).items():
                if rows:
                    write_jsonl(folder / domain.name / name, rows)
        atomic_write_text(folder / SPLITS, json.dumps(names, ensure_ascii=False, indent=2) + "\n")
    return folder


def _files(domain: Domain) -> dict[str, tuple[Row, ...]]:
    """Return a domain's rows by the name of their file."""
    return {
        FINETUNE: domain.support,
        PAIRS: domain.query,
        EVAL_PAIRS: domain.eval_pairs,
        PROMPTS: tuple({"prompt": prompt} for prompt in domain.prompts),
    }


def _check_writable(domain: Domain) -> None:
    """Refuse a domain that could not be written, or not be read again."""
    name = domain.name
    plain = Path(name).name == name and name[:1] not in ("", ".") and name != SPLITS
    if not plain or len(name.encode()) > LONGEST_NAME:
        raise UserError(f"domain {name!r:.80}: not usable as a folder's name; rename it")
    for file, rows in _files(domain).items():
        for number, row in enumerate(rows, start=1):
            where = f"domain {name!r}: {file}, row {number}"
            if file == FINETUNE:
                _check_support(row, where)
            elif file != PROMPTS:
                check_pair(row, where)
                _require_prompt(row, where)
            elif not row["prompt"]:
                raise UserError(f"{where}: the prompt is empty; remove the row")
            try:
                json_line(row)
            except (TypeError, ValueError, RecursionError) as error:
                raise UserError(f"{where}: cannot be written as JSON ({error})") from None


def _check_names(
    known: list[str],
    source: Sequence[str],
    held_out: Sequence[str],
    validation: Sequence[str],
    *,
    where: str,
) -> None:
    if not held_out:
        raise UserError(f"{where}: no held-out domain; name at least one that is not trained on")
    if not source:
        raise UserError(f"{where}: no source domain is left to train on; hold fewer out")
    roles: dict[str, str] = {}
    for role, names in (("source", source), ("validation", validation), ("held-out", held_out)):
        for name in names:
            if not name.isprintable():  # nor can it be written as UTF-8, if it is not
                raise UserError(
                    f"{where}: the {role} domain {name!r} has a name that cannot be printed; "
                    "rename the domain"
                )
            if name not in known:
                raise UserError(f"{where}: no {role} domain {name!r}{suggest(name, known)}")
            watched = role == "held-out" and roles.get(name) == "validation"
            if name in roles and not watched:
                first = f"both {roles[name]} and {role}" if roles[name] != role else f"twice {role}"
                raise UserError(f"{where}: domain {name!r} is {first}; name each domain once")
            roles[name] = role


def _read_splits(path: Path) -> dict[str, list[str]]:
    if not path.exists():
        return {}
    if path.is_dir():
        raise UserError(f"{path}: is a folder; make it a file with the names of domains")
    try:
        said = json.loads(path.read_text(encoding="utf-8-sig"))
    except RecursionError:
        raise UserError(f"{path}: {BEYOND_JSON}") from None
    except ValueError as error:
        raise UserError(f"{path}: not valid JSON ({error}); write the names of domains") from None
    roles = ("source", "held_out", "validation")
    if not isinstance(said, dict) or not all(
        role in roles and isinstance(names, list) and all(isinstance(n, str) for n in names)
        for role, names in said.items()
    ):
        raise UserError(f"{path}: expected an object with lists of names: {', '.join(roles)}")
    return said


def _check_support(row: Row, where: str) -> None:
    require_columns(row, ("prompt", "response"), where)
    for column in ("prompt", "response"):
        check_text(row[column], f"{where}: column {column!r}")
        if not row[column]:
            raise UserError(f"{where}: the {column} is empty; remove the row")
    if not isinstance(row.get("finished", True), bool):
        raise UserError(f"{where}: column 'finished' is {row['finished']!r}; give true or false")


def _pair_rows(path: Path) -> tuple[Row, ...]:
    """Read pairs with `read_pairs` and check that each has a prompt; none without a file."""
    rows = read_pairs(path) if path.exists() else []
    for number, row in enumerate(rows, start=1):
        _require_prompt(row, f"{path}: pair {number}")
    return tuple(rows)


def _require_prompt(row: Row, where: str) -> None:
    if not row.get("prompt"):
        raise UserError(f"{where} has no prompt; a domain's pairs need a separate prompt")


def _prompts(path: Path) -> tuple[Text, ...]:
    names, prompts = read_prompts(path) if path.exists() else ([], [])
    for name, prompt in zip(names, prompts, strict=True):
        if not prompt:
            raise UserError(f"{name} is empty; remove the row")
    return tuple(prompts)


def _trained_prompts(domains: Iterable[Domain]) -> dict[str, str]:
    """Map each training prompt (its `prompt_key`) to the first domain that trains on it."""
    trained: dict[str, str] = {}
    for domain in domains:
        for row in (*domain.support, *domain.query):
            trained.setdefault(prompt_key(row["prompt"]), domain.name)
    return trained


def _short(prompt: Text) -> str:
    text = prompt_key(prompt)
    return repr(text if len(text) <= 60 else text[:57] + "...")
