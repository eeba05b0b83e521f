"""Sampling: seeds decide everything, files resume, the distribution is the one asked for."""

import copy
import dataclasses

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import GenerationConfig

from shiftrm.data.groups import read_groups
from shiftrm.errors import UserError
from shiftrm.files import read_jsonl, write_jsonl
from shiftrm.models import sampling
from shiftrm.models.group_files import SAMPLING
from shiftrm.models.rendering import encode_prompt
from shiftrm.models.sampling import (
    Draws,
    PolicySampler,
    SamplingConfig,
    generate,
    sample_groups,
    sample_rows,
)

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


def draw(model, tokenizer):
    config = SamplingConfig(max_new_tokens=20)
    return generate(model, tokenizer, encoded(tokenizer), config=config, num_responses=20, seed=4)


@pytest.mark.parametrize("wrap", [False, True])
def test_the_checkpoints_generation_config_has_no_say(policy, tokenizer, wrap):
    """What is drawn is the policy's own distribution: repetitions and short responses, too."""
    plain = draw(policy, tokenizer)
    bigrams = [list(zip(s.response_ids, s.response_ids[1:], strict=False)) for s in plain]
    assert any(len(set(b)) < len(b) for b in bigrams), "so no_repeat_ngram_size would matter"
    assert any(len(s.response_ids) < 20 for s in plain), "so min_new_tokens would matter"
    skewed = GenerationConfig(
        do_sample=False,
        temperature=0.01,
        top_k=1,
        min_p=0.5,
        no_repeat_ngram_size=2,
        min_new_tokens=20,
        suppress_tokens=[4, 5, 6],
        max_length=3,
    )
    policy.generation_config = skewed
    model = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", r=2)) if wrap else policy
    assert draw(model, tokenizer) == plain, "LoRA's start is the model itself"
    assert policy.generation_config is skewed, "left as it was"


