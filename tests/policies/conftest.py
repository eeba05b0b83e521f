"""Arguments of TRL's trainers with everything incidental switched off."""

import pytest

QUIET = {
    "use_cpu": True,
    "bf16": False,
    "activation_checkpointing": False,
    "report_to": "none",
    "save_strategy": "no",
    "disable_tqdm": True,
    "logging_steps": 1,
    "per_device_train_batch_size": 4,
    "max_steps": 2,
}


@pytest.fixture
def arguments(tmp_path):
    """arguments(config_class, **options) -> its object"""

    def make(config, **options):
        return config(**{"output_dir": str(tmp_path / "trainer"), **QUIET, **options})

    return make
