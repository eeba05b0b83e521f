"""Registries: look-up by name and by import path, and the errors of both."""

import sys

import pytest

from shiftrm.errors import UserError
from shiftrm.registry import Registry


@pytest.fixture
def own_module(tmp_path, monkeypatch):
    """A user's package `own_parts` in the working directory, which is not on the path yet."""
    folder = tmp_path / "own_parts"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "first.py").write_text("def double(x):\n    return 2 * x\n\nNUMBER = 3\n")
    (folder / "broken.py").write_text("import no_such_dependency\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield
    for name in [name for name in sys.modules if name.split(".")[0] == "own_parts"]:
        del sys.modules[name]


@pytest.fixture
def registry():
    found = Registry("objective")

    @found.register("squared")
    def squared(x):
        return x * x

    return found


def test_entries_by_name_in_order(registry):
    registry.register("cubed")(lambda x: x**3)
    assert registry.get("squared")(3) == 9
    assert registry.names() == ["squared", "cubed"]


def test_entries_by_import_path(registry, own_module):
    assert registry.get("own_parts.first:double")(4) == 8
    assert Registry("number", int).get("own_parts.first:NUMBER") == 3


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("sqared", "unknown objective 'sqared'; did you mean 'squared'?"),
        ("own_parts.frist:double", "no module named 'own_parts.frist'; did you mean 'own_parts.fi"),
        ("nowhere_at_all:double", "no module named 'nowhere_at_all'"),
        ("own_parts.first:duoble", "own_parts.first has no 'duoble'; did you mean 'double'?"),
        ("own_parts.first:NUMBER", "expected a function, found int"),
        ("own_parts.broken:x", "importing own_parts.broken failed: ModuleNotFoundError"),
        ("own_parts.first:", "write package.module:attribute"),
        ("../first.py:double", "write package.module:attribute"),
    ],
)
def test_errors_are_one_line(registry, own_module, name, said):
    with pytest.raises(UserError) as error:
        registry.get(name)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_name_is_registered_once(registry):
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("squared")(abs)
    with pytest.raises(ValueError, match="no colon"):
        registry.register("a:b")


def test_home_is_imported_at_the_first_look_up(own_module, tmp_path):
    (tmp_path / "own_parts" / "entries.py").write_text(
        "from test_registry_home import REGISTRY\nREGISTRY.register('there')(len)\n"
    )
    (tmp_path / "own_parts" / "broken.py").unlink()
    found = Registry("function", home="own_parts")
    module = type(sys)("test_registry_home")
    module.REGISTRY = found
    sys.modules["test_registry_home"] = module
    sys.path.append(str(tmp_path))
    try:
        assert "own_parts.entries" not in sys.modules
        assert found.names() == ["there"]
    finally:
        del sys.modules["test_registry_home"]
