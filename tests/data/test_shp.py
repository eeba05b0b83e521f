"""SHP's rows, with the quirks of the public schema, become domains; dropped rows are counted."""

from collections import Counter

import pytest

from shiftrm.data.domains import Domain, check_leaks, load_split, split_domains, write_domains
from shiftrm.data.shp import LEAVE_OUT, SUBREDDITS, read_shp, shp_domains, shp_pair
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from tests.data.public_schemas import placed


def _row(**changes):
    """A row with all columns of the public schema; A is preferred."""
    return {
        "post_id": "p1",
        "domain": "askbaking_train",
        "upvote_ratio": 0.98,
        "history": "Why does bread rise?",
        "c_root_id_A": "a1",
        "c_root_id_B": "b1",
        "created_at_utc_A": 1600000000,
        "created_at_utc_B": 1600000100,
        "score_A": 10,
        "score_B": 4,
        "human_ref_A": "Yeast makes gas.",
        "human_ref_B": "It is magic.",
        "labels": 1,
        "seconds_difference": 100.0,
        "score_ratio": 2.5,
        **changes,
    }


def test_label_one_means_that_a_is_preferred():
    pair = shp_pair(_row(), "f:1")
    assert (pair.domain, pair.split, pair.post) == ("askbaking", "train", "p1")
    assert pair.prompt == "Why does bread rise?\n\nAnswer:"
    assert (pair.chosen, pair.rejected) == (" Yeast makes gas.", " It is magic.")
    swapped = _row(labels=0, score_A=4, score_B=10)
    assert shp_pair(swapped, "f:1").chosen == " It is magic."


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"score_A": 4, "score_ratio": 1.0, "labels": 0}, "equal_scores"),
        ({"score_ratio": 1.99}, "low_score_ratio"),
        ({"human_ref_A": "[removed]"}, "removed_comment"),
        ({"human_ref_B": " [deleted]\n"}, "removed_comment"),
        ({"human_ref_B": "  "}, "empty_comment"),
        ({"human_ref_B": "Yeast makes gas. "}, "equal_texts"),
        ({"history": ""}, "empty_post"),
        ({"history": "[removed]"}, "empty_post"),
        ({"labels": 0}, "label_against_scores"),
    ],
)
def test_dropped_rows_have_a_reason(changes, reason):
    assert shp_pair(_row(**changes), "f:1") == reason


def test_a_score_ratio_at_the_threshold_is_kept_and_the_threshold_may_move():
    assert shp_pair(_row(score_A=8, score_ratio=2.0), "f:1").post == "p1"
    assert shp_pair(_row(score_ratio=1.99), "f:1", score_ratio=1.5).post == "p1"
    assert shp_pair(_row(), "f:1", score_ratio=3.0) == "low_score_ratio"


def test_emoji_and_right_to_left_text_stay_as_they_are():
    hebrew, emoji = "\u200fלמה הלחם תופח?", "👩‍🍳 yeast 🍞"
    pair = shp_pair(_row(history=hebrew, human_ref_A=emoji, human_ref_B="خميرة"), "f:1")
    assert (pair.prompt, pair.chosen, pair.rejected) == (
        f"{hebrew}\n\nAnswer:",
        f" {emoji}",
        " خميرة",
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"human_ref_A": None}, "f:1: column 'human_ref_A' is None; expected text"),
        ({"labels": 2}, "f:1: column 'labels' is 2; expected 1"),
        ({"labels": True}, "column 'labels' is True"),
        ({"score_A": "10"}, "f:1: column 'score_A' is '10'; expected a number"),
    ],
)
def test_wrong_types_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        shp_pair(_row(**changes), "f:1")
    row = _row()
    del row["score_ratio"]
    with pytest.raises(UserError, match="f:1: column 'score_ratio' is missing"):
        shp_pair(row, "f:1")


def _posts(domain, split, count, pairs=2):
    return [
        _row(
            post_id=f"{domain}-{split}-{post}",
            domain=f"{domain}_{split}",
            history=f"{domain} {split} question {post}",
            human_ref_A=f"good {post} {pair}",
            human_ref_B=f"bad {post} {pair}",
        )
        for post in range(count)
        for pair in range(pairs)
    ]


