"""Amazon reviews as domains of controlled sentiment, one domain per category.

Two public schemas are read:

- *Amazon Reviews 2023*, one downloaded JSONL file per category ("Books.jsonl"): `rating` 1-5,
  `title` (of the review), `text`, `asin`, `parent_asin` (the product with all its variants), ...;
- *fancyzhx/amazon_polarity*: `label` 0/1, `title`, `content`; no category and no product.

The OODPL paper writes positive reviews for unseen categories, but does not say how its pairs are
formed. The following is ours:

- **text**: the review's text without its title (titles mostly reveal the verdict), HTML tags and
  Amazon's `[[VIDEOID:...]]` marks, with entities resolved and single spaces;
- **sentiment**: 4 and 5 stars (label 1) are positive, 1 and 2 (label 0) negative, 3 is dropped;
- **cut**: the first `prompt_words` words (8) are the beginning; the continuation is a space and at
  most the next `response_words` words (64), `finished` if nothing was cut off. Words are separated
  by white space. Reviews with fewer than `prompt_words + 4` words are dropped;
- **pairs**: a positive and a negative review of one product (`parent_asin`, else `asin`), matched
  in random order, each review in one pair, at most `pairs_per_product`. In amazon_polarity any two
  match. The prompt is the beginning of one of the two, chosen by a fair coin, and the continuations
  of both are compared. A continuation fits its own beginning better; the coin makes this
  independent of the preference;
- **splits** are by product (in amazon_polarity by pair and by review): a tenth for evaluation, the
  rest halved into the query's pairs and the support. Support rows are reviews of both sentiments,
  each split into its own beginning and continuation: fine-tuning data of mixed quality.
"""

import html
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice

from shiftrm.data.domains import Domain, drop_leaks
from shiftrm.data.loaded import bit_of, each, number_of, text_of, usable
from shiftrm.data.prompt_keys import hashed_uniform
from shiftrm.data.sources import iterate_rows
from shiftrm.errors import UserError
from shiftrm.files import Row

TAG = re.compile(r"</?[A-Za-z][^<>]*>")
MARK = re.compile(r"\[\[(?:VIDEOID|ASIN|STAR_RATING)[^\]]*\]\]")
SHORTEST_RESPONSE = 4


@dataclass(frozen=True)
class CutOptions:
    """How to make rows from reviews.

    Raises:
        UserError: on construction, if a value is out of range.
    """

    prompt_words: int = 8
    response_words: int = 64
    pairs_per_product: int = 5
    support_share: float = 0.5  # of the products not used for evaluation
    eval_share: float = 0.1

    def __post_init__(self) -> None:
        for name in ("prompt_words", "response_words", "pairs_per_product"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"Amazon reviews: {name} is {value!r}; give at least 1")
        for name in ("support_share", "eval_share"):
            if not 0.0 < getattr(self, name) < 1.0:
                raise UserError(
                    f"Amazon reviews: {name} is {getattr(self, name)!r}; give a share between 0 "
                    "and 1"
                )


@dataclass(frozen=True)
class Review:
    """One kept review. `product` is "" in amazon_polarity, where it is unknown."""

    positive: bool
    beginning: str
    continuation: str
    finished: bool
    product: str = ""


def clean_text(text: str) -> str:
    """Return a review's text without HTML and marks, with single spaces; emoji are kept."""
    text = MARK.sub(" ", TAG.sub(" ", text))
    # Resolve entities last, then tags again: an escaped "&lt;br /&gt;" is a tag as well.
    return " ".join(TAG.sub(" ", html.unescape(text)).split())


def review_2023(row: Row, where: str, options: CutOptions) -> Review | str:
    """Map one row of Amazon Reviews 2023, or return the reason for dropping it.

    Reasons: `rating_out_of_range` (not 1 to 5), `neutral` (3 stars), `no_product`, `empty_text`,
    `too_short`.

    Raises:
        UserError: a missing column or a value of the wrong type.
    """
    rating = number_of(row, "rating", where, "1 to 5 stars")
    product = row.get("parent_asin") or row.get("asin") or ""
    if not isinstance(product, str):
        raise UserError(f"{where}: column 'parent_asin' is {product!r:.40}; expected text")
    text = text_of(row, "text", where)
    if not 1 <= rating <= 5:
        return "rating_out_of_range"
    if 2 < rating < 4:
        return "neutral"
    if not product.strip():
        return "no_product"
    return _cut(text, options, positive=rating >= 4, product=product.strip())


def polarity_review(row: Row, where: str, options: CutOptions) -> Review | str:
    """Map one row of amazon_polarity, or return `empty_text` or `too_short`.

    Raises:
        UserError: a missing column or a value of the wrong type.
    """
    positive = bit_of(row, "label", where, "1 (positive) or 0") == 1
    return _cut(text_of(row, "content", where), options, positive=positive)


def _cut(text: str, options: CutOptions, *, positive: bool, product: str = "") -> Review | str:
    words = clean_text(text).split()
    rest = words[options.prompt_words :]
    if not words:
        return "empty_text"
    if len(rest) < SHORTEST_RESPONSE:
        return "too_short"
    return Review(
        positive=positive,
        beginning=" ".join(words[: options.prompt_words]),
        continuation=" " + " ".join(rest[: options.response_words]),
        finished=len(rest) <= options.response_words,
        product=product,
    )


