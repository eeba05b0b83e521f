"""What changes memory or models but not the algorithm: portions, recomputing, bf16, LoRA."""

import copy
from contextlib import nullcontext

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from shiftrm.errors import UserError
from shiftrm.models.rewards import token_values
from shiftrm.models.sampling import SamplingConfig
from shiftrm.models.scoring import Scorer
from shiftrm.policies import ppo_update
from shiftrm.policies.ppo import PPOConfig, PPOTrainer, Problem, make_critic
from shiftrm.policies.ppo_update import recomputed_layers
from tests.conftest import llama_config
from tests.policies.test_ppo import make_gpt2, make_llama, make_tokenizer, make_trainer, share_of_a

SETTINGS = {
    "prompts": ("go", "on a b", "go on"),
    "steps": 3,
    "epochs": 2,
    "minibatch_size": 7,  # of 16 rows: portions of unequal lengths, and a last minibatch of 2
    "learning_rate": 1e-3,
    "critic_learning_rate": 1e-3,
    "max_grad_norm": 0.1,
}


def with_lora(policy, **options):
    """Adapters that do something from the start."""
    options = {"r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "v_proj"], **options}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = get_peft_model(policy, LoraConfig(task_type="CAUSAL_LM", **options))
        for name, p in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(p, std=0.3)
    return model


def train(policy, *, reference=None, critic=None, on_step=None, checkpoints=None, **settings):
    """Logs and trained weights by name."""
    settings = {**SETTINGS, **settings}
    shape = {"prompts_per_step": 4, "rollouts_per_prompt": 4}
    prompts = settings.pop("prompts")
    problem = Problem(policy, reference, make_tokenizer(), list(prompts), share_of_a)
    config = PPOConfig(sampling=SamplingConfig(max_new_tokens=6), **shape, **settings)
    trainer = PPOTrainer(problem, critic or make_critic(policy), config, on_step, checkpoints)
    logs = trainer.train()
    return logs, {
        (model, name): p.detach().clone()
        for model, trained in trainer._updater.trained.items()
        for name, p in trained.items()
    }


def assert_equal(ours, theirs, *, tolerance):
    assert ours.keys() == theirs.keys()
    for key, weight in ours.items():
        torch.testing.assert_close(weight, theirs[key], rtol=0, atol=tolerance, msg=str(key))


# Portions


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"]
)
@pytest.mark.parametrize("portions", [{"micro_batch_size": 2}, {"gradient_checkpointing": True}])
@pytest.mark.parametrize("make_model", [make_llama, make_gpt2])
def test_portions_and_recomputing_change_nothing(make_model, portions, dtype, tolerance):
    # Of single gradients; Adam divides by their size and so enlarges what is left of rounding.
    found = []
    for options in ({}, portions):
        policy = make_model().to(dtype)
        trainer = make_trainer(policy, **{**SETTINGS, **options})
        for optimizer in trainer._updater.optimizers.values():
            optimizer.step = lambda *args: None
        torch.nn.init.normal_(trainer.critic.score.weight, generator=torch.manual_seed(0))
        log, _ = trainer.step(1)
        models = (trainer.policy, trainer.critic)
        found.append(({n: p.grad for m in models for n, p in m.named_parameters()}, log))
    assert_equal(found[1][0], found[0][0], tolerance=tolerance)
    for name in ("policy_loss", "value_loss", "gradient_norm", "clip_fraction"):
        assert getattr(found[1][1], name) == pytest.approx(getattr(found[0][1], name), abs=1e-6)


def test_trainings_in_portions_end_at_the_same_weights():
    runs = {}
    for size in (None, 1, 3, 100):
        policy = make_llama().double()
        runs[size] = train(policy, reference=copy.deepcopy(policy), micro_batch_size=size)
    for size in (1, 3):
        assert_equal(runs[size][1], runs[None][1], tolerance=1e-9)
        assert runs[size][0][-1].kl == pytest.approx(runs[None][0][-1].kl, abs=1e-9)
    assert runs[100][0] == runs[None][0]


