"""A template that closes a turn with a token that is not EOS: every way to generate stops there."""

import json

import pytest
import torch
from datasets import Dataset
from transformers import GenerationConfig, LlamaForCausalLM, LlamaForSequenceClassification

from shiftrm.cli import main
from shiftrm.files import read_jsonl
from shiftrm.measure.judges.comparing import judge_pairs
from shiftrm.measure.judges.score_judges import RewardModelJudge
from shiftrm.models.rendering import encode, stop_token_ids
from shiftrm.models.responses import Response, encode_response, group_responses, tokenizer_name
from shiftrm.models.sampling import (
    Draws,
    Sample,
    SamplingConfig,
    as_samples,
    generate,
    group_row,
    load_policy,
    sample_rows,
)
from shiftrm.models.sampling_vllm import connect, sample_rows_vllm
from shiftrm.models.scoring import Scorer
from shiftrm.policies.ppo import PPOTrainer, Problem, exact_token_kl, make_critic
from shiftrm.policies.ppo_config import PPOConfig
from tests.byte_level import CHATML, byte_level
from tests.conftest import llama_config
from tests.fake_endpoint import FakeEndpoint, Say

HI = [{"role": "user", "content": "hi"}]
CLOSED = 4  # <|im_end|>; the tokenizer's EOS is 2
END_OF_DOCUMENT = 2


def small(tokenizer, seed=0):
    torch.manual_seed(seed)
    config = llama_config(len(tokenizer), max_position_embeddings=128)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def taught(tmp_path_factory):
    """A policy that `shiftrm sft` taught to say "ok" and close its turn."""
    folder = tmp_path_factory.mktemp("taught")
    tokenizer = byte_level(CHATML)
    model = small(tokenizer)
    model.generation_config = GenerationConfig(eos_token_id=END_OF_DOCUMENT, pad_token_id=0)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    row = {"messages": [*HI, {"role": "assistant", "content": "ok"}]}
    (folder / "d.jsonl").write_text((json.dumps(row) + "\n") * 16)
    words = f"sft --model {folder}/base --demonstrations {folder}/d.jsonl --output {folder}/sft"
    assert main([*words.split(), "max_steps=40", "learning_rate=2e-2"]) == 0
    return folder / "sft"


def test_sft_saves_what_ends_an_answer(taught):
    saved = GenerationConfig.from_pretrained(taught)
    assert saved.eos_token_id == [END_OF_DOCUMENT, CLOSED]
    ids = encode(byte_level(CHATML), HI, "ok")
    assert ids[-1] == CLOSED, "the line break that ChatML writes after it is not learnt"
    # transformers alone stops there, too, with nothing but the saved folder
    model, _ = load_policy(taught)
    prompt = torch.tensor([ids[:-3]])
    output = model.generate(prompt, max_new_tokens=8, do_sample=False)[0, prompt.shape[1] :]
    assert output.tolist() == ids[-3:]


def test_sampling_stops_and_the_file_holds_the_tokens(taught, tmp_path, capsys):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": HI}) + "\n")
    words = f"sample --policy {taught} --prompts {tmp_path}/p.jsonl --output {tmp_path}/s.jsonl"
    for count in ("1", "2"):
        words_now = [*words.split(), "--responses", count, "--max-new-tokens", "12"]
        assert main([*words_now, "--temperature", "0"]) == 0
        [row] = read_jsonl(tmp_path / "s.jsonl")
        assert row["responses"] == ["ok"] * int(count)
        assert row["finished"] == [True] * int(count)
        assert [ids[-1] for ids in row["response_ids"]] == [CLOSED] * int(count)
        (tmp_path / "s.jsonl").unlink()


def test_ppo_truncates_nothing_that_ended(taught):
    policy, tokenizer = load_policy(taught)
    reference, _ = load_policy(taught)
    config = PPOConfig(
        steps=1,
        prompts_per_step=4,
        rollouts_per_prompt=2,
        sampling=SamplingConfig(12),
        reward_mean=0.0,
        reward_std=1.0,
    )
    seen = []

    def reward(prompts, responses, /, *, finished):
        seen.extend(zip(responses, finished, strict=True))
        return [float(len(r)) for r in responses]

    problem = Problem(policy, reference, tokenizer, [HI], reward)
    trainer = PPOTrainer(problem, make_critic(policy), config)
    log, rollouts = trainer.step(1)
    assert log.truncated_share == 0.0
    assert set(seen) == {("ok", True)}
    assert {s.response_ids[-1] for s in rollouts.samples} == {CLOSED}


