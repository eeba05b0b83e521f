"""Two processes give what one gives on the same global batches."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.slow


def train(folder, *, processes):
    """Run the script on so many processes; the global batch is 4 pairs times 2 accumulations."""
    result = folder / f"{processes}.json"
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [
        sys.executable,
        *(launcher if processes > 1 else []),
        str(Path(__file__).with_name("distributed_run.py")),
        str(folder),
        str(result),
        str(4 // processes),
    ]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(result.read_text())


def test_ddp_equals_one_process(reward_model, tokenizer, pairs, groups, tmp_path):
    reward_model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    data = {"pairs": [*pairs, *pairs[:4]], "groups": groups}
    (tmp_path / "data.json").write_text(json.dumps(data))
    one, two = train(tmp_path, processes=1), train(tmp_path, processes=2)
    assert (one["processes"], two["processes"]) == (1, 2)
    for name, weight in one["weights"].items():
        torch.testing.assert_close(
            torch.tensor(weight), torch.tensor(two["weights"][name]), rtol=0, atol=1e-6, msg=name
        )
    assert two["objective"] == pytest.approx(one["objective"], abs=1e-6), "J is the global one"
