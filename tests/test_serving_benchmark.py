"""What the benchmark of serving takes for the GPU's time."""

import importlib.util
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.mark.parametrize(
    "spans, expected",
    [([], 0), ([(1, 3), (5, 6)], 3), ([(0, 10), (2, 3), (9, 12)], 12), ([(4, 5), (0, 4)], 5), ([(0, 1), (0, 1)], 1)],
)
def test_kernels_that_run_beside_one_another_count_once(monkeypatch, spans, expected):
    monkeypatch.syspath_prepend(str(FOLDER))
    spec = importlib.util.spec_from_file_location("serving", FOLDER / "serving.py")
    serving = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(serving)
    assert serving.covered(spans) == expected
