"""The trainers of ocrm, bsr, grm and self_labelled: their gradients against plain autograd."""

import copy

import pytest
import torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import LlamaForCausalLM

from shiftrm.core.losses import off_policy_weights
from shiftrm.data.pairs import check_pair, read_pairs
from shiftrm.errors import UserError
from shiftrm.files import write_jsonl
from shiftrm.models.rendering import encode
from shiftrm.models.scoring import Scorer
from shiftrm.trainers.bsr import BSRConfig, BSRTrainer
from shiftrm.trainers.contrast import ContrastConfig, ContrastTrainer
from shiftrm.trainers.grm import GRMConfig, GRMTrainer, LanguageHead
from shiftrm.trainers.ocrm import OCRMConfig, OCRMTrainer, pair_weights
from shiftrm.trainers.reward import RewardConfig, RewardTrainer
from shiftrm.trainers.self_labelled import (
    SelfLabelledConfig,
    SelfLabelledTrainer,
    best_and_worst,
)
from tests.conftest import llama_config
from tests.models.test_likelihoods import by_hand
from tests.trainers.test_short_batches import Gradients

CONSTANT = {"max_steps": -1, "num_train_epochs": 1, "learning_rate": 0.0, "max_length": None}


def gradients_of(cls, config_class, model, rows, options, tokenizer, *, more=None, **config):
    """The gradients of one epoch and the trainer."""
    found = Gradients()
    args = config_class(**{**options, **CONSTANT, **config})
    extra = {"train_dataset": Dataset.from_list(rows), "callbacks": [found], **(more or {})}
    if not isinstance(model, str):
        model, extra["processing_class"] = copy.deepcopy(model).double(), tokenizer
    trainer = cls(model, args, **extra)
    if isinstance(model, str):
        trainer.model.double()
    trainer.train()
    return found.found, trainer


def plain_rewards(model, tokenizer, rows):
    """Rewards [B, 2], every sequence alone."""

    def one(row, side):
        finished = row.get(f"{side}_finished", True)
        ids = torch.tensor([encode(tokenizer, row["prompt"], row[side], finished=finished)])
        return model.score(model.model(input_ids=ids).last_hidden_state[0, -1])[0]

    return torch.stack([torch.stack([one(r, s) for s in ("chosen", "rejected")]) for r in rows])


def gradient_of(loss, model):
    found = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.flatten() for g in found])


# -- weights -------------------------------------------------------------------------------------


def test_a_pairs_weight_is_a_factor_of_its_loss(reward_model, pairs, options, tokenizer):
    weights = [0.0, 2.5, 1.0, 0.5]
    rows = [{**row, "weight": w} for row, w in zip(pairs[:4], weights, strict=True)]
    for micro, steps in ((4, 1), (2, 2), (3, 2)):
        [found], trainer = gradients_of(
            RewardTrainer, RewardConfig, reward_model, rows, options, tokenizer,
            per_device_train_batch_size=micro, gradient_accumulation_steps=steps,
        )  # fmt: skip
        model = copy.deepcopy(reward_model).double()
        rewards = plain_rewards(model, tokenizer, rows)
        losses = -F.logsigmoid(rewards[:, 0] - rewards[:, 1]) * torch.tensor(weights).double()
        torch.testing.assert_close(found, gradient_of(losses.mean(), model))
        logged = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
        assert logged == pytest.approx(losses.mean().item(), rel=1e-6)


@pytest.mark.parametrize("weight", [-0.1, "1", True, float("nan"), float("inf")])
def test_bad_weights_are_refused(tmp_path, weight):
    row = {"prompt": "a", "chosen": "b", "rejected": "c", "weight": weight}
    with pytest.raises(UserError, match=r"row 3: column 'weight' is .*; expected a number from 0"):
        check_pair(row, "row 3")
    good = [{**row, "weight": 1.0}, {"prompt": "a", "chosen": "b", "rejected": "c"}]
    write_jsonl(tmp_path / "some.jsonl", good)
    with pytest.raises(UserError, match="column 'weight' is missing, but given at"):
        read_pairs(tmp_path / "some.jsonl")


