"""Launches that take little of the host's time: a step that no CUDA graph launches waits for all of them.

Microseconds of a call on the host of an H200, vLLM 0.26's: Triton's own search for a kernel's compiled form 25, torch's
``new_empty`` some three times that of the allocation that torch.compile's code makes.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
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
        self.compiled: dict[Hashable, Any] = {}

    def __call__(self, key: Hashable, grid: tuple[int, int, int], operands: Sequence[Any], **options: int) -> None:
        """Launch on the current device's current stream.

        Args:
            key: all that Triton would compile the kernel anew for: the device, types, constants, and what it sees in
                numbers.
            grid: programs along each axis.
            operands: the kernel's arguments in order, constants included.
            options: the compiler's, as ``num_warps``.
        """
        compiled = self.compiled.get(key)
        if compiled is None:
            self.compiled[key] = self.kernel[grid](*operands, **options)  # None from the interpreter
        else:
            compiled[grid](*operands)
