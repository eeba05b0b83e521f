"""Rows as tokens, batches and tasks."""

import pytest
import torch

from shiftrm.errors import UserError
from shiftrm.oodpl.batches import (
    Encoder,
    encode_domains,
    encode_for_policy,
    inner_batch,
    outer_batch,
)
from shiftrm.oodpl.tasks import TaskPlan
from tests.byte_level import byte_level
from tests.oodpl.domains import make_domain, make_split

PLAN = TaskPlan(
    seed=0,
    inner_steps=2,
    support_batch=3,
    query_batch=2,
    mixture=1,
    policy_pad_id=0,
    reward_pad_id=0,
)


def test_the_response_begins_after_the_prompt_and_ends_with_eos_where_it_is_finished(tokenizer):
    word = tokenizer.convert_tokens_to_ids
    tokens = encode_for_policy(tokenizer, "the red", " cat runs")
    assert tokens == ([word("the"), word("red"), word("cat"), word("runs"), 2], 2)
    assert encode_for_policy(tokenizer, "the red", " cat", finished=False).ids[-1] == word("cat")
    chat = encode_for_policy(tokenizer, [{"role": "user", "content": "the cat"}], "runs")
    words = tokenizer.convert_ids_to_tokens(chat.ids)
    assert words == ["<s>", "user", "the", "cat", "</s>", "<s>", "assistant", "runs", "</s>"]
    assert chat.start == 7
    with pytest.raises(UserError, match="no token of its own"):
        encode_for_policy(tokenizer, "the red", "", finished=False)


def test_a_token_that_joins_prompt_and_response_counts_as_the_responses():
    joining = byte_level(None, merges=[("a", "b")])
    seven, space, joined, x = joining.convert_tokens_to_ids(["7", "\u0120", "ab", "x"])
    assert encode_for_policy(joining, "7 a", "bx") == ([seven, space, joined, x, 2], 2)


def test_batches_by_hand(tokenizer):
    encoder = Encoder(tokenizer, tokenizer)
    rows = [
        {"prompt": "the red", "response": " cat runs"},
        {"prompt": "the", "response": " dog", "finished": False},
    ]
    examples = [encoder.example(row, i) for i, row in enumerate(rows)]
    batch = inner_batch(examples, policy_pad_id=0, reward_pad_id=7)
    assert batch.policy.attention_mask.tolist() == [[1] * 5, [1, 1, 0, 0, 0]]
    assert batch.policy.response_mask.tolist() == [[0, 0, 1, 1, 1], [0, 1, 0, 0, 0]]
    assert batch.reward_input_ids[1].tolist()[2:] == [7, 7, 7]
    batch.check("a batch")
    pair = encoder.pair({"prompt": "the", "chosen": " cat", "rejected": " dog runs"}, 0)
    outer_batch([pair, pair], policy_pad_id=0).check()


def test_too_long_rows_are_dropped_counted_and_refused_when_too_few_are_left(tokenizer):
    domain = make_domain("cats")
    lengths = [
        len(encode_for_policy(tokenizer, r["prompt"], r["response"]).ids) for r in domain.support
    ]
    short = sum(n <= 7 for n in lengths)
    assert 0 < short < len(lengths)
    encoder = Encoder(tokenizer, tokenizer, max_length=7)
    found = encoder.domain(domain, query=False, eval_pairs=False)
    assert len(found.support) >= short
    assert found.dropped == len(domain.support) - len(found.support)
    with pytest.raises(UserError, match=r"domain 'cats': .* of at most 4 tokens, but a batch"):
        encode_domains(
            Encoder(tokenizer, tokenizer, max_length=4), [domain], support_batch=1, query_batch=0
        )


def test_tasks_are_pure_functions_of_seed_step_and_index(tokenizer):
    encoder = Encoder(tokenizer, tokenizer)
    domains = encode_domains(encoder, make_split().source, support_batch=3, query_batch=2)

    def ids(task):
        return [b.policy.input_ids.tolist() for b in task.inner_batches]

    task = PLAN.draw(domains, step=5, index=1)
    again = PLAN.draw(domains, step=5, index=1)
    assert (task.domains, task.rows, ids(task)) == (again.domains, again.rows, ids(again))
    others = [PLAN.draw(domains, step=s, index=i) for s, i in ((5, 0), (5, 2), (6, 1))]
    assert all(other.rows != task.rows for other in others)
    assert sorted(t.domains[0] for t in (task, *others[:2])) == ["birds", "cats", "dogs"], "a deck"
    assert PLAN._replace(seed=1).draw(domains, step=5, index=1).rows != task.rows


def test_rows_of_a_task_are_of_its_domains_in_equal_shares_and_none_comes_twice(tokenizer):
    encoder = Encoder(tokenizer, tokenizer)
    split = make_split()
    domains = encode_domains(encoder, split.source, support_batch=3, query_batch=2)
    by_name = {d.name: d for d in split.source}
    task = PLAN._replace(mixture=2, support_batch=5).draw(domains, step=0, index=0)
    assert len(task.domains) == 2
    seen = [place for batch in task.rows for place in batch]
    assert len(set(seen)) == len(seen) == 10
    for batch, places in zip(task.inner_batches, task.rows, strict=True):
        assert [name for name, _ in places] == [task.domains[i % 2] for i in range(5)]
        for row, (name, index) in enumerate(places):
            source = by_name[name].support[index]
            expected = encoder.example(source, index).reward_ids
            kept = batch.reward_input_ids[row][batch.reward_attention_mask[row].bool()]
            assert kept.tolist() == expected
    many = PLAN._replace(inner_steps=5).draw(domains, step=0, index=0)
    for places in many.rows:  # 15 rows of 8: some come again, but never in one batch
        assert len(set(places)) == 3
    assert torch.is_tensor(many.outer_batch.chosen.input_ids)