# -- ocrm ----------------------------------------------------------------------------------------


@pytest.fixture
def policies(tmp_path, tokenizer):
    """Folders of two policies with different weights."""
    for seed, name in ((0, "sft"), (1, "today")):
        torch.manual_seed(seed)
        LlamaForCausalLM(llama_config(initializer_range=0.3)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    return str(tmp_path / "today"), str(tmp_path / "sft")


OCRM_ROWS = [
    {"prompt": "the red cat", "chosen": " runs", "rejected": " sits the fish"},
    {"prompt": "a dog", "chosen": " flies a blue bird", "rejected": " swims"},
    {"prompt": "the", "chosen": " cat", "rejected": " dog runs"},
]
FLAGS = {"chosen_finished": True, "rejected_finished": False}


def test_ocrms_weights_come_from_both_policies(policies, tokenizer):
    today, sft = policies
    rows = [{**row, **FLAGS} for row in OCRM_ROWS]
    found = pair_weights(rows, today, sft, alpha=0.2, scale=0.3, batch_size=2)
    likelihood = {}
    for path in policies:
        model = LlamaForCausalLM.from_pretrained(path).eval()
        likelihood[path] = torch.tensor(
            [
                [
                    by_hand(
                        model,
                        encode(tokenizer, row["prompt"], row[side], finished=done),
                        len(row[side].split()) + done,
                    )
                    for side, done in (("chosen", True), ("rejected", False))
                ]
                for row in rows
            ],
            dtype=torch.float64,
        )
    expected = off_policy_weights(likelihood[today], likelihood[sft], alpha=0.2, scale=0.3)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.max() - found.min() > 0.1
    closed = pair_weights(OCRM_ROWS, today, sft, alpha=0.2, scale=0.3)
    assert not torch.allclose(closed, found, atol=1e-3), "an unfinished response has no EOS"
    assert torch.allclose(
        pair_weights(rows, sft, sft, alpha=0.1, scale=1.0), torch.ones(3).double()
    )


def test_ocrm_trains_on_weighted_pairs(policies, reward_model, options, tokenizer):
    today, sft = policies
    models = {"policy": today, "reference": sft}
    [found], trainer = gradients_of(
        OCRMTrainer, OCRMConfig, reward_model, OCRM_ROWS, options, tokenizer,
        more=models, ocrm_scale=0.3, ocrm_alpha=0.2,
    )  # fmt: skip
    weights = pair_weights(OCRM_ROWS, today, sft, alpha=0.2, scale=0.3)
    model = copy.deepcopy(reward_model).double()
    rewards = plain_rewards(model, tokenizer, OCRM_ROWS)
    loss = (weights * -F.logsigmoid(rewards[:, 0] - rewards[:, 1])).mean()
    torch.testing.assert_close(found, gradient_of(loss, model), rtol=1e-5, atol=1e-7)
    share = float(weights.sum() ** 2 / (weights**2).sum()) / 3
    [logged] = [log for log in trainer.state.log_history if "loss" in log]
    assert logged["effective_sample_share"] == pytest.approx(share)


def test_ocrm_keeps_given_weights_and_leaves_long_pairs_alone(
    policies, reward_model, options, tokenizer
):
    today, sft = policies
    long = {"prompt": "the", "chosen": " cat" * 90, "rejected": " dog"}
    rows = [*OCRM_ROWS, long]
    alone = pair_weights(OCRM_ROWS, today, sft, alpha=0.1, scale=0.3)
    found = pair_weights(rows, today, sft, alpha=0.1, scale=0.3, max_length=20)
    torch.testing.assert_close(found, torch.cat([alone, torch.ones(1).double()]))
    with pytest.raises(UserError, match=r"a pair has 92 tokens, and the policy's context is 64"):
        pair_weights(rows, today, sft, alpha=0.1, scale=0.3)
    given = [{**row, "weight": 2.0} for row in OCRM_ROWS]
    args = OCRMConfig(**{**options, "ocrm_scale": 0.3})
    trainer = OCRMTrainer(
        reward_model, args, policy=today, reference=sft,
        train_dataset=Dataset.from_list(given), processing_class=tokenizer,
    )  # fmt: skip
    assert trainer.train_dataset["weight"] == pytest.approx((2 * alone).tolist())


def test_ocrm_refuses_what_it_cannot_weigh(policies, tmp_path, tokenizer):
    today, sft = policies
    with pytest.raises(UserError, match="row 0: has no prompt"):
        pair_weights([{"chosen": "the cat", "rejected": "a dog"}], today, sft, alpha=0.1, scale=1.0)
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["extra"])
    other.save_pretrained(sft)
    with pytest.raises(UserError, match="their tokenizers differ"):
        pair_weights(OCRM_ROWS, today, sft, alpha=0.1, scale=1.0)
    for bad in ({"ocrm_alpha": 0.0}, {"ocrm_scale": -1.0}):
        with pytest.raises(UserError, match=f"{next(iter(bad))} is"):
            OCRMConfig(output_dir=str(tmp_path), **bad)


