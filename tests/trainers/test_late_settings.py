"""Settings of which no optimizer or schedule can be made are refused before anything is read."""

import pytest
from transformers import SchedulerType
from trl import DPOConfig, GRPOConfig, RewardConfig, SFTConfig

from shiftrm.errors import UserError
from shiftrm.trainers.settings import resolve

BAD = {
    "lr_scheduler_type=cosine_with_min_lr": (
        "lr_scheduler_type=cosine_with_min_lr: One of min_lr or min_lr_rate should be set"
    ),
    "lr_scheduler_type=warmup_stable_decay": "lr_scheduler_type=warmup_stable_decay: .*num_decay",
    "lr_scheduler_kwargs={x: 1}": "lr_scheduler_kwargs: .*unexpected keyword argument 'x'",
    "optim_args=x": "optim_args is 'x'; give NAME=VALUE",
    "optim=adamw_torch_8bit": "optim=adamw_torch_8bit: cannot be used: .*torchao",
    "parallelism_config=x": "'parallelism_config'; `accelerate launch",
    "log_level=inf": "log_level is 'inf'; did you mean 'info'",
}


def settings(words, config, work):
    given = dict(word.split("=", 1) for word in words)
    return resolve(given, config, work=work, command_name="train")


@pytest.mark.parametrize("word", BAD)
@pytest.mark.parametrize("config", [RewardConfig, SFTConfig, DPOConfig, GRPOConfig])
def test_the_setting_is_named(tmp_path, config, word):
    with pytest.raises(UserError, match=BAD[word]):
        settings([word], config, tmp_path)


KWARGS = {
    "cosine_with_min_lr": "{min_lr: 0.0}",
    "cosine_warmup_with_min_lr": "{min_lr_rate: 0.1}",
    "warmup_stable_decay": "{num_decay_steps: 3}",
    "polynomial": "{power: 2.0}",
}


@pytest.mark.parametrize("schedule", [kind.value for kind in SchedulerType])
@pytest.mark.parametrize("warmup", ["0", "0.1", "1000000"])
def test_every_schedule_is_accepted_with_what_it_needs(tmp_path, schedule, warmup):
    words = [f"lr_scheduler_type={schedule}", f"warmup_steps={warmup}"]
    if schedule in KWARGS:
        words.append(f"lr_scheduler_kwargs={KWARGS[schedule]}")
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        words += ["eval_strategy=steps", "eval_steps=1"]
    assert settings(words, RewardConfig, tmp_path).args.lr_scheduler_type == schedule
