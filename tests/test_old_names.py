"""Import paths of before the rooms give the modules where they are now, with a warning."""

import importlib
import subprocess
import sys

import pytest

from shiftrm._old_names import _MOVED


@pytest.mark.parametrize("old", sorted(_MOVED))
def test_an_old_path_is_the_new_module(old, monkeypatch):
    monkeypatch.delitem(sys.modules, old, raising=False)
    with pytest.warns(DeprecationWarning, match=f"{old} is now {_MOVED[old]}"):
        module = importlib.import_module(old)
    assert module is importlib.import_module(_MOVED[old])


def test_names_that_users_import_from_old_paths():
    code = """
from shiftrm.curvature import finite_difference_product
from shiftrm.losses import difference_loss
from shiftrm.rendering import encode, encode_prompt
from shiftrm.sampling import Sample, SamplingConfig, as_samples, generate, group_row
from shiftrm.testbed.gold import FEATURES, GoldReward, explain, gold_reward
from shiftrm.testbed.language import VOCABULARY, prompt_text
from shiftrm.trainers.policy.tokens import encode_preference
from shiftrm.trainers.ppo import PPOTrainer, exact_token_kl, make_critic
from shiftrm.trainers.ppo_config import PPOConfig
from shiftrm.trainers.ppo_math import KLController
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_an_unknown_module_is_still_an_error():
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("shiftrm.no_such_module")