# -- bsr -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("micro", "steps"), [(5, 1), (3, 2), (2, 3), (1, 5)])
def test_bsr_is_the_square_over_the_optimizer_step(
    reward_model, pairs, options, tokenizer, micro, steps
):
    rows = pairs[:5]
    [found], trainer = gradients_of(
        BSRTrainer, BSRConfig, reward_model, rows, options, tokenizer,
        per_device_train_batch_size=micro, gradient_accumulation_steps=steps, bsr_coefficient=0.7,
    )  # fmt: skip
    model = copy.deepcopy(reward_model).double()
    rewards = plain_rewards(model, tokenizer, rows)
    loss = -F.logsigmoid(rewards[:, 0] - rewards[:, 1]).mean() + 0.7 * 5 * rewards.mean() ** 2
    torch.testing.assert_close(found, gradient_of(loss, model), rtol=1e-6, atol=1e-8)
    logged = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    assert logged == pytest.approx(loss.item(), rel=1e-5)


@pytest.mark.parametrize("weights", [[0.0, 2.0, 1.0, 0.5, 3.0], [0.0] * 5])
@pytest.mark.parametrize(("micro", "steps"), [(5, 1), (2, 3)])
def test_bsrs_penalty_is_of_weighted_pairs(
    reward_model, pairs, options, tokenizer, micro, steps, weights
):
    """A pair of weight 2 is in the penalty twice, one of weight 0 not at all."""
    rows = [{**row, "weight": w} for row, w in zip(pairs[:5], weights, strict=True)]
    [found], trainer = gradients_of(
        BSRTrainer, BSRConfig, reward_model, rows, options, tokenizer,
        per_device_train_batch_size=micro, gradient_accumulation_steps=steps, bsr_coefficient=0.7,
    )  # fmt: skip
    model = copy.deepcopy(reward_model).double()
    rewards, w = plain_rewards(model, tokenizer, rows), torch.tensor(weights).double()
    total = w.sum()
    mean = (w * rewards.mean(1)).sum() / total if total > 0 else 0 * rewards.sum()
    loss = (-F.logsigmoid(rewards[:, 0] - rewards[:, 1]) * w).mean() + 0.7 * total * mean**2
    torch.testing.assert_close(found, gradient_of(loss, model), rtol=1e-6, atol=1e-8)
    logged = next(log["loss"] for log in trainer.state.log_history if "loss" in log)
    assert logged == pytest.approx(loss.item(), rel=1e-5)


