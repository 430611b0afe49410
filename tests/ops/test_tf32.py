"""Products of fp32 in TF32: where torch's own switch asks for them, by one instruction a card, and nowhere else."""

import subprocess
import sys

import pytest
import torch

from batch_invariant_ops import reduction, tiles

COMPILED = """
import itertools, re, sys, torch
from triton.runtime.driver import driver
from batch_invariant_ops import tiles
from batch_invariant_ops.ops import matmul
from batch_invariant_ops.tuning.compiling import _Elsewhere

arch = int(sys.argv[1])
driver.set_active(_Elsewhere(arch))
for precision, one, hopper in (("ieee", tiles.FP32, tiles.HOPPER_FP32), ("tf32", tiles.TF32, tiles.HOPPER_TF32)):
    torch.backends.cuda.matmul.fp32_precision = precision
    found = set()
    for tile in [one, *(pace.tile for pace in hopper if arch == 90)]:
        for m, transposed in itertools.product((1, 300), (False, True)):
            x, w = (torch.empty(*shape, device="meta") for shape in ((m, 512), (512, 640)))
            kernel = matmul.warm_up(x, w.t().contiguous().t() if transposed else w, tile=tile)
            found |= set(re.findall(r"(?:wgmma|mma|tcgen05|fma)\\S*f32\\b\\S*", kernel.asm["ptx"]))
    print(*sorted(found))
"""
WIDTHS = (128, 16, 256, 32, 64)
"""Of wgmma's second operand, in the order of its names: how many sums there are, not how one is made."""


@pytest.fixture
def switch():
    """torch's own, as it was again at the end."""
    matmul_settings = torch.backends.cuda.matmul
    before = matmul_settings.fp32_precision
    yield matmul_settings
    torch.set_float32_matmul_precision("highest")
    matmul_settings.fp32_precision = before


def test_torchs_switch_decides_for_fp32_alone(switch):
    for precision, asked in (("ieee", False), ("tf32", True), ("none", False)):
        switch.fp32_precision = precision
        assert reduction.in_tf32(torch.float32) is asked
        assert not reduction.in_tf32(torch.bfloat16) and not reduction.in_tf32(torch.float16)


def test_its_other_name_is_heard_too(switch):
    torch.set_float32_matmul_precision("high")
    assert reduction.in_tf32(torch.float32)
    torch.set_float32_matmul_precision("highest")
    assert not reduction.in_tf32(torch.float32)


def test_its_tiles_are_others_than_those_of_fp32_as_it_is(switch):
    def chosen(capability):
        return {tiles.choose(m, 640, 512, torch.float32, "a card", capability) for m in (1, 17, 300, 8192)}

    assert chosen((8, 0)) == {tiles.FP32}
    assert chosen((9, 0)) <= {pace.tile for pace in tiles.HOPPER_FP32}
    switch.fp32_precision = "tf32"
    assert chosen((8, 0)) == {tiles.TF32}
    assert chosen((9, 0)) <= {pace.tile for pace in tiles.HOPPER_TF32}


@pytest.mark.parametrize(
    "capability, tf32",
    [
        (80, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
        (89, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
        (90, " ".join(f"wgmma.mma_async.sync.aligned.m64n{n}k8.f32.tf32.tf32" for n in WIDTHS)),
        (120, "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32"),
    ],
)
def test_a_card_has_one_instruction_for_each_whatever_the_rows_and_the_weights_layout(capability, tf32):
    pytest.importorskip("triton")
    command = [sys.executable, "-W", "ignore", "-c", COMPILED, str(capability)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines() == ["fma.rn.f32", tf32], done.stdout + done.stderr
