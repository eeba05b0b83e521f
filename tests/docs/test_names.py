"""Modules, attributes and files that the manual and the README name exist."""

import importlib
import re
import warnings

import pytest

from tests.docs.test_build import PAGES, ROOT

SOURCE = ROOT / "src" / "shiftrm"
PACKAGES = "|".join(path.parent.name for path in SOURCE.glob("*/__init__.py"))
FULL = re.compile(r"\bshiftrm(?:\.[A-Za-z_]\w*)+")
SHORT = re.compile(rf"`((?:{PACKAGES})(?:\.[A-Za-z_]\w*)+)`")
"""Names without the leading `shiftrm.`, which the pages in `SHORTENING` use."""
SHORTENING = ("concepts.md", "metarm.md")
FILE = re.compile(r"\b(?:src|tests|benchmarks|recipes|shiftrm)/[\w/.-]*\w")


def exists(name):
    """Whether the dotted name is a module or an attribute of one; old names do not count."""
    parts = name.split(".")
    for size in range(len(parts), 0, -1):
        module = ".".join(parts[:size])
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", DeprecationWarning)
                found = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not f"{module}.".startswith(f"{error.name}."):
                raise
            continue
        except DeprecationWarning:
            return False
        for part in parts[size:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.stem)
def test_names_exist(page):
    text = page.read_text(encoding="utf-8")
    names = set(FULL.findall(text))
    if page.name in SHORTENING:
        names |= {f"shiftrm.{name}" for name in SHORT.findall(text)}
    assert sorted(name for name in names if not exists(name)) == []
    files = sorted(set(FILE.findall(text)))
    assert [f for f in files if not ((ROOT / f).exists() or (ROOT / "src" / f).exists())] == []
