"""`shiftrm evaluate win-rate`: win rate of one set of responses over another by a judge."""

import json
import sys
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from shiftrm.cli.checks import output_file, output_folder, output_rows
from shiftrm.cli.options import About, build, inputs, option, optional
from shiftrm.cli.output import write_numbers
from shiftrm.cli.progress import bar, only_on_terminals
from shiftrm.config import apply_overrides
from shiftrm.data.sources import SOURCE_HELP
from shiftrm.errors import UserError
from shiftrm.files import iterate_jsonl, together, write_jsonl
from shiftrm.measure.judges.kinds import JudgeOptions, check_kind, open_judge
from shiftrm.models.endpoint import EndpointConfig
from shiftrm.world.world import gold_world

EPILOG = """examples:
  shiftrm evaluate win-rate --ours ppo.jsonl --theirs sft.jsonl --output runs/ppo-sft \\
      --judge endpoint --model gpt-4o --price-in 2.5 --price-out 10
  shiftrm evaluate win-rate --ours ppo.jsonl --theirs sft.jsonl --output runs/ppo-sft \\
      --judge endpoint --base-url http://localhost:8000/v1 --model my-judge --template harmless
  shiftrm evaluate win-rate --ours ppo.jsonl --theirs sft.jsonl --output runs/ppo-sft \\
      --judge reward-model --model models/other-reward --tie-margin 0.1

Files hold {"prompt", "responses", "finished"?}, as `shiftrm sample` writes them, or {"prompt",
"response"}; the first response of a row is judged. Both files answer the same prompts.

A judge behind an endpoint (any server that speaks OpenAI's API) is asked twice for each prompt,
once with each response first; answers that disagree are a tie. Its key comes from the environment
variable OPENAI_API_KEY (or --key-variable) and is written nowhere. Before anything is sent, the
number of requests and tokens is shown. Up to --max-requests are sent without asking; more are sent
with --yes, or after a question on a terminal, and refused otherwise. All answers are kept in
--cache: the same command given again asks only what is missing.

A template is general, helpful, harmless, summary, or a file: one message with {prompt},
{response_a}, {response_b} that asks for [[A]], [[B]] or [[C]] ({fence}, if used, is a mark that no
response can hold). A file called .j2 is a jinja template with the same variables.

The folder gets verdicts.jsonl (everything the judge said), win_rate.json, and win_rate.html.
"""

VERDICTS, NUMBERS, PAGE = FILES = ("verdicts.jsonl", "win_rate.json", "win_rate.html")
"""Files written into the folder besides the cache."""


ABOUT = About(
    help="who answers better, as a judge sees it?",
    description="Has a judge compare two sets of responses to the same prompts: wins, ties "
    "and losses with intervals, lengths, the rate at equal lengths, and what the order of "
    "responses does to the judge.",
    epilog=EPILOG + SOURCE_HELP,
    again="to continue; answers that have come are in the cache",
)

SCORES = "judges that give numbers"
ENDPOINT = "a judge behind an endpoint"


