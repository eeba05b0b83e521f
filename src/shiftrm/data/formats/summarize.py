r"""OpenAI's summaries of Reddit posts: comparisons, and TL;DR posts to fine-tune on.

*Comparisons* (openai/summarize_from_feedback, configuration `comparisons`; also the JSON lines that
OpenAI published): `info{id, post, title, subreddit, site, article}`, `summaries[2]{text, ...}`,
`choice` 0/1 = the better one, `split` ("train", "valid1", "valid2"). Mirrors have the columns
`prompt`, `chosen`, `rejected` instead.

*TL;DR posts*: `subreddit`, `title`, `post`, `summary`; mirrors have `prompt` and `completion` (or
`label`).

Ours: the prompt is OpenAI's "SUBREDDIT: r/...\n\nTITLE: ...\n\nPOST: ...\n\nTL;DR:", a response a
space and the summary. A mirror's prompt stays as it is; where its responses begin with "TL;DR:",
that goes to the prompt's end. Comparisons of news articles (CNN/DailyMail, in the validation split)
have no post and are dropped: `news_article`. Several workers judged some pairs: the same verdict is
one row, opposite ones are two.
"""

from typing import Any

from shiftrm.data.loaded import (
    Outcome,
    bit_of,
    demonstration_of,
    pair_of,
    text_of,
    trimmed,
    wrong,
)
from shiftrm.data.named import FORMATS, Format
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns

PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
CUE = "TL;DR:"


def comparison(row: Row, where: str) -> Outcome:
    """Map one comparison, OpenAI's or a mirror's, to a preference row of text.

    Reasons: `news_article`, and those of `pair_of`.
    """
    if "info" not in row:
        return _mirrored(row, where)
    require_columns(row, ("summaries", "choice"), where)
    prompt = _prompt(_object(row["info"], "info", where), where)
    texts = _two_summaries(row, where)
    choice = bit_of(row, "choice", where)
    if prompt is None:
        return "news_article"
    return pair_of(prompt, *(_response(texts[which]) for which in (choice, 1 - choice)))


def post(row: Row, where: str) -> Outcome:
    """Map one post with its summary to a demonstration.

    Reasons: `news_article`, and those of `demonstration_of`.
    """
    if "prompt" in row:
        column = "label" if "label" in row else "completion"
        prompt, [completion] = _with_cue(
            text_of(row, "prompt", where), [text_of(row, column, where)]
        )
        return demonstration_of(prompt, completion)
    made = _prompt(row, where)
    summary = text_of(row, "summary", where)
    return "news_article" if made is None else demonstration_of(made, _response(summary))


def _prompt(info: Row, where: str) -> str | None:
    """Return the prompt of a post, "" for an empty post, None for a news article."""
    if info.get("post") is None and isinstance(info.get("article"), str):
        return None
    parts = {name: trimmed(text_of(info, name, where)) for name in ("subreddit", "title", "post")}
    return PROMPT.format_map(parts) if parts["post"] else ""


def _response(text: str) -> str:
    text = trimmed(text)
    return f" {text}" if text else ""


def _mirrored(row: Row, where: str) -> Outcome:
    sides = [text_of(row, column, where) for column in ("chosen", "rejected")]
    prompt, sides = _with_cue(text_of(row, "prompt", where), sides)
    return pair_of(prompt, *sides)


def _with_cue(prompt: str, sides: list[str]) -> tuple[str, list[str]]:
    """Move the cue to summarise to the prompt's end, wherever a mirror has put it."""
    if not trimmed(prompt):
        return "", sides
    if all(side.lstrip().startswith(CUE) for side in sides):
        prompt = f"{trimmed(prompt).removesuffix(CUE).rstrip()}\n\n{CUE}"
        sides = [side.lstrip().removeprefix(CUE) for side in sides]
    return prompt.rstrip() if prompt.rstrip().endswith(CUE) else prompt, list(map(_response, sides))


def _two_summaries(row: Row, where: str) -> list[str]:
    value = row["summaries"]
    # `datasets` gives a list of objects; some of its versions made an object of lists of it.
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = [{"text": text} for text in value["text"]]
    if not isinstance(value, list) or len(value) != 2:
        raise wrong(row, "summaries", where, "two summaries")
    return [text_of(_object(item, "summaries", where), "text", where) for item in value]


def _object(value: Any, column: str, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: column {column!r} holds {value!r:.40}; expected an object")
    return value


FORMATS.register("summarize")(
    Format(
        about="OpenAI's comparisons of summaries of Reddit posts, and their mirrors",
        hub=(
            "openai/summarize_from_feedback:comparisons",
            "CarperAI/openai_summarize_comparisons",
            "trl-lib/tldr-preference",
        ),
        rows_say_split=True,
        mappers={"pairs": lambda row, where, _: comparison(row, where)},
    )
)
FORMATS.register("tldr")(
    Format(
        about="Reddit posts with a TL;DR, to fine-tune on",
        kinds=("demonstrations", "prompts"),
        hub=(
            "trl-lib/tldr",
            "CarperAI/openai_summarize_tldr",
            "vwxyzjn/summarize_from_feedback_tldr_3_filtered",
        ),
        mappers={"demonstrations": lambda row, where, _: post(row, where)},
    )
)
