"""Stanford Human Preferences (stanfordnlp/SHP, 18 subreddits) as domains.

Columns read: `post_id`, `domain` ("askculinary_train"), `history` (the post), `human_ref_A` and
`human_ref_B` (two comments), `labels` (1 = A preferred), `score_A`, `score_B`, `score_ratio`.

As the data set's authors recommend, keep pairs whose score ratio is at least 2, and at most 5 pairs
per post. The OODPL paper trains and tests on these domains but does not say how it makes rows. The
following is ours:

- the prompt is the post, an empty line and "Answer:"; a response is a space and the comment;
- a hash of the seed and the pair decides which pairs of a post are kept;
- a hash of the seed and the post halves the train split's posts: one half's pairs are the query;
  the other half's comments, from both sides of the pairs and each once, are the support. So the
  fine-tuning data is of mixed quality, and no comment is both weighted and compared;
- `eval_split` ("test") gives the evaluation pairs and prompts; the remaining split is dropped. Rows
  whose domain does not name a split are split by post, a tenth for evaluation;
- a post on both sides (the same id, or the same text under another id) is used for evaluation only.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial

from shiftrm.data.domains import Domain
from shiftrm.data.loaded import bit_of, each, number_of, text_of, usable
from shiftrm.data.prompt_keys import hashed_uniform, prompt_key
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError, suggest
from shiftrm.files import Row, require_columns

HUB_NAMES = ("stanfordnlp/SHP::train", "stanfordnlp/SHP::test")

COLUMNS = (
    "post_id",
    "domain",
    "history",
    "human_ref_A",
    "human_ref_B",
    "labels",
    "score_A",
    "score_B",
    "score_ratio",
)

SUBREDDITS: tuple[str, ...] = (
    "askacademia", "askanthropology", "askbaking", "askcarguys", "askculinary", "askdocs",
    "askengineers", "askhistorians", "askhr", "askphilosophy", "askphysics", "askscience",
    "asksciencefiction", "asksocialscience", "askvet", "changemyview", "explainlikeimfive",
    "legaladvice",
)  # fmt: skip
"""The domains in alphabetical order."""

LEAVE_OUT: tuple[tuple[str, ...], ...] = tuple(
    SUBREDDITS[start : start + 3] for start in range(0, len(SUBREDDITS), 3)
)
"""The held-out domains of six leave-three-out splits. The first is the paper's example."""

SPLITS = ("train", "validation", "test")
GONE = frozenset({"[removed]", "[deleted]"})
PROMPT = "{post}\n\nAnswer:"
EVAL_SHARE = 0.1
"""Share of posts for evaluation if the rows do not name a split."""


@dataclass(frozen=True)
class PostPair:
    """One kept row: two comments on a post, the preferred one first."""

    domain: str
    split: str  # one of SPLITS, or "" if the row does not name one
    post: str
    prompt: str
    chosen: str
    rejected: str


def shp_pair(row: Row, where: str, *, score_ratio: float = 2.0) -> PostPair | str:
    """Map one row, or return the reason for dropping it.

    Reasons: `empty_post`, `removed_comment`, `empty_comment`, `equal_texts`, `equal_scores`,
    `low_score_ratio`, `label_against_scores`.

    Args:
        score_ratio: the minimum ratio of the two scores.

    Raises:
        UserError: a missing column or a value of the wrong type.
    """
    require_columns(row, COLUMNS, where)
    post_id, name, post, a, b = (
        text_of(row, column, where)
        for column in ("post_id", "domain", "history", "human_ref_A", "human_ref_B")
    )
    score_a, score_b, ratio = (
        number_of(row, column, where) for column in ("score_A", "score_B", "score_ratio")
    )
    a_is_better = bit_of(row, "labels", where, "1 (A is preferred) or 0") == 1
    post, a, b = post.strip(), a.strip(), b.strip()
    reasons = {
        "empty_post": not post or post in GONE,
        "removed_comment": a in GONE or b in GONE,
        "empty_comment": not a or not b,
        "equal_texts": a == b,
        "equal_scores": not (score_a < score_b or score_a > score_b),  # nor is NaN ordered
        "low_score_ratio": not ratio >= score_ratio,  # nor is NaN
        "label_against_scores": a_is_better != (score_a > score_b),
    }
    if any(reasons.values()):
        return next(reason for reason, holds in reasons.items() if holds)
    chosen, rejected = (a, b) if a_is_better else (b, a)
    domain, split = _domain_and_split(name)
    prompt = PROMPT.format(post=post)
    return PostPair(domain, split, post_id, prompt, f" {chosen}", f" {rejected}")


