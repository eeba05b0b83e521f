"""The configuration classes alone fit the machine, as the commands do."""

import pytest
import torch

from shiftrm.policies.configs import DPOConfig, GRPOConfig, RLOOConfig


@pytest.mark.parametrize("config", [DPOConfig, RLOOConfig, GRPOConfig])
def test_without_an_accelerator_nothing_asks_for_one(config, tmp_path):
    args = config(str(tmp_path))
    if torch.accelerator.current_accelerator(check_available=True) is None:
        assert args.use_cpu
        assert args.bf16 is False
    assert config(str(tmp_path), use_cpu=True, bf16=True).bf16 is True, "what is said stays"
