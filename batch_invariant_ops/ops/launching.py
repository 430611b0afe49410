"""A Triton kernel's launch, with less of the host's time than Triton takes to find the compiled form of a kernel."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any


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
