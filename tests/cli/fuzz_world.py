"""A folder of what a user may have lying about: inputs of every kind, sound, odd and broken."""

import json
import os
import shutil
import socket
from pathlib import Path

import torch
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from shiftrm.data.domains import write_domains
from shiftrm.files import write_jsonl
from shiftrm.records import Record, write_records
from tests.conftest import llama_config
from tests.oodpl.domains import ANIMALS, make_domain

PAIRS = [
    {"prompt": f"the {colour} cat", "chosen": f" runs {colour}", "rejected": " sits"}
    for colour in ("red", "blue", "green", "small")
]
GROUPS = [
    {"prompt": f"a {colour} dog", "responses": [" runs", " sits the", " swims a fish"][:k]}
    for colour in ("red", "blue", "green", "large")
    for k in (2, 3)
]
SOUND = {
    "pairs": PAIRS,
    "groups": GROUPS,
    "others": GROUPS,
    "prompts": [{"prompt": "the red"}, {"prompt": "a dog"}],
    "demonstrations": [{"prompt": "the", "completion": " cat"}, {"prompt": "a", "completion": ""}],
    "bench": [
        {"id": 1, "prompt": "a", "chosen": "b", "rejected": "c", "subset": "alpacaeval-easy"}
    ],
    "samples": [{**row, "proxy": [1.0, 2.0, 3.0], "gold": [0.5, 0.1, 0.2]} for row in GROUPS[1::2]],
}
"""Rows that commands read without a word, by the file's name without `.jsonl`."""

ODD_ROWS = {
    "nan": '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": NaN, "responses": [NaN]}\n',
    "types": '{"prompt": 3, "chosen": ["a"], "rejected": {}, "responses": {"a": 1}, '
    '"response": 1}\n',
    "nulls": '{"prompt": null, "chosen": null, "rejected": null, "responses": null}\n',
    "surrogate": '{"prompt": "\\ud800", "chosen": "\\udc00", "rejected": "a", '
    '"responses": ["", "\\ud83d"]}\n',
    "margin": '{"prompt": "a", "chosen": "b", "rejected": "c", "margin": 1e300}\n',
    "empties": '{"prompt": "", "chosen": "", "rejected": "", "responses": ["", ""]}\n' * 3,
    "long": json.dumps({"prompt": "the " * 99, "chosen": "a " * 99, "rejected": "b"}) + "\n",
    "parts": '{"prompt": [{"role": "user", "content": [{"type": "image"}]}], '
    '"responses": ["a", "b"]}\n',
    "roles": '{"prompt": [{"role": 3, "content": null}], "responses": [[], [{}]]}\n',
    "ids": '{"prompt": "a", "responses": ["b", "c"], "prompt_ids": [99999], '
    '"response_ids": [[-1], ["x"]]}\n',
    "half": '{"prompt": "a", "chosen": "b"',
    "lists": "[1, 2]\n",
    "blank": "\n\n",
    "empty": "",
    "deep": "[" * 3000,
}
"""Lines as they should not be."""

YAML = {
    "deep": "a: " + "[" * 3000 + "]" * 3000,
    "bomb": "a0: &a0 [1, 1]\n"
    + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 40)),
    "cycle": "a: &a [*a]\n",
    "digits": f"seed: {'9' * 400}\nmodel: policy\n",
    "month": "model: policy\nmax_steps: 2020-13-45\n",
    "list": "- a\n- b\n",
    "keys": "1: 2\n? [a, b]\n: c\nnull: 3\n",
    "null": "model: policy\npairs: pairs.jsonl\nmax_steps: null\noutput: [a]\n",
    "zero": 'model: "a\\0b"\noutput: "o\\0"\npairs: "\\0"\ndomains: "\\0"\npolicy: "\\0"\n',
    "control": "model: \x01\n",
}
"""Settings in files as they should not be."""