def test_domains_of_posts(tmp_path):
    rows = [
        *_posts("askacademia", "train", 40),
        *_posts("askbaking", "train", 40),
        *_posts("askbaking", "test", 5),
        *_posts("askbaking", "validation", 3),
        *_posts("askvet", "train", 1),
    ]
    found, dropped = shp_domains(placed(rows), domains=["askbaking", "askacademia"])
    assert [domain.name for domain in found] == ["askacademia", "askbaking"]
    assert dropped == {"other_domain": 2, "other_split": 6}
    academia, baking = found
    assert (len(baking.eval_pairs), len(baking.prompts)) == (10, 5)
    assert academia.eval_pairs == academia.prompts == ()
    for domain in found:
        support = {row["prompt"] for row in domain.support}
        query = {row["prompt"] for row in domain.query}
        assert not support & query
        assert len(support | query) == 40
        assert 10 <= len(support) <= 30  # half of 40 by a fair draw
        assert len(domain.support) == 4 * len(support)  # two pairs: four different comments
        assert len(domain.query) == 2 * len(query)
        # Comments of both sides: mixed quality.
        assert {row["response"].split()[0] for row in domain.support} == {"good", "bad"}
    assert shp_domains(placed(rows[::-1]), domains=["askacademia", "askbaking"])[0] == found
    other = shp_domains(placed(rows), domains=["askacademia", "askbaking"], seed=1)[0]
    assert other != found
    folder = write_domains(tmp_path / "shp", found, held_out=["askbaking"])
    assert load_split(folder).all == tuple(found)


def test_a_comment_in_several_pairs_is_one_support_row():
    rows = [
        _row(human_ref_A="good", human_ref_B=f"bad {i}", post_id=f"{p}", history=f"q {p}")
        for i in range(3)
        for p in range(20)
    ]
    (domain,), _ = shp_domains(placed(rows))
    posts = {row["prompt"] for row in domain.support}
    assert len(domain.support) == 4 * len(posts)


def test_at_most_five_pairs_a_post_drawn_by_the_seed():
    rows = [_row(human_ref_B=f"bad {i}", history=f"q {p}") for i in range(9) for p in range(12)]
    (domain,), dropped = shp_domains(placed(rows))
    assert dropped == {"over_pairs_per_post": 12 * 4}
    assert set(Counter(row["prompt"] for row in domain.query).values()) == {5}
    (other,), _ = shp_domains(placed(rows), seed=1)
    assert domain.query != other.query
    (fewer,), dropped = shp_domains(placed(rows), pairs_per_post=2)
    assert dropped == {"over_pairs_per_post": 12 * 7}
    assert set(Counter(row["prompt"] for row in fewer.query).values()) == {2}


def test_a_post_on_both_sides_is_evaluated_on_only():
    rows = [
        *_posts("askbaking", "train", 30, pairs=1),
        *_posts("askbaking", "test", 3, pairs=1),
        # The same id under another text, the same text under another id, in another domain.
        _row(post_id="askbaking-test-0", history="edited"),
        _row(post_id="new", history="askbaking  test question 1\n"),
        _row(post_id="cross", history="askbaking test question 2", domain="askculinary_train"),
        _row(post_id="fine", history="a question of its own", domain="askculinary_train"),
        # The same pair twice, once with its sides exchanged.
        _row(post_id="twice", history="twice"),
        _row(
            post_id="twice",
            history="twice",
            human_ref_A="It is magic.",
            human_ref_B="Yeast makes gas.",
            labels=0,
            score_A=4,
            score_B=10,
        ),
    ]
    found, dropped = shp_domains(placed(rows))
    assert dropped == {"post_also_in_evaluation": 3, "duplicate": 1}
    check_leaks(split_domains(found, source=["askculinary"], held_out=["askbaking"]))
    assert sum(len(d.eval_pairs) for d in found) == 3


def test_rows_that_name_no_split_are_split_by_post():
    rows = [{**row, "domain": "askvet"} for row in _posts("askvet", "train", 300)]
    (domain,), dropped = shp_domains(placed(rows))
    assert dropped == {}
    assert 15 <= len(domain.prompts) <= 50  # 30 expected
    assert len(domain.eval_pairs) == 2 * len(domain.prompts)
    held_out = Domain(name="x", support=({"prompt": "p", "response": " r"},))
    check_leaks(split_domains([domain, held_out], source=["askvet"], held_out=["x"]))


def test_files_are_read_with_their_line(tmp_path):
    path = write_jsonl(tmp_path / "train.json", [_row(), _row(labels="1")])
    rows = read_shp([str(path)])
    assert next(rows)[1] == _row()
    _, dropped = shp_domains(read_shp([str(path)]))
    assert dropped == {"broken_row": 1}
    path = write_jsonl(tmp_path / "train.json", [_row(labels="1"), {"x": 1}])
    with pytest.raises(UserError, match=r"train\.json:1: column 'labels' is '1'"):
        shp_domains(read_shp([str(path)]))


def test_six_leave_three_out_splits_cover_the_eighteen_domains():
    assert len(SUBREDDITS) == 18
    assert [len(names) for names in LEAVE_OUT] == [3] * 6
    assert sum(LEAVE_OUT, ()) == SUBREDDITS
    assert LEAVE_OUT[0] == ("askacademia", "askanthropology", "askbaking")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"pairs_per_post": 0}, "pairs_per_post is 0"),
        ({"support_share": 1.0}, "support_share is 1.0"),
        ({"eval_split": "train"}, "eval_split is 'train'; give 'validation' or 'test'"),
        ({"domains": ["askbakin"]}, "no usable row of domain 'askbakin'"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        shp_domains(placed([_row()]), **options)