def test_recomputing_keeps_less_and_leaves_the_layers_as_they_were():
    policy, kept, gradients = make_llama(), {}, {}
    critic = make_critic(with_lora(make_llama()))
    for recomputing in (False, True):
        sizes = []

        def keep(tensor, sizes=sizes):
            sizes.append(tensor.numel())
            return tensor

        policy.zero_grad()
        with recomputed_layers(policy, critic) if recomputing else nullcontext():
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
                loss = policy(input_ids=torch.arange(11)[None]).logits.logsumexp(-1).sum()
            kept[recomputing] = sum(sizes)
            loss.backward()
        gradients[recomputing] = dict(enumerate(p.grad.clone() for p in policy.parameters()))
        assert "forward" not in vars(policy.model.layers[0])
    assert kept[True] < 0.5 * kept[False]
    assert_equal(gradients[True], gradients[False], tolerance=1e-6)
    with pytest.raises(UserError, match="Linear has no layers that can be recomputed"):
        recomputed_layers(torch.nn.Linear(1, 1)).__enter__()


def test_bf16_is_near_full_precision_and_keeps_fp32_weights():
    runs = {}
    for bf16 in (False, True):
        policy = make_llama(scale=4.0)
        runs[bf16] = train(policy, reference=copy.deepcopy(policy), bf16=bf16, steps=1)
        assert {p.dtype for p in policy.parameters()} == {torch.float32}
    assert runs[True][0][0].kl == 0.0, "policy and reference are rounded alike"
    assert runs[True][0][0].clip_fraction == pytest.approx(runs[False][0][0].clip_fraction, abs=0.1)
    for key, weight in runs[True][1].items():
        # Adam's steps are of the size of the learning rate: 6 of them, and nearly the same way.
        assert float((weight - runs[False][1][key]).abs().max()) < 6.1e-3
    policy = make_llama().bfloat16()
    with pytest.raises(UserError, match="the policy's are bfloat16; load it in float32"):
        train(policy, reference=policy, bf16=True)


def test_bf16_losses_and_logprobs_are_in_fp32(monkeypatch):
    seen = set()
    plain = ppo_update.clipped_policy_loss

    def spy(logprobs, *args, **options):
        loss, outside = plain(logprobs, *args, **options)
        seen.update({logprobs.dtype, loss.dtype, *(a.dtype for a in args[:2])})
        return loss, outside

    monkeypatch.setattr(ppo_update, "clipped_policy_loss", spy)
    policy = make_llama()
    calls = []
    policy.model.layers[0].mlp.gate_proj.register_forward_hook(
        lambda module, inputs, output: calls.append(output.dtype)
    )
    train(policy, reference=make_llama(), bf16=True, steps=1)
    assert seen == {torch.float32}
    assert set(calls) == {torch.bfloat16}, "sampling and passes"


# LoRA


def test_the_policy_without_its_adapter_is_the_reference():
    runs = []
    base = make_llama()
    for reference in (None, copy.deepcopy(base)):
        policy = with_lora(copy.deepcopy(base))
        runs.append(train(policy, reference=reference))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1], tolerance=0)
    assert runs[0][0][0].kl > 0.01
    with pytest.raises(UserError, match="no adapter to switch off; also give a reference model"):
        train(base)


@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2, "gradient_checkpointing": True}])
def test_only_the_adapters_and_the_head_are_trained(tmp_path, options):
    policy = with_lora(make_llama())
    critic = make_critic(policy)
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    train(policy, critic=critic, checkpoints=tmp_path, **options)
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    adapters = {n for n in before if "lora" in n}
    assert moved == adapters
    assert {n.split(".")[-2] for n in adapters} == {"default", "value"}
    assert float(critic.score.weight.detach().norm()) > 0
    assert policy.active_adapter == "default"
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == {
        n for n in adapters if ".default." in n
    }
    saved = load_file(tmp_path / "checkpoint-3" / "policy.safetensors")
    assert saved.keys() == {n for n in adapters if ".default." in n}
    saved = load_file(tmp_path / "checkpoint-3" / "critic.safetensors")
    assert len(saved) == len(adapters) // 2 + 1
    # Without the critic it is the policy it was made of, with one adapter.
    critic.remove()
    assert list(policy.peft_config) == ["default"]
    merged = policy.merge_and_unload()
    assert sum(p.numel() for p in merged.parameters()) == sum(
        p.numel() for p in make_llama().parameters()
    )


