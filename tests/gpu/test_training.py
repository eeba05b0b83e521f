"""Shared prefixes, MetaRM and PPO on a GPU, in the precisions that GPUs are used with."""

import copy
import logging
import math

import pytest
import torch

from shiftrm.models.prefix import SharedRows, cheap_split, pack
from shiftrm.models.probes import sharing_obstacle
from shiftrm.models.rewards import group_rewards
from shiftrm.trainers.metarm import MetaRMTrainer
from shiftrm.trainers.reward import RewardTrainer
from tests.gpu.conftest import DEVICE, policy, reward_model, word_rows

GENERATOR = torch.Generator().manual_seed(1)


def packed(shapes):
    """Rows of [prompt, response, response, ...] lengths, on the device."""

    def tokens(n):
        return torch.randint(3, 49152, (n,), generator=GENERATOR).tolist()

    groups = []
    for prompt, *responses in shapes:
        start = tokens(prompt)
        groups.append([start + tokens(n) for n in responses])
    rows = pack(groups, pad_token_id=0, pad_to_multiple_of=128)
    return SharedRows(*(tensor.to(DEVICE) for tensor in rows))


def gradients(model, rewards):
    model.zero_grad(set_to_none=True)
    torch.sin(3.0 * rewards).sum().backward()
    return {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    ("shape", "attention"), [("smol", "sdpa"), ("small", "eager"), ("small", "flex_attention")]
)
@pytest.mark.parametrize("precision", ["autocast", "pure"])
def test_prefixes_are_shared_in_bf16(make_trainer, caplog, shape, attention, precision):
    dtype = torch.bfloat16 if precision == "pure" else torch.float32
    model = reward_model(shape, attention=attention, dtype=dtype)
    caplog.set_level(logging.INFO, "shiftrm")
    trainer = make_trainer(
        model,
        RewardTrainer,
        train=word_rows(120, 60, rows=16),
        bf16=precision == "autocast",
        pad_to_multiple_of=128,
    )
    trainer.train()
    assert "cannot share" not in caplog.text
    assert trainer._sharing is True
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize(
    ("shape", "attention"), [("smol", "sdpa"), ("small", "eager"), ("small", "flex_attention")]
)
def test_shared_equals_plain_in_fp32(shape, attention):
    model = reward_model(shape, attention=attention)
    rows = packed([(200, 30, 70, 50), (90, 120, 10), (300, 1, 40, 128)])
    shared = group_rewards(model, rows, shared=True, split=False)
    ours = gradients(model, shared[rows.exists])
    plain = group_rewards(model, rows, shared=False, split=False)
    theirs = gradients(model, plain[rows.exists])
    spread = float(plain[rows.exists].detach().std())
    assert spread > 1e-4, "rewards that are all alike would show nothing"
    torch.testing.assert_close(shared, plain, rtol=0, atol=5e-3 * spread)
    for name, value in theirs.items():
        scale = float(value.norm()) + 1e-12
        assert float((ours[name] - value).norm()) <= 1e-2 * scale, name


SETS = [
    [(200, 30, 70, 50), (90, 120, 10), (300, 1, 40, 128)],
    [(500, 300), (20, 5, 9)],
    [(350, 35, 30), (120, 200, 180), (40, 40, 40), (700, 3, 90, 14, 60)],
]
"""Passes of several lengths: only the first two may compile anything."""


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_packed_equals_plain_in_fp32(attention):
    """One flat row and FlexAttention's block mask, for sequences alone without any."""
    model = reward_model("small", attention=attention)
    for shapes in SETS:
        rows = packed(shapes)
        flat = group_rewards(model, rows, shared=True, split=False, packed=True)
        ours = gradients(model, flat[rows.exists])
        model.config._attn_implementation = "sdpa"
        plain = group_rewards(model, rows, shared=False, split=False)
        theirs = gradients(model, plain[rows.exists])
        model.config._attn_implementation = attention
        spread = float(plain[rows.exists].detach().std())
        assert spread > 1e-4, "rewards that are all alike would show nothing"
        torch.testing.assert_close(flat, plain, rtol=0, atol=5e-3 * spread)
        for name, value in theirs.items():
            scale = float(value.norm()) + 1e-12
            assert float((ours[name] - value).norm()) <= 1e-2 * scale, name


