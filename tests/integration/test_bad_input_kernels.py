"""A torch without Triton, and a card that no tile table knows: what can work does, the rest says what is missing.

serve.py's own refusal is in test_serve_settings.py, the choice of a tile in test_tiles.py, every tile's bits in gpu/.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
NO_TABLE = "no tile table for compute capability 0.0: one fixed tile, correct but slower"


def run(code, **env):
    done = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | env, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    return done


NO_TRITON = "import sys; sys.modules['triton'] = None\n"
SELF_CHECK = """
import torch
from batch_invariant_ops import selfcheck
report = selfcheck.run(torch.device("cpu"))
print(report.ok, report.failed)
"""
ON_A_DEVICE = """
import torch
from batch_invariant_ops import matmul_persistent
x = torch.empty(4, 4, device="meta")  # a device that is no CPU
try:
    matmul_persistent(x, x)
except RuntimeError as error:
    print(error)
"""


def test_without_triton_a_cpu_serves_and_passes_the_self_check():
    assert run(NO_TRITON + SELF_CHECK).stdout == run(SELF_CHECK).stdout == "True ()\n"


def test_without_triton_a_product_on_another_device_says_what_to_install():
    """The row operations' own words are in tests/ops."""
    assert run(NO_TRITON + ON_A_DEVICE).stdout == (
        "a GEMM on meta needs Triton, which is not installed: `pip install triton`\n"
    )


PRODUCT = """
import logging
import torch
from batch_invariant_ops import matmul_persistent, tiles
from batch_invariant_ops.proof import same_bits
logging.basicConfig(level=logging.INFO, format="%(message)s")
generator = torch.Generator().manual_seed(0)
a, b = (torch.randn(*shape, generator=generator).half() for shape in ((70, 40), (40, 65)))
y = matmul_persistent(a, b)
assert torch.allclose(y.double(), a.double() @ b.double(), atol=1e-2, rtol=1e-3)
assert all(same_bits(matmul_persistent(a[row : row + 1].clone(), b), y[row : row + 1]) for row in (0, 63, 64, 69))
"""
INTERPRETED = {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}


def test_an_unknown_card_gets_sums_that_are_right_and_the_same_alone_and_is_told_of_it_once():
    pytest.importorskip("triton")
    assert run(PRODUCT, **INTERPRETED).stderr.splitlines().count(NO_TABLE) == 1


def test_a_known_card_is_told_nothing():
    pytest.importorskip("triton")
    table = "tiles.table_of = lambda *card: tiles.Table((0, 0), 'a card', ((2**62, tiles.SAFE),), {})"
    known = PRODUCT.replace("logging.basicConfig", f"{table}\nlogging.basicConfig")
    assert NO_TABLE not in run(known, **INTERPRETED).stderr
