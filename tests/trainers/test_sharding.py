"""What the trainers refuse to run under, said before anything is trained; a norm over shards."""

from types import SimpleNamespace

import pytest
import torch
from accelerate.utils import FullyShardedDataParallelPlugin, ParallelismConfig

from shiftrm.errors import UserError
from shiftrm.trainers.metarm import MetaRMConfig, MetaRMTrainer
from shiftrm.trainers.sharding import (
    is_sharded,
    refuse_model_parallelism,
    reshard,
    set_up_fsdp,
    sharded_like,
    whole_on_main,
)


def accelerator(plugin):
    return SimpleNamespace(state=SimpleNamespace(fsdp_plugin=plugin))


@pytest.mark.parametrize("field", ["deepspeed", "deepspeed_plugin"])
def test_deepspeed_is_refused_before_anything_is_read(options, field):
    args = MetaRMConfig(**options)
    setattr(args, field, "zero3.json")  # what a configuration, or the launcher, leaves there
    with pytest.raises(UserError, match=r"do not run under DeepSpeed.*use FSDP2"):
        MetaRMTrainer("no/such/model", args, meta_dataset=None)


def test_fsdp1_and_wrapping_by_size_are_refused():
    old = FullyShardedDataParallelPlugin(fsdp_version=1)
    with pytest.raises(UserError, match="set fsdp_version: 2"):
        set_up_fsdp(accelerator(old), None)
    by_size = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="size_based_wrap", min_num_params=10
    )
    with pytest.raises(UserError, match="TRANSFORMER_BASED_WRAP"):
        set_up_fsdp(accelerator(by_size), None)


def test_an_fsdp2_plugin_that_accelerate_took_up_is_left_alone():
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap"
    )
    given = accelerator(plugin)
    assert set_up_fsdp(given, None)
    assert given.state.__dict__ == {"fsdp_plugin": plugin}


def test_without_a_configuration_nothing_is_sharded(make_trainer, reward_model):
    trainer = make_trainer(reward_model)
    assert not trainer.is_fsdp_enabled
    trainer.train()
    assert not is_sharded(trainer.model)
    reshard(trainer.model)


def test_model_parallelism_is_refused():
    model = torch.nn.Linear(2, 1)
    for kind in ("tp", "cp"):
        config = ParallelismConfig(**{f"{kind}_size": 2})
        with pytest.raises(UserError, match=f"{kind}_size > 1"):
            refuse_model_parallelism(SimpleNamespace(parallelism_config=config), model)
    model.is_distributed_loading_by_transformers = True
    with pytest.raises(UserError, match="sharded as it was loaded"):
        refuse_model_parallelism(SimpleNamespace(parallelism_config=None), model)


def test_ordinary_tensors_stay_what_they_are():
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    assert whole_on_main(tensors, is_main=True).keys() == tensors.keys()
    assert whole_on_main(tensors, is_main=False) == {}
    placed = sharded_like(tensors.values(), [torch.ones(2), torch.ones(3)])
    assert [p.tolist() for p in placed] == [[1, 1], [0, 0, 0]]
