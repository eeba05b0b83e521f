"""OODPL's trainer: one step by hand, resuming, evaluation, logs, bad input."""

import logging

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from shiftrm.core import inner_curvature as curvature
from shiftrm.core.hypergradient import gradient_cosine
from shiftrm.errors import UserError
from shiftrm.models.scoring import Scorer
from shiftrm.oodpl.trainer import OODPLConfig, OODPLTrainer
from tests.conftest import llama_config
from tests.core.oracle import hypergradient, whole_unroll
from tests.oodpl.domains import make_domain, make_models, make_split

COMMON = {
    "max_steps": 1,
    "learning_rate": 0.5,
    "optim": "sgd",
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "inner_learning_rate": 0.05,
    "inner_steps": 2,
    "support_batch_size": 3,
    "query_batch_size": 2,
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
    "use_cpu": True,
}


@pytest.fixture
def make_trainer(tokenizer, tmp_path):
    """make(split, models, **config) -> trainer"""

    def make(split=None, models=None, **config):
        policy, reward_model = models or make_models()
        return OODPLTrainer(
            reward_model,
            policy,
            OODPLConfig(str(tmp_path / "out"), **{**COMMON, **config}),
            split=split or make_split(),
            processing_class=tokenizer,
            policy_processing_class=tokenizer,
        )

    return make


def options_of(args):
    names = ("inner_learning_rate", "beta", "normalize_weights", "reduction")
    return {name: getattr(args, name) for name in names}


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"domains_per_step": 3, "mixture": 2, "normalize_weights": True, "beta": 0.5},
        {"reduction": "mean", "micro_batch_size": 2},
    ],
)
def test_an_sgd_step_is_the_mean_gradient_by_autograd_through_the_whole_unroll(
    make_trainer, config
):
    trainer = make_trainer(**config)
    before = {n: p.detach().clone() for n, p in trainer.model.named_parameters()}
    policy_before = [p.detach().clone() for p in trainer.policy.parameters()]
    tasks = [
        trainer._plan.draw(trainer._sources, step=0, index=i)
        for i in range(trainer.args.domains_per_step)
    ]
    found = [
        whole_unroll(
            trainer.policy,
            trainer.model,
            task.inner_batches,
            task.outer_batch,
            **options_of(trainer.args),
        )
        for task in tasks
    ]
    trainer.train()
    for name, p in trainer.model.named_parameters():
        gradient = sum(g[name] for _, g in found) / len(found)
        torch.testing.assert_close(p, before[name] - 0.5 * gradient, rtol=1e-9, atol=1e-12)
    first = trainer.state.log_history[0]
    assert first["loss"] == pytest.approx(sum(loss for loss, _ in found) / len(found), abs=1e-6)
    squares = sum(
        float((sum(g[name] for _, g in found) / len(found)).pow(2).sum()) for name in before
    )
    assert first["hypergradient_norm"] == pytest.approx(squares**0.5)
    for p, kept in zip(trainer.policy.parameters(), policy_before, strict=True):
        assert torch.equal(p, kept), "the policy is as it was"


