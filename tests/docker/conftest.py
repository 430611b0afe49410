"""Fixtures of the deployment's tests."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode puts no test folder on the path

from fake_host import Host


@pytest.fixture
def host(tmp_path):
    """A machine on which everything is well, until a test replaces a tool."""
    return Host(tmp_path)
