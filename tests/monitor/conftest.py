"""Shared by the tests of the monitor."""

from tests.policies.conftest import arguments

__all__ = ["arguments"]
