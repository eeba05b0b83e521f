"""Our trainers of policies against TRL's own, and their rewards and KL against a plain account."""

import math

import pytest
import torch
import trl
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from shiftrm.errors import UserError
from shiftrm.models.rendering import encode_prompt
from shiftrm.models.sampling import Sample, as_samples
from shiftrm.models.scoring import Scorer
from shiftrm.policies import trl_trainers as trainers
from shiftrm.policies.configs import DPOConfig, GRPOConfig, RLOOConfig
from shiftrm.policies.outcome import AdapterOff
from shiftrm.policies.ppo_math import policy_logprobs
from shiftrm.policies.trl_trainers import DPOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer
from shiftrm.trainers.pair_batches import table
from tests.byte_level import CHATML, OPTIONS_TEMPLATE, byte_level
from tests.conftest import TEMPLATE, WORDS, llama_config

FAST = {"learning_rate": 0.01, "max_steps": 3}
RLOO_SETTINGS = {"num_generations": 2, "max_completion_length": 6, "beta": 0.1}
DEMONSTRATIONS = [
    {"prompt": f"the {a}", "completion": f" {b} runs"}
    for a, b in zip(("red", "blue", "green", "small"), ("cat", "dog", "bird", "fish"), strict=True)
]


def model(seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(llama_config()).eval()


def same_weights(a, b):
    return all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters(), strict=True))


def test_sft_is_trls(tokenizer, arguments):
    data = {"train_dataset": Dataset.from_list(DEMONSTRATIONS), "processing_class": tokenizer}
    theirs = trl.SFTTrainer(model(), arguments(trl.SFTConfig, **FAST), **data)
    ours = SFTTrainer(model(), arguments(trl.SFTConfig, **FAST), **data)
    for trainer in (theirs, ours):
        trainer.train()
    assert same_weights(theirs.model, ours.model)
    assert not same_weights(model(), ours.model)


def test_dpo_is_trls(tokenizer, arguments, pairs):
    data = {"train_dataset": Dataset.from_list(pairs), "processing_class": tokenizer}
    theirs = trl.DPOTrainer(model(), model(1), arguments(trl.DPOConfig, **FAST), **data)
    ours = DPOTrainer(model(), model(1), arguments(DPOConfig, **FAST), **data)
    for trainer in (theirs, ours):
        trainer.train()
    assert same_weights(theirs.model, ours.model)


