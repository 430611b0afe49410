"""What tuning's tests share: a cache folder of their own, and a card that is not there."""

import sys
from pathlib import Path

import pytest

from batch_invariant_ops import tiles

sys.path.insert(0, str(Path(__file__).parent))  # importlib mode puts no test folder on the path


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("BATCH_INVARIANT_CACHE", str(tmp_path / "cache"))
    tiles.table_of.cache_clear()
    yield tmp_path / "cache"
    tiles.table_of.cache_clear()
