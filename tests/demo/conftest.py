"""A whole gold-world run so small that it takes seconds, through the real command."""

import os
import signal
import subprocess
import sys
import time

TINY = [
    "rounds=1",
    "methods=[fixed, metarm_scale_free]",
    "world.sft_examples=128",
    "world.train_prompts=32",
    "world.eval_prompts=12",
    "world.hidden_size=16",
    "world.intermediate_size=16",
    "world.layers=1",
    "world.heads=2",
    "world.pairs=48",
    "world.heldout_pairs=16",
    "world.scale_prompts=16",
    "world.policy_prompts=32",
    "groups.prompts=8",
    "groups.responses=3",
    "reward.settings.max_steps=2",
    "reward.settings.eval_steps=1",
    "reward.settings.logging_steps=1",
    "policy.settings.steps=2",
    "policy.settings.prompts_per_step=4",
    "policy.settings.rollouts_per_prompt=4",
    "evaluation.prompts=12",
]


def demo(output, *settings, workers=2, kill_after=None, how=signal.SIGKILL):
    """Run `shiftrm demo`; returns (status, stderr).

    `kill_after=(stages, seconds)`: kill (-9) it that long after so many stages finished anew.
    """
    command = [sys.executable, "-m", "shiftrm", "demo", "--output", str(output)]
    process = subprocess.Popen(
        [*command, "--workers", str(workers), *TINY, *settings],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
        # A runner in the background ignores Ctrl-C, and its children would, too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    if kill_after is None:
        _, errors = process.communicate(timeout=300)
        return process.returncode, errors
    stages, seconds = kill_after
    while stages:
        line = process.stderr.readline()
        if not line:
            break
        stages -= line.rstrip().endswith(" done")
    time.sleep(seconds)
    if how == signal.SIGINT:
        os.killpg(process.pid, how)  # as a terminal does
    else:
        process.send_signal(how)
    errors = process.stderr.read()
    process.stderr.close()
    return process.wait(timeout=60), errors