def test_long_rows_are_dropped_and_counted(tokenizer, arguments, pairs):
    long = {"prompt": "the", "completion": " cat" * 30}
    trainer = SFTTrainer(
        model(),
        arguments(trl.SFTConfig, max_length=20),
        train_dataset=Dataset.from_list([*DEMONSTRATIONS, long]),
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == 4
    assert trainer.dropped["longer than max_length=20 tokens"] == 1
    rows = [*pairs, {"prompt": "the", "chosen": " cat" * 30, "rejected": " dog"}]
    trainer = DPOTrainer(
        model(),
        model(),
        arguments(DPOConfig, max_length=20),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == 12
    assert sum(trainer.dropped.values()) == 1


def test_a_gradient_that_is_not_finite_stops_the_run(tokenizer, arguments):
    broken = model()
    trainer = SFTTrainer(
        broken,
        arguments(trl.SFTConfig),
        train_dataset=Dataset.from_list(DEMONSTRATIONS),
        processing_class=tokenizer,
    )
    with torch.no_grad():
        broken.lm_head.weight[5] = math.inf
    with pytest.raises(UserError, match="step 1: the gradient is not finite; stopped before it"):
        trainer.train()


@pytest.fixture
def scorer():
    """A reward model whose tokenizer has other ids and another template than the policy's."""
    words = ["</s>", "<pad>", "<unk>", *reversed(WORDS.split()), "<s>", ":"]
    backend = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    tokenizer.chat_template = TEMPLATE.replace("'<s>' + ' '", "'<s> : '")
    torch.manual_seed(5)
    config = llama_config(num_labels=1, pad_token_id=1, bos_token_id=None, eos_token_id=0)
    return Scorer(LlamaForSequenceClassification(config), tokenizer)


class Recorded:
    """A reward function that remembers what it was asked, call by call."""

    def __init__(self, scorer):
        self.scorer, self.calls = scorer, []

    def __call__(self, prompts, responses, *, finished):
        self.calls.append((prompts, responses, finished))
        return self.scorer(prompts, responses, finished=finished)


def sampled_tokens(trainer):
    """A list that gets (prompts, token ids of the responses) of every call of the reward."""
    [inner], seen = trainer.reward_funcs, []

    def listening(*, prompts, completion_ids, **rest):
        seen.append((prompts, completion_ids))
        return inner(prompts=prompts, completion_ids=completion_ids, **rest)

    trainer.reward_funcs = [listening]
    return seen


KINDS = {"rloo": (RLOOTrainer, RLOOConfig), "grpo": (GRPOTrainer, GRPOConfig)}
PROMPTS = ["the red", "a small dog", "the blue fish sits", "a bird"]


def rewarded(kind, arguments, tokenizer, reward_fn, *, reference, policy=None, **options):
    trainer, config = KINDS[kind]
    rest = {key: options.pop(key) for key in ("peft_config", "prompts") if key in options}
    prompts = rest.pop("prompts", PROMPTS)
    return trainer(
        policy or model(),
        reference,
        arguments(config, **{**RLOO_SETTINGS, **options}),
        reward_fn=reward_fn,
        tokenizer=tokenizer,
        train_dataset=table("prompts", [{"prompt": prompt} for prompt in prompts], ("prompt",)),
        **rest,
    )


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_the_tokens_that_were_drawn_are_scored(kind, chat, arguments):
    """An answer that the prompt begins is continued; no EOS stands behind a prompt."""
    tok = byte_level(
        CHATML.replace("assistant\n' }}{% endif", "assistant\n<think>\n' }}{% endif"),
        merges=[("a", "b"), ("o", "k")],
        post="<bos> $A <eos>",
    )
    begun = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "Sure,"}]
    prompts = [begun, begun[:1]] * 2 if chat else ["x a", "once"] * 2
    torch.manual_seed(0)
    policy = LlamaForCausalLM(llama_config(len(tok)))
    reader = Scorer(LlamaForSequenceClassification(llama_config(len(tok), num_labels=1)), tok)
    drawn, scored = [], []
    draw, score = policy.generate, reader.score_ids

    def generate(*args, **options):
        output = draw(*args, **options)
        drawn.extend(output.tolist())
        return output

    def score_ids(sequences, **options):
        scored.extend(sequences)
        return score(sequences, **options)

    policy.generate, reader.score_ids = generate, score_ids
    trainer = rewarded(
        kind,
        arguments,
        tok,
        reader,
        policy=policy,
        reference=LlamaForCausalLM(llama_config(len(tok))),
        prompts=prompts,
        max_steps=1,
        per_device_train_batch_size=8,
    )
    trainer.train()
    pad, openings = tok.pad_token_id, [encode_prompt(tok, prompt) for prompt in prompts]
    assert len(scored) == 8
    for ids in scored:
        assert any(ids[: len(opening)] == opening for opening in openings)
        assert any(unpadded(row, pad) == ids for row in drawn)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_read_as_they_are(kind, arguments):
    """Tool calls of other prompts have other arguments, which Arrow adds as null."""
    tok = byte_level(OPTIONS_TEMPLATE)
    calls = [{"function": {"name": "f", "arguments": {name: 1}}} for name in "ab"]
    ask = {"role": "user", "content": "hi"}
    prompts = [[ask, {"role": "assistant", "tool_calls": [call]}, ask] for call in calls]
    openings = {tuple(encode_prompt(tok, prompt)) for prompt in prompts}
    given = table("f", [{"prompt": prompt} for prompt in prompts], ("prompt",))
    for data in (given, Dataset.from_dict({"prompt": prompts})):
        size = llama_config(len(tok), max_position_embeddings=512)
        trainer, config = KINDS[kind]
        found = trainer(
            LlamaForCausalLM(size), None, arguments(config, **RLOO_SETTINGS), tokenizer=tok,
            reward_fn=lambda prompts, texts, finished: [0.0] * len(texts), train_dataset=data,
        )  # fmt: skip
        rows = list(found.get_train_dataloader().dataset)
        ids, _, _ = found._tokenize_prompts([row["prompt"] for row in rows])
        assert {tuple(one) for one in ids} == openings