@pytest.mark.parametrize("precision", ["autocast", "pure"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_equals_plain_in_bf16(precision, checkpointing):
    """As near to fp32 as the plain path, within a factor, rewards and gradients."""
    model = reward_model("small").train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    rows = packed(SETS[0])
    truth = group_rewards(model, rows, shared=False, split=False)
    exact = gradients(model, truth[rows.exists])
    if precision == "pure":
        model.bfloat16()
    found = {}
    for name, options in {
        "plain": {"shared": False},
        "packed": {"shared": True, "packed": True},
    }.items():
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "autocast"):
            rewards = group_rewards(model, rows, split=False, **options)
        off = float((rewards - truth).detach().norm())
        got = gradients(model, rewards[rows.exists])
        apart = sum(float((got[k].float() - v).norm()) ** 2 for k, v in exact.items()) ** 0.5
        found[name] = off, apart
    print(f"bf16 {precision}: off fp32 by (rewards, gradients) {found}")
    size = float(truth.detach().norm()), sum(float(v.norm()) ** 2 for v in exact.values()) ** 0.5
    for ours, theirs, scale in zip(found["packed"], found["plain"], size, strict=True):
        assert ours <= 3 * theirs + 1e-3 * scale
    with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "autocast"):
        assert sharing_obstacle(model, rows, packed=True) is None


@pytest.mark.skipif(DEVICE == "cpu", reason="reads a GPU's memory")
def test_a_packed_pass_makes_no_mask_of_all_tokens():
    """16,384 tokens: a T x T tensor of one byte an element would be 256 MiB."""
    model = reward_model("small", dtype=torch.bfloat16)
    rows = packed([(900, 70, 54)] * 16)
    from shiftrm.models.packed import flat_inputs, flatten

    flat = flatten(rows, multiple=128)
    flat_inputs(flat, model.config)  # compiles
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    mask = flat_inputs(flat, model.config)["attention_mask"]
    assert mask.shape[-2:] == (16384, 16384)
    assert torch.cuda.max_memory_allocated() - before < 64 * 2**20


@pytest.mark.parametrize("precision", ["autocast", "pure"])
def test_a_packed_metarm_step(make_trainer, precision, monkeypatch):
    monkeypatch.setattr("shiftrm.models.packed.PACKED_FROM", {DEVICE: 0})
    dtype = torch.bfloat16 if precision == "pure" else torch.float32
    trainer = make_trainer(
        reward_model("small", dtype=dtype),
        MetaRMTrainer,
        train=word_rows(60, 30, rows=16),
        bf16=precision == "autocast",
        per_device_train_batch_size=4,
        max_steps=4,
    )
    trainer.train()
    assert trainer._sharing is True
    assert trainer._packed is True
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 4
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("precision", ["autocast", "pure"])
def test_shared_equals_plain_in_bf16(precision):
    """As near as the plain path is to itself in fp32, within a factor."""
    model = reward_model()
    rows = packed([(200, 30, 70, 50), (90, 120, 10), (300, 1, 40, 128)])
    with torch.no_grad():
        truth = group_rewards(model, rows, shared=False, split=False)
        if precision == "pure":
            model.bfloat16()
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "autocast"):
            plain = group_rewards(model, rows, shared=False, split=False)
            shared = group_rewards(model, rows, shared=True, split=False)
            assert sharing_obstacle(model, rows) is None
    noise = float((plain - truth).norm())
    found = float((shared - truth).norm())
    print(f"bf16 {precision}: plain {noise:.2e}, shared {found:.2e} from fp32")
    assert found <= 3 * noise + 1e-4 * float(truth.norm())


def test_falcon_is_not_shared_in_bf16():
    from transformers import FalconConfig, FalconForSequenceClassification

    torch.manual_seed(0)
    made = FalconConfig(
        vocab_size=49152,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_labels=1,
        pad_token_id=0,
    )
    model = FalconForSequenceClassification(made).to(DEVICE, torch.bfloat16).eval()
    assert "position_ids" in sharing_obstacle(model, packed([(200, 30, 70), (90, 120, 10)]))


