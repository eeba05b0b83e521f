"""Records of the demo as fixtures, and figures that are not drawn."""

import pytest

from shiftrm.records import Record

from .records import demo_records


@pytest.fixture(scope="session")
def one_seed() -> list[Record]:
    return demo_records()


@pytest.fixture(scope="session")
def three_seeds() -> list[Record]:
    return [record for seed in (0, 1, 2) for record in demo_records(seed)]


@pytest.fixture
def undrawn(monkeypatch):
    """Figures are made but not drawn, which is most of a page's time."""
    monkeypatch.setattr("shiftrm.report.plots.render", lambda figure: b"<svg/>")