def unpadded(row, pad):
    """A drawn row without the padding on both sides."""
    first = next(place for place, token in enumerate(row) if token != pad)
    last = next(place for place in reversed(range(len(row))) if row[place] != pad)
    return row[first : last + 1]


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_logged_rewards_are_the_scorers(kind, chat, arguments, tokenizer, scorer):
    """On the completions as TRL logs them, with the space before them; what was cut off is open."""
    prompts = [[{"role": "user", "content": p}] for p in PROMPTS] if chat else PROMPTS
    recorded = Recorded(scorer)
    trainer = rewarded(kind, arguments, tokenizer, recorded, reference=model(), prompts=prompts)
    seen = sampled_tokens(trainer)
    trainer.train()
    logs = [row for row in trainer.state.log_history if "reward" in row]
    assert len(logs) == len(recorded.calls) == 2
    for log, (asked, responses, finished), (_, ids) in zip(logs, recorded.calls, seen, strict=True):
        expected = scorer(asked, responses, finished=finished)
        assert log["reward"] == pytest.approx(sum(expected) / 4, abs=1e-6)
        assert log["completions/clipped_ratio"] == pytest.approx(1 - sum(finished) / 4)
        assert max(expected) - min(expected) > 1e-3, "equal rewards would show nothing"
        assert finished == [tokens[-1] == tokenizer.eos_token_id for tokens in ids]
        assert all(len(t) == 6 for t, done in zip(ids, finished, strict=True) if not done)
    _, ids = seen[-1]
    words = [i[:-1] if done else i for i, done in zip(ids, recorded.calls[-1][2], strict=True)]
    assert [r.strip() for r in recorded.calls[-1][1]] == [tokenizer.decode(i) for i in words]
    if not chat:
        assert all(r.startswith(" ") for r in recorded.calls[-1][1] if r), "as it was sampled"


def plain_kl(policy, reference, sample):
    """Over the whole vocabulary at each state of the response, plainly and in fp64."""
    ids = torch.tensor([sample.prompt_ids + sample.response_ids])
    states = slice(len(sample.prompt_ids) - 1, -1)
    with torch.no_grad():
        log_p, log_q = (
            m(input_ids=ids).logits[0, states].double().log_softmax(-1) for m in (policy, reference)
        )
    return float((log_p.exp() * (log_p - log_q)).sum())