def test_the_adapter_critic_is_the_copied_critic_with_an_adapter():
    """Trained on one shared base, policy and critic go where separate copies go."""
    base = make_llama().double()
    runs = []
    for shared in (True, False):
        policy = with_lora(copy.deepcopy(base))
        critic = make_critic(policy)
        if not shared:
            host = with_lora(copy.deepcopy(base))
            critic = make_critic(host)  # the same seed: the same first factors
        runs.append(train(policy, critic=critic))
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1], tolerance=0)


def test_values_of_the_adapter_critic_are_its_own():
    policy = with_lora(make_llama())
    ids = torch.tensor([[2, 4, 5, 1], [3, 4, 0, 0]])
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    logits = policy(input_ids=ids, attention_mask=mask).logits
    critic = make_critic(policy)
    assert token_values(critic, ids, mask).tolist() == [[0.0] * 4] * 2
    with torch.no_grad():
        critic.score.weight.fill_(0.5)
    hidden = make_llama().model(input_ids=ids, attention_mask=mask).last_hidden_state
    # The new adapter begins as none, and the policy's has no part in the values.
    torch.testing.assert_close(token_values(critic, ids, mask), 0.5 * hidden.sum(-1))
    torch.nn.init.ones_(next(p for n, p in critic.named_parameters() if "lora_B" in n))
    assert not torch.allclose(token_values(critic, ids, mask), 0.5 * hidden.sum(-1))
    again = policy(input_ids=ids, attention_mask=mask).logits
    assert torch.equal(again, logits)
    with pytest.raises(UserError, match="the policy has the adapters default, value"):
        make_critic(policy)


def test_a_resumed_lora_run_is_as_if_never_stopped(tmp_path):
    class Killed(Exception):
        pass

    def kill(log, _):
        if log.step == 2:
            raise Killed

    straight = train(with_lora(make_llama()), kl_target=1.0)
    options = {"kl_target": 1.0, "checkpoints": tmp_path, "save_steps": 1}
    with pytest.raises(Killed):
        train(with_lora(make_llama()), on_step=kill, **options)
    resumed = train(with_lora(make_llama()), **options)
    assert resumed[0] == straight[0]
    assert_equal(resumed[1], straight[1], tolerance=0)
    with pytest.raises(UserError, match="frozen_models"):
        train(with_lora(make_llama(seed=3)), **options)


def test_layers_the_policy_trains_whole_are_not_the_critics():
    policy = with_lora(
        make_gpt2().eval(), target_modules=["c_attn"], fan_in_fan_out=True, modules_to_save=["ln_f"]
    )
    runs = []
    for reference in (None, make_gpt2()):
        whole = copy.deepcopy(policy)
        critic = make_critic(whole)
        runs.append(train(whole, reference=reference, critic=critic, gradient_checkpointing=True))
        critic.remove()
    assert runs[0][0] == runs[1][0]
    assert_equal(runs[0][1], runs[1][1], tolerance=0)
    trained = {key for key in runs[0][1] if "ln_f" in key[1]}
    assert {model for model, _ in trained} == {"policy"}
    assert len(trained) == 2


def test_a_bf16_base_with_fp32_adapters_trains():
    policy = with_lora(make_llama().bfloat16())
    assert {p.dtype for p in policy.parameters() if p.requires_grad} == {torch.float32}
    logs, weights = train(policy, bf16=True, micro_batch_size=4)
    assert len(logs) == 3
    assert {w.dtype for w in weights.values()} == {torch.float32}
    assert {p.dtype for n, p in policy.named_parameters() if "lora" not in n} == {torch.bfloat16}