def shp_domains(
    rows: Iterable[tuple[str, Row]],
    *,
    score_ratio: float = 2.0,
    pairs_per_post: int = 5,
    support_share: float = 0.5,
    eval_split: str = "test",
    domains: Sequence[str] | None = None,
    seed: int = 0,
) -> tuple[list[Domain], dict[str, int]]:
    """Make domains from SHP's rows; the order of the rows does not matter.

    Args:
        rows: `(where, row)`, from the file readers.
        score_ratio, pairs_per_post: which pairs of a post are kept; see `shp_pair` and above.
        support_share: share of the training posts whose comments are used for fine-tuning.
        eval_split: the split for evaluation, "validation" or "test".
        domains: subreddits to keep; None keeps all.
        seed: decides which posts are support and which pairs of a post are kept.

    Returns:
        Domains by name, and the number of dropped rows by reason: those of `shp_pair`,
        `loaded.BROKEN` (wrong schema), `other_domain`, `other_split`, `duplicate`,
        `over_pairs_per_post`, `post_also_in_evaluation`. Rows kept + rows dropped = rows read.

    Raises:
        UserError: options out of range, no row with the right schema (the message says what is
            wrong with the first one), or a requested domain without rows.
    """
    _check_options(pairs_per_post, support_share, eval_split)
    dropped: Counter[str] = Counter()
    kept: dict[PostPair, None] = {}
    mapper = partial(shp_pair, score_ratio=score_ratio)
    for pair in usable(each(mapper, rows), dropped):
        if domains is not None and pair.domain not in domains:
            dropped["other_domain"] += 1
        elif pair.split not in ("", "train", eval_split):
            dropped["other_split"] += 1
        elif pair in kept:
            dropped["duplicate"] += 1
        else:
            kept[pair] = None
    train, evaluation = _split(kept, eval_split, seed, dropped)
    train = _limit(train, pairs_per_post, seed, dropped)
    evaluation = _limit(evaluation, pairs_per_post, seed, dropped)
    found = {pair.domain for pair in (*train, *evaluation)}
    for name in domains or ():
        if name not in found:
            raise UserError(f"SHP: no usable row of domain {name!r}{suggest(name, list(found))}")
    return [
        _domain(
            name,
            [pair for pair in train if pair.domain == name],
            [pair for pair in evaluation if pair.domain == name],
            support_share,
            seed,
        )
        for name in sorted(found)
    ], dict(sorted(dropped.items()))


def read_shp(sources: Sequence[str] = HUB_NAMES) -> Iterator[tuple[str, Row]]:
    """Yield rows of SHP from local files or the hub, source by source.

    Args:
        sources: sources for `iterate_rows`, of any subreddits and splits; each row names its own.
    """
    for source in sources:
        yield from iterate_rows(source)


def _split(
    pairs: Iterable[PostPair], eval_split: str, seed: int, dropped: Counter[str]
) -> tuple[list[PostPair], list[PostPair]]:
    """Return training and evaluation pairs that share no post, by id or by text."""
    train: list[PostPair] = []
    evaluation: list[PostPair] = []
    for pair in pairs:
        evaluated = pair.split == eval_split or (
            not pair.split and hashed_uniform(seed, "eval", prompt_key(pair.prompt)) < EVAL_SHARE
        )
        (evaluation if evaluated else train).append(pair)
    ids = {pair.post for pair in evaluation}
    texts = {prompt_key(pair.prompt) for pair in evaluation}
    clean = [p for p in train if p.post not in ids and prompt_key(p.prompt) not in texts]
    if len(clean) < len(train):
        dropped["post_also_in_evaluation"] += len(train) - len(clean)
    return clean, evaluation


def _limit(
    pairs: Iterable[PostPair], pairs_per_post: int, seed: int, dropped: Counter[str]
) -> list[PostPair]:
    """Return a limited number of pairs per post, in an order independent of the rows' order."""
    by_post: dict[str, list[PostPair]] = defaultdict(list)
    for pair in pairs:
        by_post[prompt_key(pair.prompt)].append(pair)
    kept: list[PostPair] = []
    for key in sorted(by_post):
        drawn = sorted(
            by_post[key], key=lambda p: hashed_uniform(seed, p.post, p.domain, p.chosen, p.rejected)
        )
        kept += drawn[:pairs_per_post]
        if len(drawn) > pairs_per_post:
            dropped["over_pairs_per_post"] += len(drawn) - pairs_per_post
    return kept


def _domain(
    name: str,
    train: list[PostPair],
    evaluation: list[PostPair],
    support_share: float,
    seed: int,
) -> Domain:
    support: dict[tuple[str, str], None] = {}
    query: list[PostPair] = []
    for pair in train:
        if hashed_uniform(seed, "support", prompt_key(pair.prompt)) < support_share:
            support |= {(pair.prompt, pair.chosen): None, (pair.prompt, pair.rejected): None}
        else:
            query.append(pair)
    return Domain(
        name=name,
        support=tuple({"prompt": p, "response": r} for p, r in support),
        query=tuple(map(_pair_row, query)),
        eval_pairs=tuple(map(_pair_row, evaluation)),
        prompts=tuple(dict.fromkeys(pair.prompt for pair in evaluation)),
    )


def _pair_row(pair: PostPair) -> Row:
    return {"prompt": pair.prompt, "chosen": pair.chosen, "rejected": pair.rejected}


def _domain_and_split(name: str) -> tuple[str, str]:
    """Split `"askculinary_train"` into `("askculinary", "train")`; the split may be ""."""
    domain, _, split = name.rpartition("_")
    return (domain, split) if split in SPLITS and domain else (name, "")


def _check_options(pairs_per_post: int, support_share: float, eval_split: str) -> None:
    if pairs_per_post < 1:
        raise UserError(f"SHP: pairs_per_post is {pairs_per_post}; it must be at least 1")
    if not 0.0 < support_share < 1.0:
        raise UserError(f"SHP: support_share is {support_share}; give a share between 0 and 1")
    if eval_split not in SPLITS[1:]:
        raise UserError(f"SHP: eval_split is {eval_split!r}; give 'validation' or 'test'")
