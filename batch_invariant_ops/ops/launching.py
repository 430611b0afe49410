"""Launches that take little of the host's time: a step that no CUDA graph launches waits for all of them, and a graph's
capture at a server's start.

Microseconds of a call on the host of an H200, vLLM 0.26's: Triton's own search for a kernel's compiled form 25, torch's
``new_empty`` some three times that of the allocation that torch.compile's code makes.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import torch

try:
    from torch._C._dynamo.guards import _empty_strided_cuda  # type: ignore[attr-defined]
except ImportError:
    _empty_strided_cuda = None


def empty(num_rows: int, num_columns: int, like: torch.Tensor) -> torch.Tensor:
    """A packed matrix of the type of ``like``, on the same device, which is the current one if it is a GPU."""
    if _empty_strided_cuda is None or not like.is_cuda:
        return like.new_empty((num_rows, num_columns))
    return _empty_strided_cuda((num_rows, num_columns), (num_columns, 1), like.dtype)


class Launcher:
    """Launches of one kernel, whose compiled forms are found by a key of the caller's.

    Args:
        kernel: a ``triton.jit`` function.
    """

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel
        self.compiled: dict[Hashable, tuple[Any, tuple[Any, ...]]] = {}

    def __call__(
        self, key: Hashable, grid: tuple[int, int, int], operands: Sequence[Any], options: Mapping[str, Any]
    ) -> None:
        """Launch on the current device's current stream.

        Args:
            key: all that Triton would compile the kernel anew for: the device, types, constants, and what it sees in
                numbers.
            grid: programs along each axis.
            operands: the kernel's arguments in order, up to some that ``options`` has by name.
            options: those, and the compiler's, as ``num_warps``. The key tells different ones apart.
        """
        found = self.compiled.get(key)
        if found is not None:
            compiled, rest = found
            compiled[grid](*operands, *rest)
            return
        compiled = self.kernel[grid](*operands, **options)
        if compiled is not None:  # as from the interpreter
            names = self.kernel.arg_names[len(operands) :]
            self.compiled[key] = compiled, tuple(options[name] for name in names)


def seen(operand: Any) -> Hashable:
    """What Triton sees in an argument of a kernel and compiles it for, of each that a key is to have."""
    if isinstance(operand, int):
        return operand == 1, operand % 16 == 0, operand >= 2**31
    if isinstance(operand, torch.Tensor):
        return operand.dtype, operand.data_ptr() % 16 == 0
    return operand and (operand.base.dtype, *operand.block_shape)  # None, or a description for the copy engine