def test_the_models_generation_config_comes_back_after_an_error(policy, tokenizer, monkeypatch):
    def fails(**_):
        raise RuntimeError("out of memory")

    before = policy.generation_config
    monkeypatch.setattr(policy, "generate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        draw(policy, tokenizer)
    assert policy.generation_config is before


def test_without_a_pad_token_eos_pads(policy, tokenizer):
    padless = copy.deepcopy(tokenizer)
    padless.pad_token = None
    assert draw(policy, padless) == draw(policy, tokenizer)
    padless.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        draw(policy, padless)


def test_rows_are_batches_with_a_seed_each(policy, tokenizer):
    """A hashed seed a batch: held against `generate` called by hand."""
    rows = sample_rows(policy, tokenizer, PROMPTS, Draws(CONFIG, 2, batch_size=3, seed=7))
    ids = encoded(tokenizer)
    samples = [
        s
        for start in (0, 3)
        for s in generate(
            policy,
            tokenizer,
            ids[start : start + 3],
            config=CONFIG,
            num_responses=2,
            seed=sampling.draw_seed(7, start),
        )
    ]
    assert [r["prompt"] for r in rows] == PROMPTS
    assert [f for r in rows for f in r["finished"]] == [s.finished for s in samples]
    words = [s.response_ids[:-1] if s.finished else s.response_ids for s in samples]
    texts = [tokenizer.decode(ids) for ids in words]
    assert [t.strip() for r in rows for t in r["responses"]] == texts
    assert [ids for r in rows for ids in r["response_ids"]] == [s.response_ids for s in samples]
    assert [r["prompt_ids"] for r in rows] == ids


def test_group_file_and_rows_agree(policy, tokenizer, tmp_path):
    draws = Draws(CONFIG, 2, batch_size=2, seed=3)
    path = sample_groups(policy, tokenizer, PROMPTS, tmp_path / "g.jsonl", draws)
    rows = read_jsonl(path)
    assert len({row.pop(SAMPLING) for row in rows}) == 1
    assert rows == sample_rows(policy, tokenizer, PROMPTS, draws)


def test_rows_of_one_response_or_no_prompts(policy, tokenizer):
    rows = sample_rows(policy, tokenizer, PROMPTS, Draws(CONFIG, 1, batch_size=2, seed=3))
    assert [len(r["responses"]) for r in rows] == [1] * 5
    assert sample_rows(policy, tokenizer, [], Draws(CONFIG, 2)) == []


def test_group_file(policy, tokenizer, tmp_path):
    seen = []
    path = sample_groups(
        policy,
        tokenizer,
        PROMPTS,
        tmp_path / "groups.jsonl",
        Draws(CONFIG, 4, batch_size=2),
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
            Draws(CONFIG, 2, batch_size=2, seed=5),
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


def test_line_separators_in_responses_survive_resuming(policy, tokenizer, tmp_path, monkeypatch):
    """A JSON line ends at LF alone; U+2028, U+2029 and U+0085 are text."""
    strange = "a\u2028b\u2029c\u0085d\x0be\x1cf"
    monkeypatch.setattr(sampling, "decode_response", lambda *_, **__: strange)
    draws = Draws(CONFIG, 2, batch_size=2)

    class Killed(Exception):
        pass

    def kill(done, _total):
        if done >= 4:
            raise Killed

    path = tmp_path / "g.jsonl"
    with pytest.raises(Killed):
        sample_groups(policy, tokenizer, PROMPTS, path, draws, progress=kill)
    seen = []
    sample_groups(
        policy, tokenizer, PROMPTS, path, draws, progress=lambda done, _: seen.append(done)
    )
    assert seen == [5], "four groups were kept"
    assert [r["responses"] for r in read_groups(path)] == [[strange] * 2] * 5


@pytest.mark.parametrize(
    "content", [b"", b"half a li", b"\xff\xfe\n", b"[]\n{}\n", b'{"settings": "other"}\n']
)
def test_a_partial_file_that_is_none_is_refused(policy, tokenizer, tmp_path, content):
    (tmp_path / "g.jsonl.partial").write_bytes(content)
    with pytest.raises(
        UserError, match="begun with another policy, other prompts or other settings"
    ):
        sample_groups(policy, tokenizer, PROMPTS, tmp_path / "g.jsonl", Draws(CONFIG))
    assert (tmp_path / "g.jsonl.partial").read_bytes() == content


def test_groups_of_another_policy_are_neither_continued_nor_taken_for_todays(
    policy, tokenizer, tmp_path
):
    """The same prompts and settings, into the same file, after the policy has moved."""
    moved = copy.deepcopy(policy)
    with torch.no_grad():
        moved.model.norm.weight += 0.01
    path, draws = tmp_path / "g.jsonl", Draws(CONFIG, 2, batch_size=2)

    class Killed(Exception):
        pass

    def kill(done, _total):
        raise Killed

    with pytest.raises(Killed):
        sample_groups(policy, tokenizer, PROMPTS, path, draws, progress=kill)
    partial = tmp_path / "g.jsonl.partial"
    begun = partial.read_bytes()
    with pytest.raises(UserError, match="begun with another policy"):
        sample_groups(moved, tokenizer, PROMPTS, path, draws)
    assert partial.read_bytes() == begun
    sample_groups(copy.deepcopy(policy), tokenizer, PROMPTS, path, draws)
    finished = path.read_bytes()
    for other, its_draws in (
        (moved, draws),
        (policy, dataclasses.replace(draws, seed=1)),
        (policy, dataclasses.replace(draws, config=SamplingConfig(max_new_tokens=5))),
    ):
        with pytest.raises(UserError, match="already there with groups of another policy, or sam"):
            sample_groups(other, tokenizer, PROMPTS, path, its_draws)
    assert path.read_bytes() == finished
    rows = read_jsonl(path)
    write_jsonl(path, [{k: v for k, v in row.items() if k != SAMPLING} for row in rows])
    sample_groups(moved, tokenizer, PROMPTS, path, draws)  # from elsewhere: nothing says whose
    assert SAMPLING not in read_jsonl(path)[0]


def test_what_a_policy_samples_by_is_in_its_key(policy, tokenizer):
    """Every change that changes draws, and a layer without values, which must not fail."""

    def key(model):
        return PolicySampler(model, tokenizer).settings(Draws(CONFIG, 2))

    seen = [key(policy)]
    assert key(copy.deepcopy(policy)) == seen[0]
    seen.append(key(copy.deepcopy(policy).bfloat16()))
    ends = copy.deepcopy(policy)
    ends.generation_config.eos_token_id = [2, 5]
    seen.append(key(ends))
    lora = LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    adapted = get_peft_model(copy.deepcopy(policy), lora)
    seen.append(key(adapted))
    adapted.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 2
    seen.append(key(adapted))
    with adapted.disable_adapter():
        seen.append(key(adapted))
    elsewhere = copy.deepcopy(policy)
    elsewhere.lm_head.to("meta")
    seen.append(key(elsewhere))
    assert all(one != other for i, one in enumerate(seen) for other in seen[:i])


@pytest.mark.parametrize("other", [{"temperature": 1}, None, ["x"], 3])
def test_a_column_of_the_same_name_from_elsewhere_is_no_key(policy, tokenizer, tmp_path, other):
    path = sample_groups(policy, tokenizer, PROMPTS, tmp_path / "g.jsonl", Draws(CONFIG, 2))
    rows = read_jsonl(path)
    write_jsonl(path, [{**row, SAMPLING: other} for row in rows])
    sample_groups(policy, tokenizer, PROMPTS, path, Draws(CONFIG, 2, seed=1))
    write_jsonl(path, [rows[0], *({**row, SAMPLING: other} for row in rows[1:])])
    with pytest.raises(UserError, match="groups of another policy"):
        sample_groups(policy, tokenizer, PROMPTS, path, Draws(CONFIG, 2))


def test_a_group_file_that_is_there(policy, tokenizer, tmp_path):
    path = tmp_path / "g.jsonl"

    def call(prompts=PROMPTS, num_responses=2):
        sample_groups(policy, tokenizer, prompts, path, Draws(CONFIG, num_responses))

    call()
    content = path.read_bytes()
    call()
    for options, message in (
        ({"prompts": PROMPTS[:4]}, "already there with 5 groups, not 4"),
        ({"num_responses": 3}, "already there with groups of 2 responses, not 3"),
        ({"prompts": PROMPTS[::-1]}, "already there with groups of other prompts"),
    ):
        with pytest.raises(UserError, match=message):
            call(**options)
    assert path.read_bytes() == content
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match="is a folder"):
        call()


def test_refusals(policy, tokenizer, tmp_path):
    def call(prompts, **options):
        draws = Draws(**{"config": CONFIG, **options})
        sample_groups(policy, tokenizer, prompts, tmp_path / "g.jsonl", draws)

    with pytest.raises(UserError, match="num_responses is 0; it must be at least 1"):
        call(PROMPTS, num_responses=0)
    with pytest.raises(UserError, match="no prompts"):
        call([])
    with pytest.raises(UserError, match="batch_size is 0"):
        call(PROMPTS, batch_size=0)
    for bad, message in (
        ("", "prompt 1 is empty: there are no tokens to continue"),
        (None, "prompt 1 holds NoneType"),
        (7, "prompt 1 holds int"),
        ([], "prompt 1 is an empty list"),
        (["hello"], "prompt 1, message 1 is str"),
        ([{"content": "the"}], "prompt 1, message 1 has no 'role'"),
        ([{"role": "user"}], "prompt 1, message 1 has no 'content'"),
    ):
        with pytest.raises(UserError, match=message):
            call(["the", bad])
    with pytest.raises(UserError, match=r"prompt 1 has 60 tokens; .* context of 64"):
        call(["the", "the " * 60])
    for bad in (
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 1.5},
        {"max_new_tokens": 0},
        {"repetition_penalty": float("inf")},
    ):
        with pytest.raises(UserError, match=next(iter(bad))):
            SamplingConfig(**bad)
    assert list(tmp_path.iterdir()) == []