def make_world(folder: Path, tokenizer) -> None:
    """Fill an empty folder, which must be the working one."""
    torch.manual_seed(0)
    for name, kind, options in (
        ("policy", LlamaForCausalLM, {}),
        ("rm", LlamaForSequenceClassification, {"num_labels": 1}),
        ("two-labels", LlamaForSequenceClassification, {"num_labels": 2}),
        ("small-embedding", LlamaForCausalLM, {"vocabulary": 8}),
        ("small-rm", LlamaForSequenceClassification, {"vocabulary": 8, "num_labels": 1}),
    ):
        kind(llama_config(**options)).save_pretrained(name)
        tokenizer.save_pretrained(name)
    for name, source in (("nan-policy", "policy"), ("nan-rm", "rm")):
        model = (LlamaForCausalLM if source == "policy" else LlamaForSequenceClassification)(
            llama_config(num_labels=1)
        )
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(torch.nan)
        model.save_pretrained(name)
        tokenizer.save_pretrained(name)
    _broken_models()
    for name, rows in SOUND.items():
        write_jsonl(f"{name}.jsonl", rows)
    write_jsonl("packed.jsonl.gz", GROUPS)
    for name, text in ODD_ROWS.items():
        Path(f"odd-{name}.jsonl").write_text(text)
    for name, text in YAML.items():
        Path(f"{name}.yaml").write_text(text)
    Path("sound.yaml").write_text("model: policy\npairs: pairs.jsonl\nmax_steps: 1\n")
    Path("recipe.yaml").write_text(
        "model: policy\nsft: null\nrounds: 1\ndata:\n"
        "  pairs: {format: preference, source: pairs.jsonl}\n"
        "  prompts: {format: preference, source: pairs.jsonl}\n"
        "judge: {kind: reward-model, model: rm}\n"
    )
    Path("broken.csv").write_bytes(b'a,a\n"x')
    Path("sound.csv").write_text("prompt,chosen,rejected\na,b,c\n")
    Path("broken.parquet").write_bytes(b"PAR1" + bytes(40))
    Path("broken.jsonl.gz").write_bytes(Path("packed.jsonl.gz").read_bytes()[:-9])
    Path("bytes.jsonl").write_bytes(bytes(range(256)))
    Path("broken.jinja").write_text("{% for")
    write_domains(folder / "domains", [make_domain(name) for name in ANIMALS], held_out=["fishes"])
    Path("finished").mkdir()
    write_records("finished/records.jsonl", [Record("ppo", "fixed", 0, "kl", 1.0)])
    Path("hollow").mkdir()
    _no_files()


def _broken_models() -> None:
    for name in ("garbage", "cut", "no-config", "odd-config", "no-tokenizer", "broken-template"):
        shutil.copytree("policy", name)
    Path("garbage/model.safetensors").write_bytes(bytes(range(256)) * 4)
    whole = Path("cut/model.safetensors").read_bytes()
    Path("cut/model.safetensors").write_bytes(whole[: len(whole) // 2])
    Path("no-config/config.json").unlink()
    config = json.loads(Path("odd-config/config.json").read_text())
    Path("odd-config/config.json").write_text(json.dumps({**config, "hidden_size": "many"}))
    for path in Path("no-tokenizer").glob("token*"):
        path.unlink()
    Path("broken-template/chat_template.jinja").write_text("{% for m in messages %}{{ m.x.y }}")
    Path("gguf").mkdir()
    Path("gguf/model.gguf").write_bytes(b"GGUF" + bytes(60))
    Path("adapter").mkdir()
    Path("adapter/adapter_config.json").write_text('{"base_model_name_or_path": "nowhere"}')


def _no_files() -> None:
    """What has a name and is no file: these stand for devices."""
    os.mkfifo("pipe")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind("socket")
    os.symlink("loop", "loop")
    os.symlink("nowhere", "dangling")
    os.symlink("groups.jsonl", "link.jsonl")
    os.symlink("rm", "linked")
    os.link("pairs.jsonl", "hard.jsonl")