def test_bsrs_evaluation_is_that_of_bradley_terry(reward_model, pairs, options, tokenizer):
    losses = []
    for cls, config, own in (
        (BSRTrainer, BSRConfig, {"bsr_coefficient": 10.0}),
        (RewardTrainer, RewardConfig, {}),
    ):
        data = Dataset.from_list(pairs[:5])
        args = config(**{**options, **own})
        trainer = cls(
            reward_model, args, train_dataset=data, eval_dataset=data, processing_class=tokenizer
        )
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1]
    with pytest.raises(UserError, match="bsr_coefficient is -1"):
        BSRConfig(**{**options, "bsr_coefficient": -1.0})


# -- grm -----------------------------------------------------------------------------------------


def test_grm_names_the_row_of_the_data_set(policies, tokenizer, options):
    """Rows before it that are too long are dropped, and counted."""
    long = {**OCRM_ROWS[0], "chosen": " cat" * 40}
    rows = [long, OCRM_ROWS[0], long, {**OCRM_ROWS[1], "prompt": None}]
    args = GRMConfig(**options, max_length=20)
    with pytest.raises(UserError, match="train data, row 3: has no prompt"):
        GRMTrainer(
            policies[0], args, train_dataset=Dataset.from_list(rows), processing_class=tokenizer
        )


