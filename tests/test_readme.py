"""The README's Python example runs as it stands, on a user's files."""

import re
from pathlib import Path

import pytest

from shiftrm.files import write_jsonl

README = Path(__file__).parents[1] / "README.md"


def test_python_example(tmp_path, monkeypatch, policy, tokenizer, pairs, groups):
    [code] = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    policy.save_pretrained("models/sft")
    tokenizer.save_pretrained("models/sft")
    write_jsonl("pairs.jsonl", pairs)
    write_jsonl("groups.jsonl", [g for g in groups if len(g["responses"]) == 4])
    exec(compile(code, "README.md", "exec"), {})
    from shiftrm.models.scoring import Scorer

    [reward] = Scorer.from_pretrained("reward-round-2")(["the red"], [" cat"])
    assert reward == pytest.approx(reward)


def test_every_source_file_is_on_the_map():
    """A new module needs a line in the README, so that someone new finds it."""
    text = README.read_text(encoding="utf-8")
    for path in (README.parent / "src" / "shiftrm").iterdir():
        if path.suffix == ".py" and not path.name.startswith("_"):
            assert path.name in text, path.name
        elif path.is_dir() and path.name != "__pycache__":
            assert f"{path.name}/" in text, path.name
