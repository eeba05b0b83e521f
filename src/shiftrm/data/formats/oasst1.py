"""OpenAssistant conversations (OpenAssistant/oasst1): trees of messages, siblings ranked by people.

Columns read, one message a row: `message_id`, `parent_id` (none at a root), `message_tree_id`,
`text`, `role` ("prompter" or "assistant"), `lang`, `deleted`, `rank` (0 is the best of its
siblings; absent where there was nothing to rank). The published file of whole trees (`prompt` with
nested `replies`) can also be read. A message may come before its parent.

Ours: a message is used only if no message above it is missing, deleted, empty or in another
language. Pairs are two ranked answers to one message; the prompt is the dialogue up to it. The
messages listed as dropped are answers for pairs and demonstrations, and prompters' messages for
prompts. Rows have a column `tree`, so that `splits` keeps trees whole: two rows of one tree share
messages.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import combinations

from shiftrm.data.loaded import (
    Broken,
    Options,
    Outcome,
    Outcomes,
    message,
    option,
    pair_of,
    text_of,
    trimmed,
    wrong,
)
from shiftrm.data.named import FORMATS, Format
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row, require_columns
from shiftrm.models.rendering import Messages

ROLES = {"prompter": "user", "assistant": "assistant"}


@dataclass(frozen=True)
class OASSTOptions(Options):
    """Options of OASST1."""

    lang: str = option("all", "language, as en, de, he or pt-BR, or all (default)")
    pairs: str = option(
        "all",
        "which answers to one message: all pairs (default), or extremes: best against worst",
        choices=("all", "extremes"),
    )
    turns: str = option(
        "first",
        "for prompts: first (default): trees' first messages, or all: also whole dialogues",
        choices=("first", "all"),
    )


@dataclass(frozen=True)
class Post:
    """One message and the place of its row."""

    where: str
    id: str
    parent: str | None
    tree: str
    role: str  # a key of ROLES
    text: str
    lang: str
    deleted: bool
    rank: int | None


Posts = dict[str, Post]
"""Messages by id, in the order of the file."""


def read_oasst(source: str, kind: str, split: str, options: OASSTOptions) -> Outcomes:
    """Yield the outcomes of messages; the whole split is held in memory."""
    posts, unread = read_posts(iterate_rows(source, split=split))
    yield from unread
    if kind == "prompts":
        yield from oasst_prompts(posts, lang=options.lang, turns=options.turns)
    elif kind == "pairs":
        yield from oasst_pairs(posts, lang=options.lang, pairs=options.pairs)
    else:
        yield from oasst_demonstrations(posts, lang=options.lang)


def read_posts(rows: Iterable[tuple[str, Row]]) -> tuple[Posts, list[tuple[str, str]]]:
    """Return the messages of rows (or of nested trees), and where and why others were not read.

    Reasons: `duplicate_message` (a second message with the same id), `loaded.BROKEN`.
    """
    posts: Posts = {}
    unread: list[tuple[str, str]] = []
    for where, row in rows:
        for item in _flat(row):
            try:
                post = _post(item, where)
            except UserError as error:
                unread.append((where, Broken(str(error))))
                continue
            if post.id in posts:
                unread.append((where, "duplicate_message"))
            else:
                posts[post.id] = post
    return posts, unread


def oasst_pairs(posts: Posts, *, lang: str = "all", pairs: str = "all") -> Outcomes:
    """Yield pairs of ranked siblings, the better one first; `where` is the better one's.

    Reasons: `deleted`, `empty_text`, `other_language`, `no_parent` and the same of a message above
    (`deleted_above`, ...), `no_rank`, `alone` (no other usable ranked answer); of pairs
    `equal_ranks`, `equal_sides`.
    """
    siblings: dict[str, list[Post]] = defaultdict(list)
    for post in posts.values():
        if post.role != "assistant":
            continue
        reason = _unusable(post, posts, lang) or ("no_rank" if post.rank is None else None)
        if reason is not None:
            yield post.where, reason
        else:
            siblings[post.parent or ""].append(post)
    for answers in siblings.values():
        if len(answers) == 1:
            yield answers[0].where, "alone"
            continue
        ranked = sorted(answers, key=lambda post: post.rank or 0)
        chosen = combinations(ranked, 2) if pairs == "all" else [(ranked[0], ranked[-1])]
        for better, worse in chosen:
            if better.rank == worse.rank:
                yield better.where, "equal_ranks"
                continue
            prompt = _dialogue(better, posts)[:-1]
            sides = [[message("assistant", post.text)] for post in (better, worse)]
            yield better.where, _with_tree(pair_of(prompt, *sides), better)


def oasst_demonstrations(posts: Posts, *, lang: str = "all") -> Outcomes:
    """Yield each message's best (or only) answer, after the dialogue up to it.

    Reasons: those of `oasst_pairs` up to `no_parent`, and `not_best`.
    """
    best: dict[str, Post] = {}
    usable: list[Post] = []
    for post in posts.values():
        if post.role != "assistant":
            continue
        if (reason := _unusable(post, posts, lang)) is not None:
            yield post.where, reason
            continue
        usable.append(post)
        known = best.get(post.parent or "")
        if known is None or _order(post) < _order(known):
            best[post.parent or ""] = post
    for post in usable:
        if best[post.parent or ""] is not post:
            yield post.where, "not_best"
            continue
        messages = _dialogue(post, posts)
        row = {"prompt": messages[:-1], "completion": messages[-1:]}
        yield post.where, _with_tree(row, post)


def oasst_prompts(posts: Posts, *, lang: str = "all", turns: str = "first") -> Outcomes:
    """Yield prompters' messages with the dialogue above them.

    Reasons: those of `oasst_pairs` up to `no_parent`, and with `turns="first"` `follow_up`.
    """
    for post in posts.values():
        if post.role != "prompter":
            continue
        if turns == "first" and post.parent is not None:
            yield post.where, "follow_up"
            continue
        reason = _unusable(post, posts, lang)
        yield post.where, reason or _with_tree({"prompt": _dialogue(post, posts)}, post)


def _unusable(post: Post, posts: Posts, lang: str) -> str | None:
    """Return why a message or one above it cannot be used; None if all can."""
    suffix = ""
    seen: set[str] = set()
    while True:
        if post.deleted:
            return f"deleted{suffix}"
        if not post.text.strip():
            return f"empty_text{suffix}"
        if lang not in ("all", post.lang):
            return f"other_language{suffix}"
        seen.add(post.id)
        if post.parent is None:
            return None if post.role == "prompter" else "no_parent"
        above = posts.get(post.parent)
        if above is None or above.id in seen or above.role == post.role:
            return "no_parent"
        post, suffix = above, "_above"


def _dialogue(post: Post, posts: Posts) -> Messages:
    """Return the messages from the root down to this one."""
    path: Messages = []
    here: Post | None = post
    while here is not None:
        path.append(message(ROLES[here.role], here.text))
        here = posts[here.parent] if here.parent is not None else None
    return path[::-1]


def _order(post: Post) -> float:
    return float("inf") if post.rank is None else post.rank


def _with_tree(outcome: Outcome, post: Post) -> Outcome:
    return outcome if isinstance(outcome, str) else {**outcome, "tree": post.tree}


def _flat(row: Row) -> Iterator[Row]:
    """Yield the messages of a row: itself, or those of a nested tree, unchecked."""
    if "message_id" in row or not isinstance(row.get("prompt"), dict):
        yield row
        return
    tree = row.get("message_tree_id")
    waiting = [row["prompt"]]
    while waiting:
        item = waiting.pop(0)
        yield {"message_tree_id": tree, **{k: v for k, v in item.items() if k != "replies"}}
        replies = item.get("replies") or []
        for reply in replies if isinstance(replies, list) else [replies]:
            known = {"parent_id": item.get("message_id")}
            waiting.append(known | (reply if isinstance(reply, dict) else {"reply": reply}))


def _post(row: Row, where: str) -> Post:
    require_columns(row, ("message_id", "message_tree_id", "text", "role"), where)
    role, rank, parent = row["role"], row.get("rank"), row.get("parent_id")
    if not isinstance(role, str) or role not in ROLES:
        raise wrong(row, "role", where, "prompter or assistant")
    whole = isinstance(rank, int) or (isinstance(rank, float) and rank.is_integer())
    if rank is not None and (isinstance(rank, bool) or not whole):
        raise wrong(row, "rank", where, "a whole number")
    if not isinstance(parent, str | None):
        raise wrong(row, "parent_id", where, "text")
    return Post(
        where=where,
        id=text_of(row, "message_id", where),
        parent=parent,
        tree=text_of(row, "message_tree_id", where),
        role=role,
        text=trimmed(text_of(row, "text", where)),
        lang=str(row.get("lang") or ""),
        deleted=bool(row.get("deleted")),
        rank=None if rank is None else int(rank),
    )


FORMATS.register("oasst1")(
    Format(
        about="OpenAssistant: trees of messages in many languages, answers ranked",
        hub=("OpenAssistant/oasst1",),
        options=OASSTOptions,
        read=read_oasst,
    )
)
