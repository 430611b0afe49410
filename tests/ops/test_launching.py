"""Which launches of a kernel share one compiled form: those in which Triton sees the same."""

import pytest
import torch

from batch_invariant_ops.ops.launching import Launcher, seen


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


class Compiled:
    """Stands for a compiled kernel: tells what it was launched with."""

    def __init__(self, launched):
        self.launched = launched

    def __getitem__(self, grid):
        return lambda *operands: self.launched.append((grid, operands))


class Kernel:
    """Stands for a kernel that Triton compiles at each call of its own."""

    arg_names = ("x", "M", "WIDE", "FOLLOWS")

    def __init__(self):
        self.searches, self.launched = [], []

    def __getitem__(self, grid):
        def search(*operands, **options):
            self.searches.append((grid, operands, options))
            return Compiled(self.launched)

        return search


def test_a_kernel_is_searched_for_once_and_gets_its_constants_in_its_own_order():
    kernel = Kernel()
    launch, options = Launcher(kernel), {"FOLLOWS": False, "num_warps": 4, "WIDE": True}
    for m in (3, 5, 7):
        launch("key", (m, 1, 1), ("x", m), options)
    assert kernel.searches == [((3, 1, 1), ("x", 3), options)]
    assert kernel.launched == [((m, 1, 1), ("x", m, True, False)) for m in (5, 7)]
    launch("other", (1, 1, 1), ("x", 1), options | {"WIDE": False})
    assert len(kernel.searches) == 2
