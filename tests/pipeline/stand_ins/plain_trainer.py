"""A trainer for tests: asks the reward server, and writes a policy with other weights.

It writes what it was told and what it got to `seen.json` beside the output.
"""

import argparse
import json
import sys
import time
import urllib.request
from pathlib import Path


def ask(address, content):
    """The answer of an HTTP server to JSON."""
    request = urllib.request.Request(address, json.dumps(content).encode())
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def read_prompts(path):
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line)["prompt"] for line in lines]


def train(policy, output, *, change=0.01):
    """Write the policy with every weight changed a little."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(policy)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(change)
    model.save_pretrained(output)
    AutoTokenizer.from_pretrained(policy).save_pretrained(output)


def main():
    parser = argparse.ArgumentParser()
    for name in ("--policy", "--prompts", "--output", "--checkpoints"):
        parser.add_argument(name, required=True)
    for name in ("--reference", "--reward", "--reward-url", "--pairs", "--do"):
        parser.add_argument(name, default="")
    parser.add_argument("--seed", type=int)
    given = parser.parse_args()
    print("training", flush=True)
    mark = Path(given.checkpoints) / "begun"
    again = mark.exists()
    mark.write_text("1")
    if given.do == "fail" or (given.do == "fail-once" and not again):
        Path(given.output).mkdir()
        (Path(given.output) / "config.json").write_text("{")
        print("CUDA out of memory\x1b[31m", file=sys.stderr)
        sys.exit(3)
    if given.do == "wait":
        time.sleep(600)
    rewards = None
    if given.reward_url:
        prompts = read_prompts(given.prompts)[:3]
        rows = [{"prompt": prompt, "responses": [" the red cat", " a dog"]} for prompt in prompts]
        rewards = ask(f"{given.reward_url}/score", {"rows": rows})["rewards"]
    train(given.policy, given.output, change=0.0 if given.do == "nothing" else 0.01)
    if given.do == "no-tokenizer":
        for path in Path(given.output).glob("tokenizer*"):
            path.unlink()
    (Path(given.output).parent / "runs").mkdir()  # as a tracker does
    (Path(given.output).parent / "runs" / "events").write_text("1")
    told = {**vars(given), "again": again, "rewards": rewards}
    (Path(given.output) / "seen.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