def amazon_domains(
    categories: Mapping[str, Iterable[tuple[str, Row]]],
    options: CutOptions | None = None,
    *,
    seed: int = 0,
) -> tuple[list[Domain], dict[str, int]]:
    """Make one domain of each category; the order of the rows does not matter.

    Args:
        categories: name -> `(where, row)`, from the file readers. A category whose first row has a
            `label` is read as amazon_polarity, any other as Amazon Reviews 2023.
        options: how reviews are cut and paired; None uses the defaults.
        seed: decides the pairs, which beginning is the prompt, and the splits.

    Returns:
        Domains in the given order, and the number of dropped reviews by reason: those of the
        mappings, `loaded.BROKEN` (wrong schema), `duplicate` (same text and sentiment),
        `contradiction` (one text with both sentiments), `unpaired` (query or evaluation reviews
        without a counterpart) and `equal_continuations`; and `prompt_also_in_training`, the number
        of evaluation pairs and prompts with a beginning that is also in training.

    Raises:
        UserError: a category has no support rows or no pairs left. If no row has the right schema,
            the message says what is wrong with the first one.
    """
    options = CutOptions() if options is None else options
    dropped: Counter[str] = Counter()
    domains = [
        _domain(name, _unique(_reviews(rows, options, dropped), dropped), options, seed, dropped)
        for name, rows in categories.items()
    ]
    domains, leaks = drop_leaks(domains)
    dropped["prompt_also_in_training"] += leaks
    return domains, {reason: count for reason, count in sorted(dropped.items()) if count}


def read_amazon(sources: Mapping[str, str]) -> dict[str, Iterator[tuple[str, Row]]]:
    """Return the rows of each category, for `amazon_domains`.

    Args:
        sources: category -> a file or hub name, e.g. `{"Books": "raw/Books.jsonl"}`.
    """
    return {name: iterate_rows(source) for name, source in sources.items()}


def _reviews(
    rows: Iterable[tuple[str, Row]], options: CutOptions, dropped: Counter[str]
) -> Iterator[Review]:
    """Yield the usable reviews of a category; its first row decides the schema."""
    rows = iter(rows)
    first = list(islice(rows, 1))
    read = polarity_review if first and "label" in first[0][1] else review_2023
    found = each(lambda row, where: read(row, where, options), chain(first, rows))
    return usable(found, dropped)


def _unique(reviews: Iterable[Review], dropped: Counter[str]) -> list[Review]:
    """Return each text once, in an order independent of the order of the rows."""
    by_text: dict[tuple[str, str], list[Review]] = defaultdict(list)
    for review in reviews:
        by_text[review.beginning, review.continuation].append(review)
    kept: list[Review] = []
    for _, same in sorted(by_text.items()):
        if len({review.positive for review in same}) > 1:
            dropped["contradiction"] += len(same)
            continue
        kept.append(min(same, key=lambda review: review.product))
        if len(same) > 1:
            dropped["duplicate"] += len(same) - 1
    return kept


def _domain(
    name: str, reviews: list[Review], options: CutOptions, seed: int, dropped: Counter[str]
) -> Domain:
    parts: dict[str, list[Review]] = {"eval": [], "support": [], "query": []}
    for review in reviews:
        # One draw per product, so that all its reviews go to one part, in every category.
        unit = review.product or f"{review.beginning}{review.continuation}"
        draw = hashed_uniform(seed, "part", unit)
        rest = (draw - options.eval_share) / (1.0 - options.eval_share)
        part = "eval" if rest < 0 else "support" if rest < options.support_share else "query"
        parts[part].append(review)
    query = _pairs(parts["query"], name, options, seed, dropped)
    if not parts["support"] or not query:
        raise UserError(
            f"category {name!r}: {len(parts['support'])} fine-tuning rows and {len(query)} pairs "
            f"came of {len(reviews)} usable reviews; give more rows or leave the category out"
        )
    eval_pairs = _pairs(parts["eval"], name, options, seed, dropped)
    return Domain(
        name=name,
        support=tuple(
            {"prompt": r.beginning, "response": r.continuation, "finished": r.finished}
            for r in parts["support"]
        ),
        query=tuple(query),
        eval_pairs=tuple(eval_pairs),
        prompts=tuple(dict.fromkeys(row["prompt"] for row in eval_pairs)),
    )


def _pairs(
    reviews: list[Review], name: str, options: CutOptions, seed: int, dropped: Counter[str]
) -> list[Row]:
    """Pair positive with negative reviews of a product; see the module docstring."""
    by_product: dict[str, list[Review]] = defaultdict(list)
    for review in reviews:
        by_product[review.product].append(review)
    rows: list[Row] = []
    for product, its in sorted(by_product.items()):
        its = sorted(
            its, key=lambda r: hashed_uniform(seed, "order", name, r.beginning, r.continuation)
        )
        sides = [[r for r in its if r.positive is wanted] for wanted in (True, False)]
        limit = min(map(len, sides))
        if product:
            limit = min(limit, options.pairs_per_product)
        dropped["unpaired"] += len(its) - 2 * limit
        for good, bad in zip(sides[0][:limit], sides[1][:limit], strict=True):
            if good.continuation == bad.continuation:
                dropped["equal_continuations"] += 2
                continue
            coin = hashed_uniform(seed, "coin", name, good.continuation, bad.continuation)
            rows.append(
                {
                    "prompt": (good if coin < 0.5 else bad).beginning,
                    "chosen": good.continuation,
                    "rejected": bad.continuation,
                    "chosen_finished": good.finished,
                    "rejected_finished": bad.finished,
                }
            )
    return rows