def test_logged_numbers(make_trainer):
    trainer = make_trainer(domains_per_step=2, log_cosine=True, inner_steps=3, beta=0.3)
    tasks = [trainer._plan.draw(trainer._sources, step=0, index=i) for i in range(2)]
    found = [
        hypergradient(
            trainer.policy,
            trainer.model,
            task.inner_batches,
            task.outer_batch,
            **options_of(trainer.args),
        )
        for task in tasks
    ]
    cheap = hypergradient(
        trainer.policy,
        trainer.model,
        tasks[0].inner_batches,
        tasks[0].outer_batch,
        curvature="none",
        **options_of(trainer.args),
    )
    trainer.train()
    log = trainer.state.log_history[0]
    rewards = torch.cat([r for f in found for r in f.rewards])
    assert log["reward_mean"] == pytest.approx(float(rewards.mean()))
    assert log["reward_std"] == pytest.approx(float(rewards.std(unbiased=False)))
    margins = torch.cat([f.margins for f in found])
    assert log["accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    weights = [w for f in found for w in f.weights]
    shares = [float(w.sum() ** 2 / (w * w).sum()) / 3 for w in weights]
    assert log["effective_sample_share"] == pytest.approx(sum(shares) / 6)
    cosine = gradient_cosine(found[0].gradients, cheap.gradients)
    assert log["hypergradient_cosine"] == pytest.approx(cosine)
    assert cosine < 0.9999


def test_evaluation_adapts_to_the_watched_domain_and_leaves_everything_as_it_was(make_trainer):
    split = make_split(
        source=(make_domain("cats"), make_domain("dogs")), validation=(make_domain("birds"),)
    )
    trainer = make_trainer(split, inner_learning_rate=0.3)
    metrics = trainer.evaluate()
    domain = trainer._watched[0]
    assert domain.name == "birds"

    # Two SGD steps on a copy, by hand.
    policy, _ = make_models()
    for batch in trainer._plan.support_of(domain, role="evaluate")[0]:
        rewards = trainer.model(batch.reward_input_ids, batch.reward_attention_mask).logits[:, 0]
        loss = 0.0
        for i in range(3):
            ids = batch.policy.input_ids[i][batch.policy.attention_mask[i].bool()]
            token = policy(ids[None]).logits[0, :-1].log_softmax(-1)[range(len(ids) - 1), ids[1:]]
            kept = batch.policy.response_mask[i, 1 : len(ids)].bool()
            loss = loss - rewards[i].detach().exp() * token[kept].sum() / 3
        gradients = torch.autograd.grad(loss, list(policy.parameters()))
        with torch.no_grad():
            for p, g in zip(policy.parameters(), gradients, strict=True):
                p -= 0.3 * g
    margins = torch.tensor([hand_margin(policy, pair) for pair in domain.eval_pairs])
    assert metrics["eval_accuracy"] == pytest.approx(float((margins > 0).float().mean()))
    assert metrics["eval_birds_accuracy"] == metrics["eval_accuracy"]
    assert metrics["eval_loss"] == pytest.approx(float(-F.logsigmoid(margins).mean()), rel=1e-5)
    reference = [hand_margin(trainer.policy, pair) > 0 for pair in domain.eval_pairs]
    assert metrics["eval_reference_accuracy"] == pytest.approx(sum(reference) / len(reference))
    assert trainer.evaluate() == metrics


def hand_margin(policy, pair):
    """log pi(y|x) - log pi(y'|x), word by word."""
    totals = []
    for ids, start in pair:
        with torch.no_grad():
            logs = policy(torch.tensor([ids])).logits[0].log_softmax(-1)
        totals.append(sum(float(logs[t - 1, ids[t]]) for t in range(start, len(ids))))
    return totals[0] - totals[1]


def test_a_resumed_run_ends_in_the_same_bits(make_trainer):
    config = {
        "max_steps": 4,
        "optim": "adamw_torch",
        "learning_rate": 1e-2,
        "lr_scheduler_type": "linear",
        "max_grad_norm": 0.01,
        "save_strategy": "steps",
        "save_steps": 2,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "domains_per_step": 2,
    }
    straight = make_trainer(**config)
    straight.train()
    resumed = make_trainer(**config)
    resumed.train(resume_from_checkpoint=straight.args.output_dir + "/checkpoint-2")
    start = dict(make_models()[1].named_parameters())
    for name, p in straight.model.named_parameters():
        assert torch.equal(p, dict(resumed.model.named_parameters())[name])
        assert not torch.equal(p, start[name])
    last = [[h for h in t.state.log_history if "loss" in h][-1] for t in (straight, resumed)]
    assert last[0] == last[1]


def test_folders_in_an_ordinary_reward_model_out(tokenizer, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "sft")
    tokenizer.save_pretrained(tmp_path / "sft")
    args = OODPLConfig(str(tmp_path / "out"), **{**COMMON, "max_steps": 2})
    folder = str(tmp_path / "sft")
    trainer = OODPLTrainer(folder, folder, args, split=make_split())
    trainer.train()
    trainer.save_model()
    texts = (["the red cat", "a dog"], [" runs", " sits the"])
    rewards = Scorer.from_pretrained(tmp_path / "out")(*texts)
    assert rewards == pytest.approx(Scorer(trainer.model, tokenizer)(*texts), abs=1e-6)
    model = LlamaForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.config.num_labels == 1


def test_fused_attention_is_switched_and_said_once(make_trainer, caplog):
    policy, reward_model = make_models()
    assert policy.config._attn_implementation == "sdpa"
    curvature.say_once.cache_clear()
    trainer = make_trainer(models=(policy, reward_model), max_steps=3)
    with caplog.at_level(logging.WARNING):
        trainer.train()
    assert [r.message for r in caplog.records].count(
        "math attention is used where the policy is differentiated twice"
    ) == 1
    assert policy.config._attn_implementation == "sdpa"


def test_activation_checkpointing_is_for_the_policy_too_and_changes_nothing(make_trainer):
    trained = []
    for wanted in (False, True):
        trainer = make_trainer(activation_checkpointing=wanted)
        trainer.train()
        for model in (trainer.policy, trainer.model):
            layers = [m for m in model.modules() if getattr(m, "gradient_checkpointing", False)]
            assert bool(layers) is wanted
        trained.append(trainer.model)
    for plain, checkpointed in zip(*(m.parameters() for m in trained), strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=1e-12, atol=1e-14)


def test_bf16_autocast_trains(make_trainer):
    policy, reward_model = make_models()
    trainer = make_trainer(models=(policy.float(), reward_model.float()), bf16=True)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    trainer.train()
    assert any(
        not torch.equal(a, b) for a, b in zip(before, trainer.model.parameters(), strict=True)
    )


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"beta": 0.0}, "beta is 0.0; it must be above 0"),
        ({"inner_learning_rate": -1.0}, "inner_learning_rate is -1.0; it must be above 0"),
        ({"inner_steps": 0}, "inner_steps is 0; it must be at least 1"),
        ({"max_steps": -1}, "max_steps is -1"),
        ({"curvature": "exakt"}, r"curvature is 'exakt'; did you mean 'exact'\?"),
        ({"last_steps": 3}, "last_steps is 3; it must be at most inner_steps, 2"),
        ({"per_device_train_batch_size": 4}, "set support_batch_size"),
        ({"gradient_accumulation_steps": 2}, "set domains_per_step"),
        ({"num_train_epochs": 1}, "num_train_epochs: training takes max_steps steps"),
        ({"label_names": ["margin"]}, "label_names: tasks have no label columns"),
        ({"mixture": 3, "query_batch_size": 2}, "mixture is 3, but query_batch_size is 2"),
        ({"torch_compile": True}, "torch_compile=True: gradients are taken through hooks"),
        ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: the bilevel losses have none"),
        (
            {"mixture": 4, "support_batch_size": 4, "query_batch_size": 4},
            "mixture is 4, but there are 3 source domains",
        ),
        ({"query_batch_size": 9}, "domain 'cats': 8 preference pairs, but a batch takes 9"),
        ({"support_batch_size": 9}, "domain 'cats': 8 fine-tuning rows, but a batch takes 9"),
        ({"max_length": 3}, "domain 'cats': 0 fine-tuning rows of at most 3 tokens"),
    ],
)
def test_bad_settings_are_named(make_trainer, config, message):
    with pytest.raises(UserError, match=message):
        make_trainer(**config)


