"""Which launches of a kernel share one compiled form: those in which Triton sees the same."""

import subprocess
import sys

import pytest
import torch

from batch_invariant_ops.ops.launching import seen


def part(tensor, block):
    """A description for the copy engine, where this Triton has them."""
    descriptor = pytest.importorskip("triton.tools.tensor_descriptor").TensorDescriptor
    return descriptor(tensor, [*tensor.shape], [*tensor.stride()], block)


def test_what_triton_compiles_anew_for_is_told_apart():
    room = torch.zeros(4, 64, dtype=torch.bfloat16)
    operands = [None, 1, 16, 17, 2**31, room, room[0, 1:], room.half(), room.float()]
    operands += [part(room, [4, 16]), part(room, [4, 32]), part(room.half(), [4, 16])]
    kept = [*map(seen, operands)]
    assert len({*kept}) == len(operands)


def test_what_it_does_not_compile_anew_for_is_one():
    room = torch.zeros(4, 64, dtype=torch.bfloat16)
    assert seen(room) == seen(room[1:]) == seen(room.clone())
    assert seen(48) == seen(4096) and seen(3) == seen(17)
    assert seen(part(room, [4, 16])) == seen(part(room[1:], [4, 16]))


# a Hopper card is compiled for, which this machine need not have; what its driver would be given is kept instead
LAUNCHES = """
import torch
from triton.compiler.compiler import CompiledKernel
from triton.runtime.driver import driver
from batch_invariant_ops import tiles
from batch_invariant_ops.ops import dependent, matmul
from batch_invariant_ops.tuning.compiling import _Elsewhere

dependent._driver = lambda: 13000
driver.set_active(_Elsewhere(90))
given = []
CompiledKernel._init_handles = lambda self: None
CompiledKernel.run = property(lambda self: lambda *arguments: given.append(arguments))
CompiledKernel.function = None
CompiledKernel.launch_metadata = lambda self, *arguments: None
Tile = tiles.Tile
for tile in (
    Tile(64, 64, 64, 4, 3),
    Tile(64, 64, 64, 4, 3, form=tiles.COPYING, follows=True),
    Tile(128, 256, 64, 8, 3, form=tiles.FLATTENED),
    Tile(64, 80, 64, 4, 4, form=tiles.SPECIALISED),
    Tile(16, 40, 128, 4, 4, swap=True, form=tiles.SPECIALISED, follows=True),
):
    for k, has_bias in (4096, True), (1000, False):
        x, w = (torch.empty(size, k, dtype=torch.bfloat16, device="meta") for size in (300, 1280))
        bias = x.new_empty(1280) if has_bias else None
        kernel, grid, operands, options = matmul._call(x[None], w.t()[None], bias, x.new_empty(1, 300, 1280), tile)
        launch = matmul._launcher(kernel)
        given.clear()
        for _ in range(2):
            launch(matmul._launch_key(x, operands, options), (*grid, 1), operands, options)
        searched, kept = given
        assert len(searched) == len(kept) > 20, tile
        for one, other in zip(searched, kept):
            assert one is other or (not isinstance(one, torch.Tensor) and one == other), (tile, one, other)
assert sum(len(matmul._launcher(kernel).compiled) for kernel in matmul.KERNELS) == 10
print("alike")
"""


def test_a_kept_kernel_is_launched_with_what_tritons_own_search_launches_it_with():
    """The second launch of each is of what the first, which was Triton's, had found."""
    pytest.importorskip("triton.tools.tensor_descriptor")
    child = subprocess.run([sys.executable, "-c", LAUNCHES], capture_output=True, text=True, timeout=300)
    assert child.stdout.strip() == "alike", child.stderr[-3000:]
