"""A saved reward model in other hands: transformers alone, and TRL's RLOO and GRPO trainers."""

import pytest
import torch
from datasets import Dataset
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from shiftrm.models.scoring import Scorer
from shiftrm.trainers.reward import RewardTrainer

CHATS = [
    [{"role": "user", "content": text}]
    for text in ("the red cat", "a fish", "the small dog", "a bird")
]


@pytest.fixture
def folder(make_trainer, reward_model, pairs, tmp_path):
    """What a user has after training."""
    trainer = make_trainer(reward_model, RewardTrainer, max_steps=3)
    trainer.train()
    trainer.save_model(str(tmp_path / "reward"))
    return tmp_path / "reward"


def test_transformers_alone_gives_the_same_scores(folder):
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    answers = ["runs", "sits the large", "flies", ""]
    chats = [[*c, {"role": "assistant", "content": a}] for c, a in zip(CHATS, answers, strict=True)]
    inputs = tokenizer.apply_chat_template(
        chats, return_tensors="pt", padding=True, return_dict=True, padding_side="right"
    )
    with torch.no_grad():
        theirs = model(**inputs).logits[:, 0].tolist()
    assert Scorer.from_pretrained(folder)(CHATS, answers) == pytest.approx(theirs, abs=1e-6)


@pytest.mark.parametrize(
    ("trainer_class", "config_class"), [(GRPOTrainer, GRPOConfig), (RLOOTrainer, RLOOConfig)]
)
def test_as_a_reward_function_of_trl(
    folder, policy, tokenizer, tmp_path, trainer_class, config_class
):
    """Two steps; the rewards that TRL took are the ones we give the same completions."""
    policy.save_pretrained(tmp_path / "policy")
    taken = []
    scorer = Scorer.from_pretrained(folder)

    def ours(prompts, completions, **_):
        taken.append(scorer(prompts, completions))
        return taken[-1]

    args = config_class(
        output_dir=str(tmp_path / "out"),
        per_device_train_batch_size=4,
        num_generations=2,
        max_completion_length=5,
        max_steps=2,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        reward_weights=[1.0, 0.0],
    )
    trainer = trainer_class(
        str(tmp_path / "policy"),
        reward_funcs=[str(folder), ours],
        args=args,
        train_dataset=Dataset.from_dict({"prompt": CHATS}),
        processing_class=tokenizer,
    )
    trainer.train()
    logs = [log for log in trainer.state.log_history if "rewards/ours/mean" in log]
    assert len(logs) == len(taken) == 2
    [theirs] = {key for key in logs[0] if key.endswith("/mean") and "reward/mean" in key}
    for log, rewards in zip(logs, taken, strict=True):
        assert log[theirs] == pytest.approx(sum(rewards) / len(rewards), abs=1e-5)
        assert log["rewards/ours/mean"] == pytest.approx(log[theirs], abs=1e-5)
        assert max(rewards) - min(rewards) > 1e-4, "equal rewards would show nothing"