@dataclass(frozen=True, kw_only=True)
class Options:
    ours: str = option("DATA", "responses of one policy", reads=True)
    theirs: str = option("DATA", "responses of the other", reads=True)
    judge: str = option(
        "KIND", "endpoint, reward-model, or gold or gold:WORLD, a gold world's reward"
    )
    output: str = option("DIR", "folder to write")
    model: str | None = optional("NAME", "name at the endpoint; folder of a reward model")
    limit: int = option("N", "prompts, 0 for all", default=100, least=0)
    seed: int = option("N", "seed with which prompts are drawn", default=0)
    tie_margin: float | None = optional(
        "X", "differences up to this are a tie", shown="0", group=SCORES
    )
    batch_size: int = option("N", default=64, least=1, group=SCORES)
    base_url: str | None = optional(
        "URL", "address up to /v1", shown="$OPENAI_BASE_URL", group=ENDPOINT
    )
    key_variable: str = option("NAME", "see below", default="OPENAI_API_KEY", group=ENDPOINT)
    template: str | None = optional("NAME|FILE", "see below", shown="general", group=ENDPOINT)
    parameter: list[str] | None = optional(
        "NAME=VALUE",
        "added to every request; null removes one; may be repeated",
        shown="temperature=0, max_tokens=1024",
        group=ENDPOINT,
    )
    concurrency: int | None = optional("N", "requests at once", shown="8", group=ENDPOINT)
    timeout: float | None = optional("S", "seconds for an attempt", shown="120", group=ENDPOINT)
    retries: int | None = optional("N", "retries, with back-off", shown="6", group=ENDPOINT)
    cache: str | None = optional(
        "FILE", "answers so far", shown="answers.jsonl in the folder", group=ENDPOINT
    )
    price_in: float | None = optional("X", "price of a million tokens", least=0, group=ENDPOINT)
    price_out: float | None = optional("X", "price of a million tokens", least=0, group=ENDPOINT)
    tokenizer: str | None = optional(
        "DIR", "counts the tokens", shown="characters / 4", group=ENDPOINT
    )
    max_requests: int = option(
        "N", "most requests sent without asking", default=1000, least=0, group=ENDPOINT
    )
    yes: bool = option(help="send them, however many", default=False, group=ENDPOINT)
    dry_run: bool = option(help="say what would be asked, and stop", default=False, group=ENDPOINT)

    def __post_init__(self) -> None:
        check_kind(self.judge, "--judge is")
        gold = gold_world(self.judge) is not None
        given = [f for f in fields(self) if f.default is None and getattr(self, f.name) is not None]
        flags = {f.metadata.get("group"): f"--{f.name.replace('_', '-')}" for f in given}
        if self.judge == "endpoint" and SCORES in flags:
            raise UserError(
                f"{flags[SCORES]} is for judges that give numbers, not for --judge endpoint"
            )
        if self.judge != "endpoint" and ENDPOINT in flags:
            raise UserError(f"{flags[ENDPOINT]} is for --judge endpoint, not for {self.judge}")
        if gold and self.model is not None:
            raise UserError(f"--judge {self.judge} takes no --model")
        if not gold and self.model is None:
            raise UserError(
                f"--judge {self.judge} needs --model: its name at the server, or its folder"
            )


def run(options: Options) -> None:
    from shiftrm.data.sources import iterate_rows
    from shiftrm.measure.judges.comparing import draw, match_rows
    from shiftrm.measure.judges.win_rates import (
        headline,
        problems,
        sentences,
        summarise,
        verdict_rows,
        warnings,
    )
    from shiftrm.report.win_rate import write_page

    folder = _folder(options)
    sides = [[row for _, row in iterate_rows(source)] for source in (options.ours, options.theirs)]
    comparisons = match_rows(*sides, names=(options.ours, options.theirs))
    chosen = draw(comparisons, options.limit or None, seed=options.seed)
    if options.judge == "reward-model":
        only_on_terminals()
    judge = _open(options, folder)
    if options.judge == "endpoint" and not _approved(options, judge, chosen):
        return
    with bar("judging", len(chosen)) as advance:
        verdicts = _judge(judge, chosen, advance)
    rate = summarise(verdicts, judge=judge.name, seed=options.seed)
    if rate is None:
        write_jsonl(folder / VERDICTS, verdict_rows(verdicts))
        reasons = ", ".join(f"{word} ({n})" for word, n in problems(verdicts).items())
        raise UserError(
            f"not one of {len(verdicts)} comparisons has a verdict that can be read: {reasons}; "
            f"see what the judge said in {folder / VERDICTS}"
        )
    settings = _settings(options, judge, len(comparisons))
    content = {
        "headline": headline(rate),
        "sentences": [*sentences(rate)],
        "warnings": [*warnings(rate)],
        **asdict(rate),
        "settings": settings,
    }
    with together():
        write_jsonl(folder / VERDICTS, verdict_rows(verdicts))
        write_page(rate, verdicts, settings, folder / PAGE)
        write_numbers(folder / NUMBERS, content, ensure_ascii=True, allow_nan=False)
    _show(content, several=sum(len(row.get("responses", ())) > 1 for side in sides for row in side))
    if len(chosen) < len(comparisons):
        print(
            f"Judged: {len(chosen)} of {len(comparisons)} prompts, drawn with seed {options.seed}."
        )
    if options.judge == "endpoint":
        print(f"Requests sent: {judge.asked}, and {judge.endpoint.retries} sent again.")
    print(f"Page: {folder / PAGE}")