@pytest.mark.parametrize(
    "sampling",
    [{}, {"temperature": 0.5}, {"temperature": 0.8, "top_p": 0.6, "repetition_penalty": 1.2}],
)
@pytest.mark.parametrize("at_once", [trainers.LOGITS_AT_ONCE, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_sequence_kl_by_a_plain_account(
    monkeypatch, kind, at_once, sampling, arguments, tokenizer, scorer
):
    """To the given reference, exactly along the samples of the first step, however drawn."""
    monkeypatch.setattr(trainers, "LOGITS_AT_ONCE", at_once)
    trainer = rewarded(
        kind, arguments, tokenizer, scorer, reference=model(1), max_steps=1, **sampling
    )
    seen = sampled_tokens(trainer)
    trainer.train()
    [(prompts, responses)] = seen
    samples = [
        Sample(encode_prompt(tokenizer, prompt), ids, True)
        for prompt, ids in zip(prompts, responses, strict=True)
    ]
    [log] = [row for row in trainer.state.log_history if "reward" in row]
    expected = [plain_kl(model(), model(1), sample) for sample in samples]
    assert log["sequence_kl"] == pytest.approx(sum(expected) / len(samples), rel=1e-4)
    assert log["sequence_kl"] > 1e-3
    assert "kl" not in log
    if not sampling:  # k1 for RLOO, k3 for GRPO
        own, mask = policy_logprobs(model(), samples)
        ratio = policy_logprobs(model(1), samples)[0] - own
        by_token = -ratio if kind == "rloo" else (ratio.exp() - 1 - ratio) * mask
        sampled = float(by_token.sum(1).mean())
        assert log["sequence_kl_sampled"] == pytest.approx(sampled, rel=1e-4)


def test_sequence_kl_of_some_rows_and_of_masked_ones(monkeypatch, arguments, tokenizer, scorer):
    """Every third of 8 samples; one that the limit cut off counts for nothing, as in the loss."""
    monkeypatch.setattr(trainers, "KL_ROWS", 3)
    trainer = rewarded(
        *("grpo", arguments, tokenizer, scorer),
        reference=model(1),
        max_steps=1,
        per_device_train_batch_size=8,
        mask_truncated_completions=True,
        max_completion_length=12,
    )
    seen = sampled_tokens(trainer)
    trainer.train()
    [(prompts, responses)] = seen
    kept = [
        plain_kl(
            model(), model(1), Sample(encode_prompt(tokenizer, prompts[k]), responses[k], True)
        )
        for k in (0, 3, 6)
        if responses[k][-1] == tokenizer.eos_token_id
    ]
    assert 0 < len(kept) < 3
    [log] = [row for row in trainer.state.log_history if "reward" in row]
    assert log["sequence_kl"] == pytest.approx(sum(kept) / len(kept), rel=1e-4)


def test_rloo_is_trls(arguments, tokenizer, scorer, tmp_path):
    """The same training, where the reference is the policy that TRL loads again by its name."""
    model().save_pretrained(tmp_path / "policy")

    def their_reward(prompts, completions, completion_ids, **_):
        done = [ids[-1] == tokenizer.eos_token_id for ids in completion_ids]
        whole = [
            tokenizer.decode([*encode_prompt(tokenizer, prompt), *(ids[:-1] if end else ids)])
            for prompt, ids, end in zip(prompts, completion_ids, done, strict=True)
        ]
        responses = [text.removeprefix(p) for text, p in zip(whole, prompts, strict=True)]
        return scorer(prompts, responses, finished=done)

    theirs = trl.RLOOTrainer(
        LlamaForCausalLM.from_pretrained(tmp_path / "policy"),
        their_reward,
        arguments(trl.RLOOConfig, **RLOO_SETTINGS, **FAST),
        train_dataset=Dataset.from_dict({"prompt": PROMPTS}),
        processing_class=tokenizer,
    )
    theirs.train()
    ours = rewarded("rloo", arguments, tokenizer, scorer, reference=model(), **FAST)
    ours.train()
    assert same_weights(theirs.model, ours.model)
    assert not same_weights(model(), ours.model)


@pytest.mark.parametrize("kind", KINDS)
def test_with_lora_the_reference_is_the_base(kind, arguments, tokenizer, scorer):
    adapter = LoraConfig(task_type="CAUSAL_LM", r=4)
    trainer = rewarded(
        *(kind, arguments, tokenizer, scorer),
        reference=None,
        peft_config=adapter,
        learning_rate=0.1,
        max_steps=3,
    )
    trainer.train()
    assert trainer.ref_model is None
    rows = [{"prompt": p, "responses": [" cat runs"], "finished": [True]} for p in PROMPTS]
    samples = as_samples(tokenizer, rows)
    policy = trainer.model.eval()
    base = policy_logprobs(model(), samples)[0]
    assert torch.allclose(policy_logprobs(AdapterOff(policy), samples)[0], base, atol=1e-6)
    assert not torch.allclose(policy_logprobs(policy, samples)[0], base, atol=1e-3)
    kls = [row["sequence_kl"] for row in trainer.state.log_history if "reward" in row]
    assert abs(kls[0]) < 1e-5 < abs(kls[-1])


def test_rewards_must_be_finite(arguments, tokenizer):
    def broken(prompts, responses, *, finished):
        return [math.nan] * len(prompts)

    trainer = rewarded("rloo", arguments, tokenizer, broken, reference=None, beta=0.0)
    with pytest.raises(UserError, match="the reward is nan for the prompt '"):
        trainer.train()
