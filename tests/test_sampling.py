"""Sampling: seeds decide everything, files resume, the distribution is the one asked for."""

import pytest
import torch

from shiftrm.data.groups import read_groups
from shiftrm.data.pairs import read_pairs
from shiftrm.errors import UserError
from shiftrm.rendering import encode_prompt
from shiftrm.sampling import SamplingConfig, generate, sample_groups

PROMPTS = ["the red", "a", "the small green", "a dog", "the fish"]
CONFIG = SamplingConfig(max_new_tokens=6)


def encoded(tokenizer, prompts=PROMPTS):
    return [encode_prompt(tokenizer, p) for p in prompts]


def test_samples_are_grouped_and_cut_at_eos(policy, tokenizer):
    samples = generate(
        policy, tokenizer, encoded(tokenizer), config=CONFIG, num_responses=3, seed=1
    )
    assert [s.prompt_ids for s in samples[::3]] == encoded(tokenizer)
    for sample in samples:
        assert 1 <= len(sample.response_ids) <= 6
        assert sample.finished == (sample.response_ids[-1] == 2)
        assert 2 not in sample.response_ids[:-1]


def test_seed_decides_and_global_state_is_untouched(policy, tokenizer):
    torch.manual_seed(0)
    before = torch.get_rng_state()
    draw = [
        generate(policy, tokenizer, encoded(tokenizer), config=CONFIG, seed=s) for s in (1, 1, 2)
    ]
    assert draw[0] == draw[1]
    assert draw[0] != draw[2]
    assert torch.equal(torch.get_rng_state(), before)


def test_first_token_frequencies_are_the_policys(policy, tokenizer):
    """4,000 draws of one token against the softmax: within four standard errors everywhere."""
    prompt = encode_prompt(tokenizer, "the red")
    config = SamplingConfig(max_new_tokens=1)
    draws = generate(policy, tokenizer, [prompt] * 4, config=config, num_responses=1000, seed=3)
    with torch.no_grad():
        p = policy(input_ids=torch.tensor([prompt])).logits[0, -1].softmax(-1)
    counts = torch.bincount(torch.tensor([s.response_ids[0] for s in draws]), minlength=32)
    error = (counts / 4000 - p).abs()
    assert bool((error < 4 * (p * (1 - p) / 4000).sqrt() + 1e-3).all())


def test_left_padding_does_not_change_the_draw(policy, tokenizer):
    """Greedy-like draws (temperature near 0) agree between a padded batch and single prompts."""
    config = SamplingConfig(max_new_tokens=4, temperature=1e-4)
    together = generate(policy, tokenizer, encoded(tokenizer), config=config, seed=0)
    alone = [generate(policy, tokenizer, [p], config=config, seed=0)[0] for p in encoded(tokenizer)]
    assert together == alone


def test_group_file(policy, tokenizer, tmp_path):
    seen = []
    path = sample_groups(
        policy,
        tokenizer,
        PROMPTS,
        tmp_path / "groups.jsonl",
        config=CONFIG,
        num_responses=4,
        batch_size=2,
        progress=lambda done, total: seen.append((done, total)),
    )
    rows = read_groups(path)
    assert [r["prompt"] for r in rows] == PROMPTS
    assert all(len(r["responses"]) == len(r["finished"]) == 4 for r in rows)
    assert seen == [(2, 5), (4, 5), (5, 5)]
    assert [p.name for p in tmp_path.iterdir()] == ["groups.jsonl"]


@pytest.mark.parametrize("lines_left", [1, 2, 3, 4])
def test_an_interrupted_file_resumes_to_the_same_result(policy, tokenizer, tmp_path, lines_left):
    def write(path, progress=None):
        return sample_groups(
            policy,
            tokenizer,
            PROMPTS,
            path,
            config=CONFIG,
            num_responses=2,
            batch_size=2,
            seed=5,
            progress=progress,
        )

    straight = write(tmp_path / "straight.jsonl").read_text()

    class Killed(Exception):
        pass

    def kill(done, _total):
        if done >= 4:
            raise Killed

    with pytest.raises(Killed):
        write(tmp_path / "resumed.jsonl", kill)
    partial = tmp_path / "resumed.jsonl.partial"
    lines = partial.read_text().splitlines(keepends=True)
    partial.write_text("".join(lines[:lines_left]) + lines[-1][:9])  # cut in the middle of a line
    calls = []
    path = write(tmp_path / "resumed.jsonl", lambda done, _: calls.append(done))
    assert path.read_text() == straight
    assert len(calls) == 3 - (lines_left - 1) // 2, "whole batches are not sampled again"


def test_a_partial_file_of_other_settings_is_refused(policy, tokenizer, tmp_path):
    (tmp_path / "g.jsonl.partial").write_text('{"settings": "other"}\n')
    with pytest.raises(UserError, match="begun with other prompts or settings"):
        sample_groups(policy, tokenizer, PROMPTS, tmp_path / "g.jsonl", config=CONFIG)


def test_refusals(policy, tokenizer, tmp_path):
    def call(prompts, **options):
        sample_groups(
            policy, tokenizer, prompts, tmp_path / "g.jsonl", **{"config": CONFIG, **options}
        )

    with pytest.raises(UserError, match="at least two responses"):
        call(PROMPTS, num_responses=1)
    with pytest.raises(UserError, match="no prompts"):
        call([])
    with pytest.raises(UserError, match=r"prompt 1 has 60 tokens; .* context of 64"):
        call(["the", "the " * 60])
    for bad in ({"temperature": 0}, {"top_p": 1.5}, {"max_new_tokens": 0}):
        with pytest.raises(UserError, match=next(iter(bad))):
            SamplingConfig(**bad)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("reader", "row", "message"),
    [
        (read_groups, '{"prompt": "a", "responses": ["x"]}', "f:2: the group has 1 response"),
        (read_groups, '{"prompt": "a"}', "f:2: column 'responses' is missing"),
        (read_groups, '{"prompt": "a", "responses": "x"}', "f:2: .* expected a list"),
        (read_pairs, '{"chosen": "a", "rejected": "a"}', "f:2: chosen and rejected are equal"),
        (read_pairs, '{"chosen": "", "rejected": ""}', "f:2: both sides of the pair are empty"),
        (read_pairs, '{"chosen": "a"}', "f:2: column 'rejected' is missing"),
        (read_pairs, '{"chosen": 1, "rejected": "a"}', "f:2: column 'chosen' holds int"),
    ],
)
def test_bad_rows_are_named(tmp_path, reader, row, message):
    good = {
        read_groups: '{"prompt": "a", "responses": ["x", "y"]}',
        read_pairs: '{"chosen": "a", "rejected": "b"}',
    }[reader]
    (tmp_path / "f").write_text(f"{good}\n{row}\n")
    with pytest.raises(UserError, match=message):
        reader(tmp_path / "f")
