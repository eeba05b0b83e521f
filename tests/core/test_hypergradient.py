"""The hypergradient against autograd through the whole unroll, in fp64, and its invariances."""

import gc
import logging

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from shiftrm.core.hypergradient import (
    InnerBatch,
    InnerProblem,
    InnerSettings,
    OuterBatch,
    Sequences,
    adapted_policy,
    gradient_cosine,
    preference_margins,
)
from shiftrm.core.inner_curvature import say_once
from shiftrm.errors import UserError
from shiftrm.models.rewards import sequence_rewards

from .oracle import (
    hypergradient,
    make_policy,
    make_problem,
    make_reward_model,
    relative_error,
    whole_unroll,
)

FAMILIES = ["llama", "qwen3", "gpt2", "gpt_neox"]
OPTIONS = {"inner_learning_rate": 0.005, "beta": 0.7}


def make_case(family, D, *, B=3, **changes):
    """Policy, reward model, inner batches and outer batch."""
    return make_policy(family, **changes), make_reward_model(), *make_problem(D, B=B)


def flat(gradients):
    return torch.cat([g.flatten() for g in gradients.values()])


def lora(policy):
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(3)
    transposed = type(policy).__name__.startswith("GPT2")
    config = LoraConfig(r=2, target_modules="all-linear", fan_in_fan_out=transposed)
    policy = get_peft_model(policy, config).double().eval()
    for name, p in policy.named_parameters():
        if "lora_B" in name:  # zero at the start, which would leave half of the products untested
            torch.nn.init.normal_(p, std=0.3)
    return policy


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("D", [1, 2, 3, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_exact_equals_the_whole_unroll(family, D, normalize):
    """Every parameter; padded rows of unequal lengths; the pad token also stands in sequences."""
    policy, reward_model, inner, outer = make_case(family, D)
    options = {**OPTIONS, "normalize_weights": normalize}
    loss, oracle = whole_unroll(policy, reward_model, inner, outer, **options)
    ours = hypergradient(policy, reward_model, inner, outer, **options)
    assert ours.outer_loss == pytest.approx(loss, rel=1e-12)
    assert ours.gradients.keys() == dict(reward_model.named_parameters()).keys()
    assert relative_error(ours.gradients, oracle) < 1e-10


@pytest.mark.parametrize("D", [2, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_finite_differences_are_close(family, D):
    policy, reward_model, inner, outer = make_case(family, D)
    _, oracle = whole_unroll(policy, reward_model, inner, outer, **OPTIONS)
    ours = hypergradient(
        policy, reward_model, inner, outer, curvature="finite_difference", **OPTIONS
    )
    assert relative_error(ours.gradients, oracle) < 1e-4
    single = hypergradient(
        policy.float(),
        reward_model.float(),
        inner,
        outer,
        curvature="finite_difference",
        **OPTIONS,
    )
    error = flat(single.gradients).double() - flat(oracle)
    assert error.norm() < 1e-3 * flat(oracle).norm()


@pytest.mark.parametrize("family", FAMILIES)
def test_without_curvature_one_step_is_exact_and_more_are_not(family):
    policy, reward_model = make_policy(family), make_reward_model()
    for D, exact in ((1, True), (3, False)):
        inner, outer = make_problem(D)
        _, oracle = whole_unroll(policy, reward_model, inner, outer, **OPTIONS)
        ours = hypergradient(policy, reward_model, inner, outer, curvature="none", **OPTIONS)
        assert (relative_error(ours.gradients, oracle) < 1e-10) is exact
        if not exact:  # but it points the same way, more or less
            assert 0.3 < gradient_cosine(ours.gradients, oracle) < 0.99999


@pytest.mark.parametrize("last", [1, 2, 3])
def test_truncation_equals_an_unroll_whose_earlier_steps_are_detached(last):
    case = make_case("llama", 4)
    options = {**OPTIONS, "normalize_weights": True}
    _, oracle = whole_unroll(*case, detach_before=4 - last, **options)
    ours = hypergradient(*case, last_steps=last, **options)
    assert relative_error(ours.gradients, oracle) < 1e-10
    assert [bool(g.any()) for g in ours.reward_gradients] == [False] * (4 - last) + [True] * last


@pytest.mark.parametrize("curvature", ["exact", "finite_difference"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_lora_policy(family, curvature):
    policy, reward_model = lora(make_policy(family)), make_reward_model()
    inner, outer = make_problem(3)
    _, oracle = whole_unroll(policy, reward_model, inner, outer, **OPTIONS)
    ours = hypergradient(
        policy, reward_model, inner, outer, curvature=curvature, return_adapted=True, **OPTIONS
    )
    assert relative_error(ours.gradients, oracle) < (1e-10 if curvature == "exact" else 1e-4)
    assert all("lora_" in name for name in ours.adapted)  # only these move


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_tied_embeddings(family):
    policy, reward_model = make_policy(family, tie_word_embeddings=True), make_reward_model()
    assert policy.get_input_embeddings().weight is policy.get_output_embeddings().weight
    inner, outer = make_problem(3)
    _, oracle = whole_unroll(policy, reward_model, inner, outer, **OPTIONS)
    ours = hypergradient(policy, reward_model, inner, outer, **OPTIONS)
    assert relative_error(ours.gradients, oracle) < 1e-10


def test_tied_embeddings_with_pad_inside_sequences_have_no_finite_difference():
    policy = make_policy("llama", tie_word_embeddings=True)
    arguments = (policy, make_reward_model(), *make_problem(2))
    with pytest.raises(UserError, match="padding_idx = None"):
        hypergradient(*arguments, curvature="finite_difference", **OPTIONS)
    policy.get_input_embeddings().padding_idx = None
    _, oracle = whole_unroll(*arguments, **OPTIONS)
    ours = hypergradient(*arguments, curvature="finite_difference", **OPTIONS)
    assert relative_error(ours.gradients, oracle) < 1e-4


@pytest.mark.parametrize("family", ["opt", "qwen3_moe"])
def test_differences_across_jumps_of_the_policys_gradient_are_refused(family):
    """In fp32 they were wrong by twice the true gradient (ReLU), and by up to 4 times (experts)."""
    policy, reward_model = make_policy(family).float(), make_reward_model().float()
    inner, outer = make_problem(2)
    with pytest.raises(UserError, match=r"whose gradient jumps.*use curvature='exact'"):
        hypergradient(policy, reward_model, inner, outer, curvature="finite_difference", **OPTIONS)
    if family == "opt":
        policy, reward_model = make_policy(family), make_reward_model()
        _, oracle = whole_unroll(policy, reward_model, inner, outer, **OPTIONS)
        ours = hypergradient(policy, reward_model, inner, outer, **OPTIONS)
        assert relative_error(ours.gradients, oracle) < 1e-10


@pytest.mark.parametrize("curvature", ["exact", "finite_difference", "none"])
def test_mixture_of_experts_without_gates(curvature):
    """Its router computes in fp32, hence the tolerance. The norm is taken over all parameters."""
    case = make_case("qwen3_moe", 2 if curvature != "none" else 1)
    _, oracle = whole_unroll(*case, **OPTIONS)
    ours = hypergradient(*case, curvature=curvature, **OPTIONS)
    error = flat(ours.gradients) - flat(oracle)
    assert error.norm() < 1e-3 * flat(oracle).norm()


def test_mean_over_tokens_and_a_frozen_part():
    policy, reward_model = make_policy("qwen3"), make_reward_model()
    policy.model.layers[0].requires_grad_(False)
    reward_model.model.requires_grad_(False)
    inner, outer = make_problem(3)
    options = {**OPTIONS, "inner_learning_rate": 0.05, "reduction": "mean"}
    _, oracle = whole_unroll(policy, reward_model, inner, outer, **options)
    ours = hypergradient(policy, reward_model, inner, outer, **options)
    assert set(ours.gradients) == {"score.weight"}
    assert relative_error(ours.gradients, oracle) < 1e-10


@pytest.mark.parametrize("curvature", ["exact", "finite_difference", "none"])
def test_micro_batches_change_nothing(curvature):
    case = make_case("llama", 3, B=5)
    options = {**OPTIONS, "normalize_weights": True, "curvature": curvature}
    whole = hypergradient(*case, curvature_micro_batch_size=5, **options)
    for size in (1, 2, 5):
        parts = hypergradient(*case, micro_batch_size=size, **options)
        assert relative_error(parts.gradients, whole.gradients) < 1e-8
        torch.testing.assert_close(parts.margins, whole.margins)
        assert parts.inner_losses == pytest.approx(whole.inner_losses)


def test_order_and_padding_change_nothing():
    policy, reward_model, inner, outer = make_case("gpt2", 3, B=4)

    def pad(sequences, columns=3):
        ids, attention, response = (torch.nn.functional.pad(t, (0, columns)) for t in sequences)
        ids[:, -columns:] = 7  # what stands in padding is of no consequence
        return Sequences(ids, attention, response)

    def shuffled(batch: InnerBatch) -> InnerBatch:
        order = torch.tensor([2, 0, 3, 1])
        policy_rows = Sequences(*(t[order] for t in pad(batch.policy)))
        return InnerBatch(
            policy_rows,
            torch.nn.functional.pad(batch.reward_input_ids, (0, 2), value=5)[order],
            torch.nn.functional.pad(batch.reward_attention_mask, (0, 2))[order],
        )

    plain = hypergradient(policy, reward_model, inner, outer, **OPTIONS)
    other = hypergradient(
        policy,
        reward_model,
        [shuffled(b) for b in inner],
        OuterBatch(*(Sequences(*(t.flip(0) for t in pad(side))) for side in outer)),
        **OPTIONS,
    )
    assert relative_error(other.gradients, plain.gradients) < 1e-9
    torch.testing.assert_close(other.margins.flip(0), plain.margins)


def test_models_are_left_as_they_were():
    policy, reward_model = make_policy("gpt2").float(), make_reward_model().float()
    policy.train()
    reward_model.train()
    policy.transformer.wte.weight.grad = torch.ones_like(policy.transformer.wte.weight)
    before = {k: v.clone() for m in (policy, reward_model) for k, v in m.state_dict().items()}
    inner, outer = make_problem(3)
    for curvature in ("exact", "finite_difference", "none"):
        hypergradient(policy, reward_model, inner, outer, curvature=curvature, **OPTIONS)

    broken = [*inner[:2], replace_ids(inner[2], 10**6)]
    with pytest.raises(IndexError):
        hypergradient(policy, reward_model, broken, outer, **OPTIONS)

    for module in (policy, reward_model):
        assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
        assert all(m.training for m in module.modules())
        assert not any(m._forward_hooks for m in module.modules())
        assert all(p.requires_grad for p in module.parameters())
    assert bool((policy.transformer.wte.weight.grad == 1).all())
    assert all(p.grad is None for p in reward_model.parameters())


def replace_ids(batch, word):
    ids = batch.policy.input_ids.clone()
    ids[0, 1] = word
    return batch._replace(policy=batch.policy._replace(input_ids=ids))


def test_what_is_returned():
    policy, reward_model, inner, outer = make_case("llama", 2)
    result = hypergradient(policy, reward_model, inner, outer, return_adapted=True, **OPTIONS)
    for rewards, weights in zip(result.rewards, result.weights, strict=True):
        torch.testing.assert_close(weights, torch.exp(rewards / 0.7))
    assert result.accuracy == float((result.margins > 0).double().mean())
    by_hand = [float(w.sum() ** 2 / w.pow(2).sum()) for w in result.weights]
    assert result.effective_sample_size == pytest.approx(by_hand)
    problem = InnerProblem(policy, reward_model, inner, sequence_rewards)
    with adapted_policy(problem, InnerSettings(**OPTIONS)) as run:
        for name, p in policy.named_parameters():
            assert torch.equal(p, result.adapted[name])
        torch.testing.assert_close(preference_margins(policy, outer), result.margins)
        assert run.inner_losses == result.inner_losses
    assert not torch.equal(policy.lm_head.weight, result.adapted["lm_head.weight"])


def test_reward_gradients_by_finite_difference_of_the_rewards():
    """dL/dr of one example, from the outer loss after its weight is changed by hand."""
    policy, reward_model, inner, outer = make_case("gpt_neox", 2)
    result = hypergradient(policy, reward_model, inner, outer, normalize_weights=True, **OPTIONS)

    def loss(shift):
        theta = {n: p.detach().clone().requires_grad_() for n, p in policy.named_parameters()}
        for t, batch in enumerate(inner):
            rewards = result.rewards[t].clone()
            if t == 0:
                rewards[1] += shift
            weights = torch.softmax(rewards / 0.7, 0) * len(rewards)
            logits = torch.func.functional_call(
                policy, theta, (), {"input_ids": batch.policy.input_ids, "use_cache": False}
            ).logits.log_softmax(-1)
            token = logits[:, :-1].gather(-1, batch.policy.input_ids[:, 1:, None])[..., 0]
            ll = (token * batch.policy.response_mask[:, 1:]).sum(1)
            gradient = torch.autograd.grad(-(weights * ll).mean(), list(theta.values()))
            theta = {
                n: (p - 0.005 * g).detach().requires_grad_()
                for (n, p), g in zip(theta.items(), gradient, strict=True)
            }
        margins = torch.func.functional_call(_Margins(policy), prefixed(theta), (outer,))
        return -torch.nn.functional.logsigmoid(margins).mean().item()

    numeric = (loss(1e-4) - loss(-1e-4)) / 2e-4
    assert result.reward_gradients[0][1].item() == pytest.approx(numeric, rel=1e-5)


class _Margins(torch.nn.Module):
    def __init__(self, policy):
        super().__init__()
        self.policy = policy

    def forward(self, outer):
        return preference_margins(self.policy, outer)


def prefixed(theta):
    return {f"policy.{n}": p for n, p in theta.items()}


def test_fused_attention_equals_math_attention():
    """First-order passes run under whatever kernel the policy has."""
    policy, reward_model = make_policy("llama").float(), make_reward_model().float()
    inner, outer = make_problem(3)
    for curvature in ("exact", "finite_difference"):
        fused = hypergradient(policy, reward_model, inner, outer, curvature=curvature, **OPTIONS)
        with sdpa_kernel(SDPBackend.MATH):
            plain = hypergradient(
                policy, reward_model, inner, outer, curvature=curvature, **OPTIONS
            )
        assert gradient_cosine(fused.gradients, plain.gradients) > 1 - 1e-5


def test_math_attention_is_used_where_needed_and_said_once(caplog):
    policy, reward_model = make_policy("llama"), make_reward_model()
    say_once.cache_clear()
    with caplog.at_level(logging.INFO):
        hypergradient(policy, reward_model, *make_problem(1), **OPTIONS)
        assert not caplog.records  # one step needs no second derivative
        for _ in range(2):
            hypergradient(policy, reward_model, *make_problem(2), **OPTIONS)
    assert [r.message for r in caplog.records].count(
        "math attention is used where the policy is differentiated twice"
    ) == 1


class _Fused(torch.autograd.Function):
    """Stands for a kernel from outside torch: values of sdpa, and no second derivative."""

    @staticmethod
    def forward(ctx, query, key, value, mask, scale):
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return torch.nn.functional.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, scale=scale
        )

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, gradient):
        *inputs, mask = ctx.saved_tensors
        with torch.enable_grad():
            inputs = [x.detach().requires_grad_() for x in inputs]
            output = torch.nn.functional.scaled_dot_product_attention(
                *inputs, attn_mask=mask, scale=ctx.scale
            )
            return *torch.autograd.grad(output, inputs, gradient), None, None


@pytest.fixture
def fused_kernel():
    """A registered attention with a name of its own; counts its calls."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    calls = []

    def attention(module, query, key, value, attention_mask, scaling=None, **_):
        calls.append(len(query))
        groups = query.shape[1] // key.shape[1]
        key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        T = query.shape[2]
        causal = torch.ones(T, T, dtype=torch.bool).tril()
        mask = causal if attention_mask is None else attention_mask
        return _Fused.apply(query, key, value, mask, scaling).transpose(1, 2), None

    AttentionInterface.register("fused_test", attention)
    AttentionMaskInterface.register("fused_test", ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    return calls


@pytest.mark.parametrize("outcome", ["done", "interrupted"])
def test_a_kernel_from_outside_torch_is_left_where_it_has_no_second_derivative(
    fused_kernel, outcome, caplog
):
    policy, reward_model, inner, outer = make_case("llama", 3)
    _, oracle = whole_unroll(policy, reward_model, inner, outer, **OPTIONS)
    policy.config._attn_implementation = "fused_test"
    say_once.cache_clear()
    if outcome == "interrupted":

        def stop(*_):
            if policy.config._attn_implementation == "sdpa":
                raise KeyboardInterrupt

        handle = policy.lm_head.register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            hypergradient(policy, reward_model, inner, outer, **OPTIONS)
        handle.remove()
    else:
        ours = hypergradient(policy, reward_model, inner, outer, **OPTIONS)
        assert relative_error(ours.gradients, oracle) < 1e-10
        # Three inner steps, the outer loss, and the products at theta_0: two layers each.
        assert len(fused_kernel) == 2 * (3 + 1 + 1)
        assert [r.message for r in caplog.records].count(
            "math attention is used where the policy is differentiated twice"
        ) == 1
    assert policy.config._attn_implementation == "fused_test"


def test_no_graph_is_held_across_steps():
    """What backward passes keep, at its peak: the same for 2 steps and for 6."""
    policy, reward_model, inner, outer = make_case("llama", 1)
    peaks = {}
    for D in (2, 6):
        live, peak = [0], [0]

        def pack(tensor, live=live, peak=peak):
            size = tensor.numel() * tensor.element_size()
            live[0] += size
            peak[0] = max(peak[0], live[0])
            return _Packed(tensor, lambda: live.__setitem__(0, live[0] - size))

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda packed: packed.tensor):
            hypergradient(policy, reward_model, inner * D, outer, **OPTIONS)
        gc.collect()
        assert live[0] == 0
        peaks[D] = peak[0]
    assert peaks[6] == peaks[2]


class _Packed:
    def __init__(self, tensor, gone):
        self.tensor, self.gone = tensor, gone

    def __del__(self):
        self.gone()


def test_products_by_differences_from_parameters_that_are_all_zero():
    """As where LoRA's B alone is trained, from its start."""
    policy = lora(make_policy("llama"))
    for name, p in policy.named_parameters():
        p.requires_grad_("lora_B" in name)
        if p.requires_grad:
            torch.nn.init.zeros_(p)
    reward_model = make_reward_model()
    inner, outer = make_problem(3)
    last = {**OPTIONS, "last_steps": 3}
    exact = hypergradient(policy, reward_model, inner, outer, **last)
    ours = hypergradient(policy, reward_model, inner, outer, curvature="finite_difference", **last)
    assert relative_error(ours.gradients, exact.gradients) < 1e-4


@pytest.mark.parametrize("curvature", ["exact", "finite_difference", "none"])
def test_gradient_checkpointing(curvature):
    policy, reward_model, inner, outer = make_case("gpt2", 3)
    plain = hypergradient(policy, reward_model, inner, outer, curvature=curvature, **OPTIONS)
    calls = count_calls(policy.transformer.h[0])
    for model in (policy, reward_model):
        model.activation_checkpointing_enable()
    before = calls()
    saved = hypergradient(policy, reward_model, inner, outer, curvature=curvature, **OPTIONS)
    assert relative_error(saved.gradients, plain.gradients) < 1e-12
    assert calls() > before  # it did recompute, though the models are in evaluation mode
    policy.activation_checkpointing_enable({"use_reentrant": True})
    with pytest.raises(UserError, match="the policy checkpoints activations with use_reentrant"):
        hypergradient(policy, reward_model, inner, outer, **OPTIONS)


def count_calls(layer):
    """How often the parts of a layer ran."""
    count = [0]
    layer.ln_1.register_forward_hook(lambda *_: count.__setitem__(0, count[0] + 1))
    return lambda: count[0]


def test_dropout_is_off():
    policy, reward_model, inner, outer = make_case("gpt2", 2, resid_pdrop=0.5, attn_pdrop=0.5)
    oracle = hypergradient(policy, reward_model, inner, outer, **OPTIONS).gradients
    policy.train()
    ours = hypergradient(policy, reward_model, inner, outer, **OPTIONS).gradients
    assert relative_error(ours, oracle) == 0
    policy.activation_checkpointing_enable()
    ours = hypergradient(
        policy, reward_model, inner, outer, curvature="finite_difference", **OPTIONS
    ).gradients
    assert relative_error(ours, oracle) < 1e-4


@pytest.mark.parametrize("curvature", ["exact", "finite_difference", "none"])
def test_bf16_autocast(curvature):
    """fp32 weights, bf16 passes: it must point where fp32 points, at milder curvature."""
    policy, reward_model = make_policy("llama").float(), make_reward_model().float()
    with torch.no_grad():
        for p in policy.parameters():
            p.mul_(0.3 if p.dim() > 1 else 1.0)
    inner, outer = make_problem(3)
    options = {**OPTIONS, "curvature": curvature}
    single = hypergradient(policy, reward_model, inner, outer, **options)
    before = {k: v.clone() for k, v in policy.state_dict().items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = hypergradient(policy, reward_model, inner, outer, **options)
        assert torch.is_autocast_enabled("cpu")
    assert all(g.dtype == torch.float32 for g in half.gradients.values())
    cosine = gradient_cosine(half.gradients, single.gradients)
    assert cosine > 0.99
    assert cosine < 1  # it was bf16
    assert all(torch.equal(v, before[k]) for k, v in policy.state_dict().items())


def test_a_trajectory_kept_elsewhere():
    case = make_case("llama", 2)
    plain = hypergradient(*case, **OPTIONS)
    moved = hypergradient(*case, trajectory_device=torch.device("cpu"), **OPTIONS)
    assert relative_error(moved.gradients, plain.gradients) == 0


def bad_weight(inner):
    return {"inner_batches": inner, "beta": 1e-6}


def no_weight(inner):
    """exp underflows for all of them: nothing would be learnt, and nothing said."""
    return {"inner_batches": inner, "beta": 1e-7, "reward_model": make_disliking_model()}


def make_disliking_model():
    """A reward of -1 for everything: the head reads ones."""
    model = make_reward_model()
    model.model.norm.forward = torch.ones_like
    with torch.no_grad():
        model.score.weight.fill_(-1 / model.score.weight.shape[1])
    return model


def left_padded(inner):
    mask = inner[1].policy.attention_mask.flip(1)
    broken = inner[1]._replace(policy=inner[1].policy._replace(attention_mask=mask))
    return {"inner_batches": [inner[0], broken]}


def no_response(inner):
    mask = inner[1].policy.response_mask.clone()
    mask[2] = 0
    broken = inner[1]._replace(policy=inner[1].policy._replace(response_mask=mask))
    return {"inner_batches": [inner[0], broken]}


def other_size(inner):
    return {"inner_batches": [inner[0]._replace(reward_input_ids=inner[0].reward_input_ids[:2])]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (bad_weight, r"inner batch 0, example \d: its weight exp\(r/beta\) is not finite"),
        (no_weight, "inner batch 0, example 0: its weight .* of the whole batch are 0 in float64"),
        (left_padded, "inner batch 1, example 1: pad on the right"),
        (no_response, "inner batch 1, example 2: it has no response token"),
        (other_size, "inner batch 0: reward_input_ids"),
        (lambda _: {"inner_batches": []}, "no inner batch"),
        (lambda _: {"beta": 0.0}, "beta is 0.0"),
        (lambda _: {"inner_learning_rate": -1.0}, "inner_learning_rate is -1.0"),
        (lambda _: {"curvature": "some"}, "curvature is 'some'"),
        (lambda _: {"last_steps": 3}, "between 1 and D = 2"),
        (lambda _: {"last_steps": 0}, "between 1 and D = 2"),
        (lambda _: {"micro_batch_size": 0}, "micro_batch_size is 0"),
        (lambda _: {"finite_difference_step": -1.0}, "finite_difference_step is -1.0"),
        (lambda _: {"reduction": "max"}, "reduction is 'max'"),
    ],
)
def test_bad_input(change, message):
    policy, reward_model, inner, outer = make_case("llama", 2)
    before = policy.lm_head.weight.clone()
    arguments = {"inner_batches": inner, "outer_batch": outer, **OPTIONS, **change(inner)}
    reward_model = arguments.pop("reward_model", reward_model)
    with pytest.raises(ValueError, match=message):
        hypergradient(policy, reward_model, **arguments)
    assert torch.equal(policy.lm_head.weight, before)


def test_models_that_cannot_be_used():
    policy, reward_model = make_policy("llama"), make_reward_model()
    problem = make_problem(1)
    with pytest.raises(UserError, match="trainable parameters are bfloat16"):
        hypergradient(make_policy("llama").bfloat16(), reward_model, *problem, **OPTIONS)
    with pytest.raises(ValueError, match="share trainable parameters"):
        hypergradient(policy, policy, *problem, **OPTIONS)
    reward_model.requires_grad_(False)
    with pytest.raises(ValueError, match="reward model has no trainable"):
        hypergradient(policy, reward_model, *problem, **OPTIONS)
    policy.requires_grad_(False)
    with pytest.raises(ValueError, match="policy has no trainable"):
        hypergradient(policy, make_reward_model(), *problem, **OPTIONS)