def forward_passes(model):
    """A list that grows by the rows of every pass through the model's backbone."""
    seen = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(len(args[0] if args else kwargs["input_ids"])),
        with_kwargs=True,
    )
    return seen


def test_a_gpu_that_is_not_full_makes_one_pass():
    model = reward_model(dtype=torch.bfloat16)
    rows = packed([(p, 35, 30) for p in (224, 180, 257, 301, 233, 275, 340, 199)])
    seen = forward_passes(model)
    with torch.no_grad():
        group_rewards(model, rows, shared=True, split=True)
    assert seen == [8]


@pytest.mark.skipif(DEVICE == "cpu", reason="times a GPU")
@pytest.mark.parametrize("lengths", ["short", "long"])
def test_splitting_as_decided_is_not_slower_than_one_pass(lengths):
    """What `cheap_split` assumes of a pass, measured; bounds what a mistake costs."""
    model = reward_model(dtype=torch.bfloat16).train()
    prompts = {"short": (224, 180, 257, 301, 233, 275, 340, 199), "long": (3500,) * 4 + (300,) * 8}
    rows = packed([(p, 40, 40) for p in prompts[lengths]])

    def milliseconds(split):
        times = []
        for _ in range(8):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            model.zero_grad(set_to_none=True)
            start.record()
            group_rewards(model, rows, shared=True, split=split).sum().backward()
            end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end))
        return sorted(times[2:])[2]

    parameters = sum(p.numel() for p in model.parameters())
    parts = cheap_split(rows.lengths.tolist(), parameters=parameters, device=DEVICE)
    whole, split = milliseconds(False), milliseconds(True)
    print(f"{lengths}: one pass {whole:.1f} ms, {len(parts)} parts {split:.1f} ms")
    assert split <= 1.2 * whole


@pytest.mark.parametrize("precision", ["autocast", "pure"])
def test_a_metarm_step(make_trainer, precision):
    dtype = torch.bfloat16 if precision == "pure" else torch.float32
    model = reward_model("small", dtype=dtype)
    before = {k: v.detach().clone() for k, v in model.named_parameters()}
    trainer = make_trainer(
        model,
        MetaRMTrainer,
        train=word_rows(60, 30, rows=8),
        bf16=precision == "autocast",
        preset="scale_free",
        deploy="base",
        learning_rate=1e-3,
        per_device_train_batch_size=4,
    )
    trainer.train()
    assert trainer._sharing is True
    logged = [entry for entry in trainer.state.log_history if "meta_objective" in entry]
    assert len(logged) == 2
    assert all(math.isfinite(entry["meta_influence"]) for entry in logged)
    assert any(not torch.equal(p, before[k]) for k, p in model.named_parameters())


@pytest.mark.parametrize("bf16", [True, False])
def test_a_ppo_step(tokenizer, bf16):
    from shiftrm.models.sampling import SamplingConfig
    from shiftrm.models.scoring import Scorer
    from shiftrm.policies.ppo import PPOConfig, PPOTrainer, Problem, make_critic

    actor = policy("small", vocabulary=len(tokenizer))
    before = {k: v.detach().clone() for k, v in actor.named_parameters()}
    trainer = PPOTrainer(
        Problem(
            actor,
            copy.deepcopy(actor),
            tokenizer,
            ["the red cat", "a small green bird"],
            Scorer(reward_model("small"), tokenizer),
        ),
        make_critic(actor),
        PPOConfig(
            steps=1,
            prompts_per_step=2,
            rollouts_per_prompt=4,
            minibatch_size=4,
            learning_rate=1e-4,
            bf16=bf16,
            sampling=SamplingConfig(max_new_tokens=12),
        ),
    )
    [log] = trainer.train()
    assert abs(log.kl) < 0.1, "the policy is its reference before the first update"
    assert math.isfinite(log.score_mean)
    assert any(not torch.equal(p, before[k]) for k, p in actor.named_parameters())
    assert all(p.isfinite().all() for p in actor.parameters())