def test_a_vllm_request_carries_all_of_them(tmp_path):
    tokenizer = byte_level(CHATML)
    GenerationConfig(eos_token_id=[7, END_OF_DOCUMENT]).save_pretrained(tmp_path / "policy")
    said = [83, 79, CLOSED]
    with FakeEndpoint(
        answer=lambda _: [Say("not read", "stop", said)],
        models=["policy"],
        cards={"root": str(tmp_path / "policy"), "max_model_len": 64},
    ) as fake:
        server = connect(fake.url, str(tmp_path / "policy"))
        [row] = sample_rows_vllm(server, tokenizer, [HI], Draws(SamplingConfig(8), 1, seed=0))
        assert fake.bodies[0]["stop_token_ids"] == [END_OF_DOCUMENT, CLOSED, 7]
    assert row["responses"] == [tokenizer.decode(said[:-1])]
    assert row["response_ids"] == [said]
    assert row["finished"] == [True]


def test_a_greedy_response_is_drawn_once_and_written_as_often_as_asked():
    tokenizer = byte_level(CHATML)
    policy = small(tokenizer)
    greedy = SamplingConfig(6, temperature=0.0)
    prompts = [tokenizer.encode(p) for p in ("a b", "once")]
    samples = generate(policy, tokenizer, prompts, config=greedy, num_responses=3, seed=0)
    assert [s.prompt_ids for s in samples] == [p for p in prompts for _ in range(3)]
    assert samples[0] == samples[1] == samples[2]
    whole = torch.tensor([prompts[1]])
    with torch.no_grad():
        for _ in samples[3].response_ids:
            likeliest = policy(whole).logits[0, -1].argmax()
            whole = torch.cat([whole, likeliest.view(1, 1)], dim=1)
    assert whole[0, len(prompts[1]) :].tolist() == samples[3].response_ids


@pytest.mark.parametrize("merged", ["ab", " b"])
def test_rows_give_back_the_tokens_that_were_sampled(merged):
    """Through text, the prompt's last letter would join the response's first."""
    tokenizer = byte_level(None, merges=[("a", "b"), ("\u0120", "b")])
    policy, reference = small(tokenizer), small(tokenizer, 1)
    sample = Sample(tokenizer.encode("x a"), [*tokenizer.encode("b"), 2], True)
    row = group_row(tokenizer, "x a", [sample, sample])
    assert as_samples(tokenizer, [row]) == [sample, sample]
    direct = exact_token_kl(policy, reference, [sample])
    assert torch.equal(exact_token_kl(policy, reference, as_samples(tokenizer, [row])[:1]), direct)
    text_only = {key: row[key] for key in ("prompt", "responses", "finished")}
    assert as_samples(tokenizer, [text_only])[0] != sample


def scorer_of(tokenizer):
    torch.manual_seed(3)
    return Scorer(
        LlamaForSequenceClassification(llama_config(len(tokenizer), num_labels=1)), tokenizer
    )


def test_sampled_tokens_are_scored_where_the_tokenizer_is_the_same():
    tokenizer = byte_level(None, merges=[("a", "b")])
    scorer = scorer_of(tokenizer)
    sample = Sample(tokenizer.encode("x a"), [*tokenizer.encode("b"), 2], True)
    row = group_row(tokenizer, "x a", [sample, sample])
    expected = scorer.score_ids([[*sample.prompt_ids, *sample.response_ids]])[0]
    [sampled, _] = group_responses(row)
    assert scorer.score([sampled]) == [expected]
    assert scorer(["x a"], ["b"]) != [expected], "as text it is another sequence"
    edited = Response("x a", "bb", True, sampled.ids, sampled.tokenizer)
    assert scorer.score([edited]) == scorer(["x a"], ["bb"]), "the text that stands there counts"
    other = byte_level(None, merges=[("b", "c")])
    assert tokenizer_name(other) != tokenizer_name(tokenizer)
    assert encode_response(other, sampled) == encode(other, "x a", "b")


def test_a_reward_model_that_judges_reads_the_sampled_tokens():
    tokenizer = byte_level(None, merges=[("a", "b")])
    scorer = scorer_of(tokenizer)
    ours = Sample(tokenizer.encode("x a"), [*tokenizer.encode("b"), 2], True)
    theirs = Sample(tokenizer.encode("x a"), tokenizer.encode("ba"), False)
    rows = [[group_row(tokenizer, "x a", [sample])] for sample in (ours, theirs)]
    [verdict] = judge_pairs(RewardModelJudge(scorer, name="r"), *rows)
    expected = scorer.score_ids([[*s.prompt_ids, *s.response_ids] for s in (ours, theirs)])
    assert list(verdict.scores) == expected
    assert scorer(["x a"], ["b"]) != expected[:1], "as text it is another sequence"


