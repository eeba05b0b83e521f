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
    KINDS,
    Options,
    Outcome,
    Outcomes,
    demonstration_of,
    demonstrations_of,
    each,
    pair_of,
    prompts_of,
    text_of,
    trimmed,
)
from shiftrm.data.named import FORMATS, Format
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns

__all__ = ["HUB_NAMES", "comparison", "post", "read_comparisons", "read_posts"]

HUB_NAMES = (
    "openai/summarize_from_feedback:comparisons",
    "CarperAI/openai_summarize_comparisons",
    "trl-lib/tldr-preference",
)

POSTS_HUB_NAMES = (
    "trl-lib/tldr",
    "CarperAI/openai_summarize_tldr",
    "vwxyzjn/summarize_from_feedback_tldr_3_filtered",
)

PROMPT = "SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"
CUE = "TL;DR:"


def comparison(row: Row, where: str) -> Outcome:
    """Map one comparison, OpenAI's or a mirror's, to a preference row of text, or say why not.

    Reasons: `news_article`, `empty_prompt`, `empty_response`, `equal_sides`.

    Raises:
        UserError: a missing column or a value of the wrong type.
    """
    if "info" not in row:
        return _mirrored(row, where)
    require_columns(row, ("summaries", "choice"), where)
    prompt = _prompt(_object(row["info"], "info", where), where)
    texts = _two_summaries(row["summaries"], where)
    choice = row["choice"]
    if isinstance(choice, bool) or choice not in (0, 1):
        raise UserError(f"{where}: column 'choice' is {choice!r:.40}; expected 0 or 1")
    if prompt is None:
        return "news_article"
    if not prompt:
        return "empty_prompt"
    return pair_of(prompt, *(_response(texts[which]) for which in (choice, 1 - choice)))


def post(row: Row, where: str) -> Outcome:
    """Map one post with its summary to a demonstration, or say why not.

    Reasons: `news_article`, `empty_prompt`, `empty_response`.

    Raises:
        UserError: a missing column or one that is not text.
    """
    if "prompt" in row:
        column = "label" if "label" in row else "completion"
        prompt, [completion] = _with_cue(
            text_of(row, "prompt", where), [text_of(row, column, where)]
        )
        return demonstration_of(prompt, completion)
    made = _prompt(row, where)
    summary = text_of(row, "summary", where)
    if made is None:
        return "news_article"
    return demonstration_of(made, _response(summary))


def read_comparisons(source: str, kind: str, split: str, options: Options) -> Outcomes:
    """Outcomes of comparisons; as a demonstration, the better summary.

    A row that says another split than `split` ("valid1" is one of "validation") is dropped as
    `other_split`: OpenAI's own files hold several.
    """
    outcomes = each(
        lambda row, where: comparison(row, where) if _in_split(row, split) else "other_split",
        iterate_rows(source, split=split),
    )
    if kind == "demonstrations":
        return demonstrations_of(outcomes)
    return outcomes if kind == "pairs" else prompts_of(outcomes)


def read_posts(source: str, kind: str, split: str, options: Options) -> Outcomes:
    """Outcomes of TL;DR posts."""
    outcomes = each(post, iterate_rows(source, split=split))
    return outcomes if kind == "demonstrations" else prompts_of(outcomes)


def _in_split(row: Row, split: str) -> bool:
    said = row.get("split")
    return not isinstance(said, str) or said == split or said[:5] == split[:5] == "valid"


def _prompt(info: Row, where: str) -> str | None:
    """The prompt of a post, "" of an empty one, None of a news article."""
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
    """The cue to summarise at the prompt's end, wherever a mirror has put it."""
    if not trimmed(prompt):
        return "", sides
    if all(side.lstrip().startswith(CUE) for side in sides):
        prompt = f"{trimmed(prompt).removesuffix(CUE).rstrip()}\n\n{CUE}"
        sides = [side.lstrip().removeprefix(CUE) for side in sides]
    return prompt.rstrip() if prompt.rstrip().endswith(CUE) else prompt, list(map(_response, sides))


def _two_summaries(value: Any, where: str) -> list[str]:
    # `datasets` gives a list of objects; some of its versions made an object of lists of it.
    if isinstance(value, dict) and isinstance(value.get("text"), list):
        value = [{"text": text} for text in value["text"]]
    if not isinstance(value, list) or len(value) != 2:
        raise UserError(f"{where}: column 'summaries' is {value!r:.40}; expected two summaries")
    return [text_of(_object(item, "summaries", where), "text", where) for item in value]


def _object(value: Any, column: str, where: str) -> Row:
    if not isinstance(value, dict):
        raise UserError(f"{where}: column {column!r} holds {value!r:.40}; expected an object")
    return value


FORMATS.register("summarize")(
    Format(
        about="OpenAI's comparisons of summaries of Reddit posts, and their mirrors",
        kinds=KINDS,
        hub=HUB_NAMES,
        read=read_comparisons,
        rows_say_split=True,
    )
)
FORMATS.register("tldr")(
    Format(
        about="Reddit posts with a TL;DR, to fine-tune on",
        kinds=("demonstrations", "prompts"),
        hub=POSTS_HUB_NAMES,
        read=read_posts,
    )
)
