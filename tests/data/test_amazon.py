"""Amazon's reviews, in both public schemas with their quirks, become domains of sentiment."""

from collections import Counter

import pytest

from shiftrm.data.amazon import (
    CutOptions,
    amazon_domains,
    clean_text,
    polarity_review,
    read_amazon,
    review_2023,
)
from shiftrm.data.domains import load_split, write_domains
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from tests.data.public_schemas import placed

CUT = CutOptions(prompt_words=3, response_words=5)
TEXT = "one two three four five six seven eight nine"


def _row(**changes):
    """A row with all columns of Amazon Reviews 2023."""
    return {
        "rating": 5.0,
        "title": "Great",
        "text": TEXT,
        "images": [],
        "asin": "B01",
        "parent_asin": "P01",
        "user_id": "U1",
        "timestamp": 1588687728923,
        "helpful_vote": 0,
        "verified_purchase": True,
        **changes,
    }


def test_the_cut_by_hand():
    review = review_2023(_row(), "f:1", CUT)
    assert (review.positive, review.product) == (True, "P01")
    assert review.beginning == "one two three"
    assert review.continuation == " four five six seven eight"  # nine is cut off
    assert review.finished is False
    exact = review_2023(_row(text="one two three four five six seven eight", rating=2), "f:1", CUT)
    assert (exact.positive, exact.continuation) == (False, review.continuation)
    assert exact.finished is True


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("Nice<br /><br />book", "Nice book"),
        ("<b>Nice</b>  &amp;\tcheap\n", "Nice & cheap"),
        ("it&#39;s &lt;br /&gt; fine", "it's fine"),
        ("[[VIDEOID:abc123]] See [[ASIN:B00 A book]] here", "See here"),
        ("I <3 it, 2 < 3 > 1", "I <3 it, 2 < 3 > 1"),
        ("👩‍👧 love 🌹", "👩‍👧 love 🌹"),
        ("\u200fספר  טוב\u200f", "\u200fספר טוב\u200f"),  # noqa: RUF001
        ("  ", ""),
    ],
)
def test_html_goes_and_scripts_stay(text, clean):
    assert clean_text(text) == clean


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rating": 3.0}, "neutral"),
        ({"parent_asin": None, "asin": ""}, "no_product"),
        ({"parent_asin": " ", "asin": "B01"}, "no_product"),
        ({"text": ""}, "empty_text"),
        ({"text": "<br />"}, "empty_text"),
        ({"text": "one two three four five six"}, "too_short"),
    ],
)
def test_dropped_reviews_have_a_reason(changes, reason):
    assert review_2023(_row(**changes), "f:1", CUT) == reason


def test_a_missing_parent_asin_falls_back_to_the_asin():
    row = _row()
    del row["parent_asin"]
    assert review_2023(row, "f:1", CUT).product == "B01"
    assert review_2023(_row(parent_asin=None), "f:1", CUT).product == "B01"
    del row["asin"]
    assert review_2023(row, "f:1", CUT) == "no_product"


@pytest.mark.parametrize(
    ("read", "row", "message"),
    [
        (review_2023, _row(rating="5"), "f:1: column 'rating' is '5'; expected 1 to 5 stars"),
        (review_2023, _row(rating=True), "column 'rating' is True;"),
        (review_2023, _row(text=None), "column 'text' is None; expected text"),
        (review_2023, _row(parent_asin=7), "column 'parent_asin' is 7"),
        (review_2023, {"text": "x"}, "column 'rating' is missing"),
        (polarity_review, {"label": 2, "title": "", "content": "x"}, "column 'label' is 2;"),
        (polarity_review, {"label": 1, "title": "x"}, "column 'content' is missing"),
    ],
)
def test_wrong_types_are_named(read, row, message):
    with pytest.raises(UserError, match=message):
        read(row, "f:1", CUT)


def _reviews(products, *, good=2, bad=2, name="x"):
    """Each review begins and goes on in its own words."""
    return [
        _row(
            parent_asin=f"{name}{product}",
            rating=5 if side == "good" else 1,
            text=f"{side} {name}{product} {number} it is what I call {side} {product} {number}",
        )
        for product in range(products)
        for side, count in (("good", good), ("bad", bad))
        for number in range(count)
    ]