def test_bad_splits_are_named(make_trainer):
    with pytest.raises(UserError, match="no held-out domain"):
        make_trainer(make_split(held_out=()))
    with pytest.raises(UserError, match="no source domain"):
        make_trainer(make_split(source=()))
    bare = make_split(validation=(make_domain("cats"),))
    object.__setattr__(bare.validation[0], "eval_pairs", ())
    with pytest.raises(UserError, match=r"no validation domain has eval_pairs\.jsonl"):
        make_trainer(bare, eval_strategy="steps", eval_steps=1)
    trainer = make_trainer(bare)
    with pytest.raises(UserError, match="nothing to evaluate on"):
        trainer.evaluate()


def test_weights_that_are_not_finite_stop_the_run_and_name_domain_and_row(make_trainer):
    trainer = make_trainer(beta=1e-4)
    with torch.no_grad():
        trainer.model.score.weight.mul_(100)
    task = trainer._plan.draw(trainer._sources, step=0, index=0)
    with pytest.raises(UserError, match=r"weight exp\(r/beta\) is not finite") as caught:
        trainer.train()
    assert str(caught.value).startswith(f"step 1, domain '{task.domains[0]}', fine-tuning row ")
    row = int(str(caught.value).split("fine-tuning row ")[1].split(":")[0])
    source = next(d for d in make_split().source if d.name == task.domains[0]).support[row - 1]
    reward = Scorer(trainer.model, trainer.processing_class)(
        [source["prompt"]], [source["response"]], finished=[source["finished"]]
    )[0]
    assert reward / 1e-4 > 700, "the row that is named is one whose weight overflows"


def test_an_evaluation_names_the_row_too_and_a_half_precision_policy_no_domain(make_trainer):
    trainer = make_trainer(beta=1e-4)
    with torch.no_grad():
        trainer.model.score.weight.mul_(100)
    with pytest.raises(UserError, match=r"^evaluation, domain '\w+', fine-tuning row \d: its weig"):
        trainer.evaluate()
    policy, reward_model = make_models()
    trainer = make_trainer(models=(policy.bfloat16(), reward_model))
    with pytest.raises(UserError, match=r"^step 1: the policy's trainable parameters are bfloat16"):
        trainer.train()


def test_a_diverged_inner_loop_stops_before_the_weights(make_trainer):
    trainer = make_trainer(inner_learning_rate=1e200)
    before = [p.detach().clone() for p in trainer.model.parameters()]
    with pytest.raises(UserError, match=r"step 1: the outer loss or its gradient is not finite"):
        trainer.train()
    for p, kept in zip(trainer.model.parameters(), before, strict=True):
        assert torch.equal(p, kept)