@pytest.mark.parametrize("weights", [None, (0.0, 2.5, 1.0)])
@pytest.mark.parametrize("tied", [True, False])
def test_grm_against_plain_transformers(tmp_path, options, tokenizer, tied, weights):
    torch.manual_seed(3)
    config = llama_config(tie_word_embeddings=tied, initializer_range=0.3)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    rows = [{**row, **FLAGS} for row in OCRM_ROWS]
    rows[1]["chosen_finished"] = False
    if weights is not None:  # a factor of the whole loss of the pair
        rows = [{**row, "weight": w} for row, w in zip(rows, weights, strict=True)]
    factors = torch.tensor(weights or [1.0] * len(rows)).double()
    [found], trainer = gradients_of(
        GRMTrainer, GRMConfig, str(tmp_path / "start"), rows, options, tokenizer,
        grm_alpha=0.3, grm_beta=0.2,
    )  # fmt: skip
    model = copy.deepcopy(trainer.model)  # the learning rate is 0
    head = LlamaForCausalLM.from_pretrained(tmp_path / "start").double().lm_head.weight
    head = model.model.embed_tokens.weight if tied else head.detach()
    rewards = plain_rewards(model, tokenizer, rows)
    likelihood = []
    for row in rows:
        done = row["chosen_finished"]
        ids = encode(tokenizer, row["prompt"], row["chosen"], finished=done)
        states = model.model(input_ids=torch.tensor([ids])).last_hidden_state[0]
        logp = (states @ head.T).log_softmax(-1)
        count = len(row["chosen"].split()) + done
        likelihood.append(sum(logp[t - 1, ids[t]] for t in range(len(ids) - count, len(ids))))
    text = -F.logsigmoid(0.2 * torch.stack(likelihood))
    pairs_loss = -F.logsigmoid(rewards[:, 0] - rewards[:, 1])
    loss = ((0.7 * pairs_loss + 0.3 * text) * factors).mean()
    torch.testing.assert_close(found, gradient_of(loss, model), rtol=1e-5, atol=1e-7)
    [logged] = [log for log in trainer.state.log_history if "loss" in log]
    assert logged["loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_grm_with_alpha_zero_is_bradley_terry(policies, options, tokenizer):
    rows = OCRM_ROWS
    found = [
        gradients_of(cls, config, policies[0], rows, options, tokenizer, **own)[0][0]
        for cls, config, own in (
            (GRMTrainer, GRMConfig, {"grm_alpha": 0.0}),
            (RewardTrainer, RewardConfig, {}),
        )
    ]
    torch.testing.assert_close(*found)


def test_grm_needs_a_language_head(tmp_path, reward_model, tokenizer, options):
    reward_model.save_pretrained(tmp_path / "rm")
    tokenizer.save_pretrained(tmp_path / "rm")
    with pytest.raises(UserError, match=r"has no language-model head \(lm_head.weight\)") as error:
        LanguageHead.load(str(tmp_path / "rm"))
    assert "\n" not in str(error.value)
    reward_model.config.tie_word_embeddings = True  # then the embeddings are the head
    reward_model.save_pretrained(tmp_path / "tied")
    assert LanguageHead.load(str(tmp_path / "tied")).weight is None
    with pytest.raises(UserError, match="give the model as a folder"):
        GRMTrainer(reward_model, GRMConfig(**options))
    for bad in ({"grm_alpha": 1.1}, {"grm_beta": 0.0}):
        with pytest.raises(UserError, match=f"{next(iter(bad))} is"):
            GRMConfig(**{**options, **bad})


@pytest.mark.parametrize("tied", [True, False])
def test_grms_start_is_checked_by_the_names_of_its_weights(tmp_path, reward_model, tied):
    """As the load does, without one: of two files here, as large models have."""
    reward_model.config.tie_word_embeddings = tied
    reward_model.save_pretrained(tmp_path / "rm", max_shard_size="30KB")
    LlamaForCausalLM(llama_config()).save_pretrained(tmp_path / "policy")
    assert len(list((tmp_path / "rm").glob("*.safetensors"))) > 1
    GRMTrainer.check_start(str(tmp_path / "policy"))
    GRMTrainer.check_start("owner/name")  # known when it is loaded
    if tied:
        GRMTrainer.check_start(str(tmp_path / "rm"))
        return
    with pytest.raises(UserError, match=r"lm_head.*`shiftrm train --method grm --model POLICY`"):
        GRMTrainer.check_start(str(tmp_path / "rm"))


def test_a_capped_head_is_read_and_an_unknown_one_refused(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = LlamaForCausalLM(llama_config(initializer_range=0.5))
    model.save_pretrained(tmp_path / "m")
    plain = LlamaForCausalLM.forward

    def capped(self, *args, **kwargs):
        output = plain(self, *args, **kwargs)
        output.logits = 2.0 * torch.tanh(output.logits / 2.0)
        return output

    monkeypatch.setattr(LlamaForCausalLM, "forward", capped)
    with pytest.raises(UserError, match="its logits are not one linear layer"):
        LanguageHead.load(str(tmp_path / "m"))
    model.config.final_logit_softcapping = 2.0
    model.save_pretrained(tmp_path / "capped")
    assert LanguageHead.load(str(tmp_path / "capped")).softcap == 2.0


# -- self-labelled -------------------------------------------------------------------------------

GROUPS = [
    {"prompt": "the", "responses": [" cat", " dog runs", " fish"], "finished": [True, False, True]},
    {"prompt": "a", "responses": [" bird", " bird"]},
    {"prompt": "red", "responses": [" cat sits", "  ", " blue"]},
]


def test_best_and_worst_by_hand():
    assert best_and_worst(GROUPS, [[0.5, 1.0, -2.0], [1.0, 2.0], [3.0, 0.0, 3.0]]) == [
        {
            "prompt": "the", "chosen": " dog runs", "rejected": " fish",
            "chosen_finished": False, "rejected_finished": True,
        },
    ]  # fmt: skip
    assert best_and_worst(GROUPS[:1], [[1.0, 1.0, 1.0]]) == []
    [row] = best_and_worst(GROUPS[2:], [[3.0, -9.0, 1.0]])  # the worst is blank
    assert (row["chosen"], row["rejected"]) == (" cat sits", " blue")
    [row] = best_and_worst(GROUPS[:1], [[None, 1.0, 2.0]])
    assert (row["chosen"], row["rejected"]) == (" fish", " dog runs")
    assert best_and_worst(GROUPS[:1], [[None, 1.0, None]]) == []


def test_self_labelled_moves_the_head_alone_by_its_own_labels(
    tmp_path, reward_model, tokenizer, options, pairs, policies
):
    start = str(tmp_path / "rm")
    reward_model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    args = SelfLabelledConfig(**{**options, "learning_rate": 0.1})
    data = Dataset.from_list(pairs)  # not used
    trainer = SelfLabelledTrainer(start, args, meta_dataset=GROUPS, train_dataset=data)
    scorer = Scorer.from_pretrained(start)
    rewards = [scorer([g["prompt"]] * 3, g["responses"]) for g in (GROUPS[0], GROUPS[2])]
    rewards[0] = scorer(["the"] * 3, GROUPS[0]["responses"], finished=[True, False, True])
    expected = best_and_worst([GROUPS[0], GROUPS[2]], rewards)
    rows = [
        {k: v for k, v in row.items() if k in expected[0]}
        for row in trainer.train_dataset.to_list()
    ]
    assert rows == expected
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train()
    moved = {n for n, p in trainer.model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == {"score.weight"}
    with pytest.raises(UserError, match="score head"):
        SelfLabelledTrainer(policies[0], args, meta_dataset=GROUPS, train_dataset=data)
    with pytest.raises(UserError, match="none of the 1 groups gives a pair: 1 hold equal resp"):
        SelfLabelledTrainer(start, args, meta_dataset=[GROUPS[1]], train_dataset=data)
    assert SelfLabelledConfig(output_dir=str(tmp_path)).learning_rate == 1e-6


@pytest.mark.parametrize(
    ("max_length", "words"), [(8, "max_length=8 tokens"), (None, "context of")]
)
def test_self_labelled_leaves_out_what_is_blank_or_too_long(
    tmp_path, reward_model, tokenizer, options, pairs, caplog, max_length, words
):
    start, data = str(tmp_path / "rm"), Dataset.from_list(pairs)
    reward_model.save_pretrained(start)
    tokenizer.save_pretrained(start)
    args = SelfLabelledConfig(**{**options, "max_length": max_length})
    long = " flies" * 70

    def made(groups):
        return SelfLabelledTrainer(start, args, meta_dataset=groups, train_dataset=data)

    groups = [{"prompt": "the", "responses": [long, " cat", "  ", " dog runs", long + " a"]}]
    [row] = made(groups).train_dataset.to_list()
    assert {row["chosen"], row["rejected"]} == {" cat", " dog runs"}
    assert "left out 1 blank responses and 2 responses longer than" in caplog.text
    assert words in caplog.text
    none = [
        {"prompt": "the", "responses": [long, " cat"]},
        {"prompt": "red", "responses": [" ", "", " cat"]},
        {"prompt": "a", "responses": [" bird", " bird"]},
    ]
    with pytest.raises(UserError, match="none of the 3 groups gives a pair: 2 have fewer") as error:
        made(none)
    text = str(error.value)
    assert "2 blank responses and 1 responses longer than" in text
    assert "1 hold equal responses" in text
    assert "sees no difference" not in text
    assert "\n" not in text
    reward_model.score.weight.data.zero_()  # all rewards are 0
    reward_model.save_pretrained(start)
    with pytest.raises(UserError, match="in 1 the reward model sees no difference"):
        made([{"prompt": "the", "responses": [" cat", " dog"]}])


# -- contrast ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("share", "made"), [(0.25, 2), (0.5, 6), (0.75, 18), (0.01, 1)])
def test_the_share_of_contrast_is_of_all_pairs(
    reward_model, pairs, groups, options, tokenizer, share, made
):
    """6 pairs beside 2, 6 and 18 made ones: a quarter, a half and three quarters of all."""
    trainer = ContrastTrainer(
        copy.deepcopy(reward_model),
        ContrastConfig(**{**options, "contrast_share": share, "max_length": None}),
        train_dataset=Dataset.from_list(pairs[:6]),
        meta_dataset=Dataset.from_list(groups),
        processing_class=tokenizer,
    )
    assert len(trainer.train_dataset) == 6 + made