def _folder(options: Options) -> Path:
    """Return the output folder: new, or with earlier verdicts on the same two files."""
    read = [*inputs(options), None if options.judge == "endpoint" else options.model]
    folder = output_folder(options.output, apart_from=read)
    for name in FILES:
        output_file(str(folder / name), apart_from=read, may_exist=True)
    found = [folder / name for name in FILES if (folder / name).exists()]
    if not found:
        return folder
    try:
        judged = json.loads((folder / NUMBERS).read_bytes())["settings"]
        same = all(judged[side] == getattr(options, side) for side in ("ours", "theirs"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        same = found == [folder / VERDICTS] and _holds_verdicts(folder / VERDICTS)
    if not same:
        raise UserError(
            f"{found[0]}: already there and not of a judgement of these two files; choose another "
            "--output, or delete it first"
        )
    return folder


def _holds_verdicts(path: Path) -> bool:
    """Whether the file contains verdicts, as it does alone if none could be read."""
    try:
        return all({"ours", "theirs", "outcome"} <= set(row) for _, row in iterate_jsonl(path))
    except UserError:
        return False


def _open(options: Options, folder: Any) -> Any:
    cache = None
    if options.judge == "endpoint":
        others = [folder / name for name in FILES]
        own = options.cache or str(folder / "answers.jsonl")
        cache = output_rows(own, apart_from=others, may_exist=True)  # the cache checks it itself
    judge = build(
        JudgeOptions,
        options,
        endpoint=build(EndpointConfig, options, max_retries=options.retries),
        parameters=_parameters(options.parameter or []),
        cache=cache,
        max_requests=None,  # `approve` has asked
    )
    return open_judge(options.judge, judge)


def _parameters(words: list[str]) -> dict[str, Any]:
    owned = ("model", "messages", "stream", "n")
    found: dict[str, Any] = {}
    for word in words:
        name, sign, value = word.partition("=")
        if not sign or not name:
            raise UserError(f"--parameter {word!r}: write NAME=VALUE, such as max_tokens=2048")
        if name in owned:
            raise UserError(f"--parameter {name}: is set by the command; leave it out")
        # One at a time, so that a name may contain a dot.
        found[name] = apply_overrides({}, [f"value={value}"])["value"]
    return found


def _approved(options: Options, judge: Any, chosen: list[Any]) -> bool:
    """Show the estimate; return False if only the estimate was requested."""
    from shiftrm.measure.judges.endpoint_judge import approve

    estimate = judge.estimate(
        chosen,
        price_in=options.price_in,
        price_out=options.price_out,
        tokenizer=_tokenizer(options.tokenizer),
    )
    print(estimate, flush=True)
    if options.dry_run:
        return False

    def ask(question: str) -> bool:
        return input(f"{question} [y/N] ").strip().lower() in ("y", "yes")

    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    approve(estimate, limit=options.max_requests, yes=options.yes, ask=ask if interactive else None)
    return True


def _tokenizer(option: str | None) -> Any:
    if option is None:
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(option)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{option}: cannot be loaded as a tokenizer ({reason})") from None


def _judge(judge: Any, chosen: list[Any], advance: Any) -> Any:
    try:
        return judge.judge(
            chosen,  # the judge counts requests, the bar prompts
            progress=lambda done, total: advance(done * len(chosen) // total, len(chosen)),
        )
    except UserError as error:
        if not getattr(judge, "asked", 0):
            raise
        raise UserError(
            f"{error}. Answers so far are kept: the same command asks only for the others"
        ) from None


def _settings(options: Options, judge: Any, matched: int) -> dict[str, Any]:
    """Return the settings of the judge, without the API key and anything a rerun changes."""
    found = {
        "ours": options.ours,
        "theirs": options.theirs,
        "judge": options.judge,
        "model": options.model,
        "prompts in the files": matched,
        "limit": options.limit or None,
        "seed": options.seed,
    }
    if options.judge == "endpoint":
        found |= {
            "base_url": judge.endpoint.base_url,
            "template": judge.template.name,
            "parameters": judge.parameters,
        }
    else:
        found["tie_margin"] = judge.tie_margin
    return found


def _show(content: dict[str, Any], *, several: int) -> None:
    print(content["headline"])
    for sentence in content["sentences"]:
        print(sentence)
    for warning in content["warnings"]:
        print(f"! {warning}")
    if several:
        print(f"{several} rows have several responses; the first of each was judged.")