# Memory, texts


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory"), RuntimeError("[DefaultCPUAllocator]")]
)
def test_out_of_memory_is_one_line_that_says_which_setting(monkeypatch, tmp_path, error):
    def fail(*args, **options):
        raise error

    again = "; the same command with that continues from the last checkpoint"
    for target, words in (
        ("ppo_update.clipped_policy_loss", "in an update; lower micro_batch_size (now all 7)"),
        ("rollouts.generate", "sampling; lower forward_batch_size (now 256)"),
        ("ppo_rows.Rows.logits", "in a pass without gradient; lower forward_batch_size"),
    ):
        for checkpoints, ending in ((None, ""), (tmp_path, again)):
            with monkeypatch.context() as patch:
                patch.setattr(f"shiftrm.policies.{target}", fail)
                trainer = make_trainer(checkpoints=checkpoints, **SETTINGS)
                with pytest.raises(UserError) as caught:
                    trainer.train()
            assert str(caught.value).startswith("step 1: out of memory")
            assert words in str(caught.value)
            assert str(caught.value).endswith(ending)
            assert ("continues" in str(caught.value)) == (checkpoints is not None)


def test_after_memory_ran_out_the_same_run_continues_with_smaller_portions(monkeypatch, tmp_path):
    settings = {**SETTINGS, "save_steps": 1, "checkpoints": tmp_path}
    with monkeypatch.context() as patch:
        plain, calls = ppo_update.clipped_policy_loss, []

        def fail_in_step_2(*args, **options):
            calls.append(None)
            if len(calls) > 6:
                raise torch.OutOfMemoryError("CUDA out of memory")
            return plain(*args, **options)

        patch.setattr(ppo_update, "clipped_policy_loss", fail_in_step_2)
        with pytest.raises(UserError, match="step 2: out of memory in an update"):
            make_trainer(make_llama(), **settings).train()
    logs = make_trainer(make_llama(), micro_batch_size=2, **settings).train()
    straight = make_trainer(make_llama(), **SETTINGS).train()
    assert [log.step for log in logs] == [1, 2, 3]
    assert logs[0] == straight[0]
    assert logs[2].policy_loss == pytest.approx(straight[2].policy_loss, abs=1e-3)


def test_chats_and_a_reward_model_of_another_tokenizer(tokenizer, policy):
    """The policy's tokens mean nothing to the reward model; texts and messages do."""
    theirs = make_tokenizer()  # other words, other ids
    theirs.chat_template = (
        "{% for m in messages %}{{ m['content'] + ' ' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ 'on ' }}{% endif %}"
    )
    theirs.unk_token = "<pad>"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = llama_config(vocabulary=len(theirs), num_labels=1, eos_token_id=1)
        scorer = Scorer(AutoModelForSequenceClassification.from_config(config), theirs)
    chats = [
        [{"role": "user", "content": "the red cat"}],
        [
            {"role": "system", "content": "a bird"},
            {"role": "user", "content": "the small dog runs"},
        ],
    ]
    seen = []

    def reward(prompts, responses, *, finished):
        seen.append((prompts, responses))
        return scorer(prompts, responses, finished=finished)

    trainer = PPOTrainer(
        Problem(policy, copy.deepcopy(policy), tokenizer, chats, reward),
        make_critic(policy),
        PPOConfig(
            steps=2,
            prompts_per_step=2,
            rollouts_per_prompt=3,
            sampling=SamplingConfig(max_new_tokens=5),
        ),
    )
    log, rollouts = trainer.step(1)
    assert {str(p) for p in rollouts.prompts} == {str(c) for c in chats}
    assert seen[0] == (rollouts.prompts, rollouts.responses)
    assert rollouts.rewards == scorer(
        rollouts.prompts, rollouts.responses, finished=rollouts.finished
    )
    for prompt, response, sample in zip(
        rollouts.prompts, rollouts.responses, rollouts.samples, strict=True
    ):
        text = tokenizer.apply_chat_template(prompt, tokenize=False, add_generation_prompt=True)
        assert sample.prompt_ids == tokenizer(text, add_special_tokens=False)["input_ids"]
        written = sample.response_ids[: -1 if sample.finished else None]
        # Special tokens inside an answer are part of it; the one that ended it is not.
        assert response.split() == [t for t in tokenizer.convert_ids_to_tokens(written) if t]
    assert log.score_mean == pytest.approx(sum(rollouts.rewards) / 6)