def test_a_pad_token_of_its_own_makes_no_other_tokenizer():
    """Reward models get one; the tokens of texts stay."""
    tokenizer, padded = byte_level(CHATML), byte_level(CHATML)
    padded.add_special_tokens({"pad_token": "<mine>"})
    assert tokenizer_name(padded) == tokenizer_name(tokenizer)


def test_the_same_prompt_under_neighbouring_seeds_draws_anew():
    tokenizer = byte_level(CHATML)
    policy = small(tokenizer)
    drawn = [
        str(row["response_ids"])
        for seed in range(4)
        for row in sample_rows(
            policy, tokenizer, ["once"] * 4, Draws(SamplingConfig(6), 1, batch_size=1, seed=seed)
        )
    ]
    assert len(set(drawn)) == len(drawn)


def test_bad_columns_of_tokens_are_named():
    from shiftrm.data.groups import check_group
    from shiftrm.errors import UserError

    row = {"prompt": "a", "responses": ["b", "c"]}
    for more, message in (
        ({"response_ids": [[1]]}, "'response_ids' must hold one list of token ids a response"),
        ({"response_ids": [[1], [-1]]}, "must hold lists of token ids"),
        ({"response_ids": [[1], [True]]}, "must hold lists of token ids"),
        ({"prompt_ids": "1 2"}, "'prompt_ids' must hold lists of token ids"),
        ({"tokenizer": 3}, "'tokenizer' must name the tokenizer"),
    ):
        with pytest.raises(UserError, match=f"f:1: .*{message}"):
            check_group({**row, **more}, "f:1")
    assert check_group({**row, "response_ids": [[1], None]}, "f:1")


def test_messages_of_an_sft_row_end_where_the_policy_will():
    from shiftrm.policies.tokens import encode_demonstration, encode_preference

    tokenizer = byte_level(
        CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif")
    )
    row = {"prompt": HI, "completion": [{"role": "assistant", "content": "ok"}]}
    found = encode_demonstration(row, tokenizer)
    learnt = [i for i, bit in zip(found["input_ids"], found["completion_mask"], strict=True) if bit]
    assert tokenizer.decode(learnt) == "ok<|im_end|>"
    assert tokenizer.decode(found["input_ids"]).endswith("assistant\n<think>\nok<|im_end|>")
    pair = {"prompt": HI, "chosen": [row["completion"][0]], "rejected": "no"}
    sides = encode_preference(
        {**pair, "rejected": [{"role": "assistant", "content": "no"}]}, tokenizer
    )
    assert tokenizer.decode(sides["prompt_ids"]).endswith("<think>\n")
    assert tokenizer.decode(sides["chosen_ids"]) == "ok<|im_end|>"
    assert tokenizer.decode(sides["rejected_ids"]) == "no<|im_end|>"
    texts = encode_preference({"chosen": "Yes, two. ", "rejected": "No"}, byte_level(CHATML))
    decoded = {key: byte_level(CHATML).decode(ids) for key, ids in texts.items()}
    assert decoded == {
        "prompt_ids": "",
        "chosen_ids": "Yes, two. <eos>",
        "rejected_ids": "No<eos>",
    }


def test_rows_of_the_reward_trainer_end_where_the_policy_does(tmp_path):
    """And the saved template gives these tokens to whoever renders with it."""
    from transformers import AutoTokenizer

    from shiftrm import RewardConfig, RewardTrainer

    tokenizer = byte_level(CHATML)
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(llama_config(len(tokenizer), num_labels=1))
    answer = [{"role": "assistant", "content": "ok"}]
    pair = {"prompt": HI, "chosen": answer, "rejected": [{"role": "assistant", "content": "no"}]}
    trainer = RewardTrainer(
        model,
        RewardConfig(str(tmp_path / "out"), max_steps=1, use_cpu=True, bf16=False, report_to=[]),
        train_dataset=Dataset.from_list([pair] * 2),
        processing_class=tokenizer,
    )
    row = trainer.train_dataset[0]
    assert row["chosen_ids"] == encode(byte_level(CHATML), HI, "ok")
    assert row["chosen_ids"][-1] in stop_token_ids(tokenizer)
    trainer.save_model(str(tmp_path / "reward"))
    saved = AutoTokenizer.from_pretrained(tmp_path / "reward")
    theirs = saved.apply_chat_template([*HI, *answer], return_dict=True)["input_ids"]
    assert theirs == row["chosen_ids"]