def test_pairs_join_a_positive_and_a_negative_review_of_one_product(tmp_path):
    options = CutOptions(prompt_words=3, response_words=20, pairs_per_product=2)
    rows = _reviews(200, good=3, bad=4)
    (domain,), dropped = amazon_domains({"Books": placed(rows)}, options)
    begins = Counter()
    for row in (*domain.query, *domain.eval_pairs):
        side, product, number = row["prompt"].split()
        good, bad = row["chosen"].split(), row["rejected"].split()
        assert (good[:5], good[5]) == (["it", "is", "what", "I", "call"], "good")
        assert bad[5] == "bad"
        assert good[6] == bad[6] == product.removeprefix("x")
        assert number == (good if side == "good" else bad)[7]
        begins[side] += 1
    # The prompt is either review's beginning, by a fair coin.
    total = sum(begins.values())
    assert 0.4 * total < begins["good"] < 0.6 * total
    products = [
        {row["prompt"].split()[1] for row in part}
        for part in (domain.support, domain.query, domain.eval_pairs)
    ]
    assert sum(map(len, products)) == len(set.union(*products)) == 200
    assert [len(part) >= 5 for part in products] == [True] * 3
    assert 60 < len(products[0]) < 120  # 0.9 * 0.5 of 200
    assert len(domain.support) == 7 * len(products[0])
    assert {row["prompt"].split()[0] for row in domain.support} == {"good", "bad"}
    assert len(domain.query) == 2 * len(products[1])
    # Seven reviews of a product, four of them in pairs.
    assert dropped == {"unpaired": 3 * (len(products[1]) + len(products[2]))}
    again = amazon_domains({"Books": placed(rows[::-1])}, options)
    assert again == ([domain], dropped)
    assert amazon_domains({"Books": placed(rows)}, options, seed=1)[0] != [domain]
    (games,), _ = amazon_domains({"Games": placed(_reviews(50, name="g"))}, options)
    folder = write_domains(tmp_path / "all", [domain, games], held_out=["Books"])
    assert load_split(folder).held_out == (domain,)


def test_products_with_one_sentiment_give_no_pair():
    with pytest.raises(UserError, match=r"category 'Books': .* and 0 pairs came of 40 usable"):
        amazon_domains({"Books": placed(_reviews(10, good=4, bad=0))}, CUT)
    with pytest.raises(UserError, match="category 'Books': 0 fine-tuning rows and 0 pairs"):
        amazon_domains({"Books": []})


def test_the_same_text_twice_is_kept_once_and_with_both_sentiments_not_at_all():
    rows = [
        *_reviews(60),
        *_reviews(1),
        _row(parent_asin="y", text=TEXT, rating=5),
        _row(parent_asin="z", text=TEXT, rating=1),
    ]
    _, dropped = amazon_domains({"Books": placed(rows)}, CutOptions(prompt_words=3))
    assert dropped["duplicate"] == 4
    assert dropped["contradiction"] == 2


def test_equal_continuations_are_no_pair():
    rows = [
        _row(parent_asin=f"p{i}", rating=rating, text=f"{word} in {i} what it is is what it is")
        for i in range(60)
        for rating, word in ((5, "good"), (1, "bad"))
    ]
    with pytest.raises(UserError, match="and 0 pairs"):
        amazon_domains({"Books": placed(rows)}, CutOptions(prompt_words=3))


def test_evaluation_prompts_that_are_also_trained_on_are_dropped_and_counted():
    rows = [{**row, "text": f"It begins alike {row['text']}"} for row in _reviews(200)]
    (domain,), dropped = amazon_domains({"Books": placed(rows)}, CutOptions(prompt_words=3))
    assert domain.eval_pairs == domain.prompts == ()
    assert dropped["prompt_also_in_training"] > 10
    # A product in two categories goes to the same part in both.
    both = {"A": placed(_reviews(200)), "B": placed(_reviews(200))}
    found, dropped = amazon_domains(both, CutOptions(prompt_words=3))
    assert "prompt_also_in_training" not in dropped
    assert {r["prompt"] for r in found[0].support} == {r["prompt"] for r in found[1].support}


def test_polarity_has_no_products_so_that_any_two_reviews_match():
    rows = [
        {"label": label, "title": "t", "content": f"{label} {i} says that it is {label} and {i}"}
        for i in range(150)
        for label in (0, 1)
    ]
    (domain,), dropped = amazon_domains({"polarity": placed(rows)}, CutOptions(prompt_words=3))
    assert set(dropped) <= {"unpaired"}
    assert len(domain.support) > 90
    assert len(domain.query) > 50
    assert len(domain.eval_pairs) > 5
    for row in (*domain.query, *domain.eval_pairs):
        assert row["chosen"].split()[3] == "1"
        assert row["rejected"].split()[3] == "0"
    used = Counter(row[side] for row in domain.query for side in ("chosen", "rejected"))
    assert set(used.values()) == {1}  # each review in one pair


def test_files_are_read_with_their_line(tmp_path):
    path = write_jsonl(tmp_path / "Books.jsonl", [_row(rating="9"), _row(rating=None)])
    with pytest.raises(UserError, match=r"Books\.jsonl:1: column 'rating' is '9'"):
        amazon_domains(read_amazon({"Books": str(path)}))


def test_odd_rows_are_dropped_and_counted():
    rows = _reviews(80)
    whole, without = amazon_domains({"Books": placed(rows)}, CutOptions(prompt_words=3))
    odd = [_row(rating=r) for r in (0.0, 9, -1, float("nan"), float("inf"))]
    broken = [_row(rating=None), _row(rating="5"), _row(text=None), _row(parent_asin=7), {}]
    found, dropped = amazon_domains(
        {"Books": placed([broken[0], *rows, *odd, *broken[1:]])}, CutOptions(prompt_words=3)
    )
    assert found == whole
    assert dropped == {**without, "rating_out_of_range": 5, "broken_row": 5}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prompt_words": 0}, "prompt_words is 0"),
        ({"response_words": 2.5}, "response_words is 2.5"),
        ({"eval_share": 0.0}, "eval_share is 0.0"),
        ({"support_share": 1.0}, "support_share is 1.0"),
    ],
)
def test_bad_options_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        CutOptions(**changes)
