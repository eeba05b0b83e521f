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


def test_the_readme_is_short():
    assert len(README.read_text(encoding="utf-8").splitlines()) <= 120


def test_every_room_and_base_module_is_on_the_map():
    """A new one needs a line in CONTRIBUTING.md; the README names the rooms."""
    full = README.with_name("CONTRIBUTING.md").read_text(encoding="utf-8")
    short = README.read_text(encoding="utf-8").partition("## Map")[2]
    for path in (README.parent / "src" / "shiftrm").iterdir():
        if path.suffix == ".py" and not path.name.startswith("_"):
            assert path.name in full, path.name
        elif path.is_dir() and path.name != "__pycache__":
            assert f"  {path.name}/ " in full, path.name
            assert path.name in short, path.name
