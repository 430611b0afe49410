"""What the benchmark of serving takes for the GPU's time."""

import pytest


@pytest.mark.parametrize(
    "spans, expected",
    [([], 0), ([(1, 3), (5, 6)], 3), ([(0, 10), (2, 3), (9, 12)], 12), ([(4, 5), (0, 4)], 5), ([(0, 1), (0, 1)], 1)],
)
def test_kernels_that_run_beside_one_another_count_once(benchmark_module, spans, expected):
    assert benchmark_module("serving").covered(spans) == expected
