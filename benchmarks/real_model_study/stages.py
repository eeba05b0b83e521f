"""What the stages of the study do that no command does: data, labels, best of n, scores."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from shiftrm.data.named import load
from shiftrm.data.pairs import read_pairs
from shiftrm.data.splits import unit_of
from shiftrm.files import Row, read_jsonl, write_jsonl
from shiftrm.measure.sight import sight_tests
from shiftrm.models.rendering import encode_prompt
from shiftrm.models.responses import IDS
from shiftrm.models.scoring import Scorer, score_rows
from shiftrm.pipeline.engine import StageContext
from shiftrm.pipeline.jobs import place
from shiftrm.pipeline.measures import free, policy_kl
from shiftrm.policies.loading import load_scorer

from .choices import chosen_demonstrations, first_turns, label_pairs, split_prompts
from .gold import LexicalGold, fit_and_report, plain_text

GOLD, SCORES, SIGHT, MOVING = "gold.json", "scores.jsonl", "sight.jsonl", "moving.jsonl"


def prepare(context: StageContext) -> None:
    """Fit the lexical gold to all pairs, and draw the prompts of every purpose."""
    from transformers import AutoTokenizer

    settings = context.stage.settings
    pairs = load("hh_rlhf", settings["hh_pairs"], kind="pairs").rows
    sides = [(plain_text(pair["chosen"]), plain_text(pair["rejected"])) for pair in pairs]
    gold, report = fit_and_report(sides, [unit_of(pair) for pair in pairs])
    gold.write(context.out / GOLD)
    write_jsonl(context.out / "gold-report.jsonl", [asdict(report)])
    tokenizer = AutoTokenizer.from_pretrained(settings["model"])
    prompts = [
        prompt
        for prompt in first_turns(pairs, settings["system"])
        if len(encode_prompt(tokenizer, prompt)) <= settings["max_prompt_tokens"]
    ]
    drawn = split_prompts(prompts, settings["prompts"], seed=context.seed)
    for purpose, rows in drawn.items():
        write_jsonl(context.out / f"{purpose}_prompts.jsonl", rows)


def label(context: StageContext) -> None:
    """Label pairs of sampled responses with the gold; the pairs in `after` come first."""
    settings = context.stage.settings
    before = [
        row for name in settings["after"] for row in read_pairs(_file(context, name, "pairs"))
    ]
    groups = read_jsonl(_file(context, settings["samples"]))
    labelled = label_pairs(
        groups,
        score_rows(gold_of(context), groups),
        settings["count"],
        temperature=settings["temperature"],
        seed=context.random_seed(f"labels/{context.stage.name}"),
    )
    write_jsonl(context.out / "pairs.jsonl", [*before, *labelled])


def choose_best(context: StageContext) -> None:
    """Write the proxy's favourite of each prompt's samples as a demonstration."""
    groups = read_jsonl(_file(context, "move_samples"))
    rewards = score_rows(_scorer(context, context.folder("proxy") / "model"), groups)
    rows = chosen_demonstrations(groups, rewards)
    write_jsonl(context.out / "demonstrations.jsonl", rows)
    context.recorder.add("demonstrations", float(len(rows)), n=len(groups))


def measure_moving(context: StageContext) -> None:
    """Write what both policies' responses are worth, to the gold and to the proxy, and the KL.

    The KL is measured on as many responses a prompt as the first policy gave.
    """
    gold = gold_of(context)
    proxy = _scorer(context, context.folder("proxy") / "model")
    rows = []
    for policy, name in (("base", "base_samples"), ("moved", "eval_samples")):
        groups = read_jsonl(_file(context, name))
        rows.append(
            {
                "policy": policy,
                "gold": _means(score_rows(gold, groups)),
                "proxy": _means(score_rows(proxy, groups)),
                "finished": _means([[float(f) for f in row["finished"]] for row in groups]),
                "words": _means([[len(t.split()) for t in r["responses"]] for r in groups]),
            }
        )
    del proxy
    free()
    size = context.stage.execution["sampling_batch_size"]
    moved, base = str(context.folder("moved") / "model"), context.stage.settings["model"]
    kept = len(read_jsonl(_file(context, "base_samples"))[0]["responses"])
    samples = [_first(row, kept) for row in read_jsonl(_file(context, "eval_samples"))]
    kl, _ = policy_kl(moved, base, samples, size)
    demonstrations = read_jsonl(_file(context, "demonstrations"))
    chosen = [[gold.reward(plain_text(row["completion"]))] for row in demonstrations]
    rows[1] |= {"kl": kl, "demonstrations_gold": _means(chosen)}
    write_jsonl(context.out / MOVING, rows)


def score(context: StageContext) -> None:
    """Write an arm's rewards of both policies' responses."""
    reward = _scorer(context, place(context.stage.settings["reward"], context.root))
    found = {}
    for name in ("eval_samples", "base_samples"):
        groups = read_jsonl(_file(context, name))
        found[name] = score_rows(reward, groups)
    rows = [dict(zip(found, values, strict=True)) for values in zip(*found.values(), strict=True)]
    write_jsonl(context.out / SCORES, rows)


def test_sight(context: StageContext) -> None:
    """Write the sight tests of an arm's rewards on the moved policy's responses."""
    settings = context.stage.settings
    reward = _scorer(context, place(settings["reward"], context.root))
    groups = read_jsonl(_file(context, "eval_samples"))
    tests = sight_tests(reward, groups, count=settings["pairs"], seed=context.random_seed("sight"))
    rows = [
        {
            "kind": test.kind,
            "share": None if test.share is None else asdict(test.share),
            "pairs": test.pairs,
            "why": test.reason,
        }
        for test in tests
    ]
    write_jsonl(context.out / SIGHT, rows)


def gold_of(context: StageContext) -> LexicalGold:
    return LexicalGold.read(context.folder("data") / GOLD)


def _scorer(context: StageContext, path: str | Path) -> Scorer:
    return load_scorer(str(path), batch_size=context.stage.execution["sampling_batch_size"])


def _file(context: StageContext, stage: str, name: str | None = None) -> Path:
    """Return the file that a stage makes, which has its name unless another is given."""
    return context.folder(stage) / f"{name or stage}.jsonl"


def _first(row: Row, count: int) -> Row:
    """Return a group of the first responses."""
    columns = ("responses", "finished", IDS)
    return {**row, **{name: row[name][:count] for name in columns}}


def _means(values: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean of each prompt."""
    return [round(sum(row) / len(row), 6) for row in values]
