"""Runs interpreted_kernels.py with TRITON_INTERPRET=1, which Triton reads when it is imported."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
KERNELS = Path(__file__).with_name("interpreted_kernels.py")


def test_kernels_hold_under_tritons_interpreter():
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(KERNELS)],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        cwd=KERNELS.parents[2],
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


def test_without_triton_the_cpu_form_works_and_a_gpu_says_what_is_missing():
    code = """
import sys
sys.modules["triton"] = None
import torch
import batch_invariant_ops as ours
with ours.set_batch_invariant_mode():
    print((torch.ones(2, 3) @ torch.ones(3, 4)).sum().item(), ours.rms_norm(torch.ones(2, 3)).sum().item())
from batch_invariant_ops.ops import rows
class OnGpu:
    device = torch.device("cuda", 0)
try:
    rows.uses_triton(OnGpu())
except RuntimeError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=KERNELS.parents[2], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    values, message = done.stdout.splitlines()
    assert values.startswith("24.0 ")
    assert message == "an operation on cuda:0 needs Triton, which is not installed: `pip install triton`"
