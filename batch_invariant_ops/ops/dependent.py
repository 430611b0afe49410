"""Kernels that are launched while the one before them ends, on cards since sm_90 (programmatic dependent launch).

Between two kernels of a stream a GPU is idle for about a microsecond, a quarter of what a small GEMM takes. A kernel
that :func:`follow` begins lets the next one be set up as soon as all of its own programs have begun, and waits for the
one before it until all is written, before it reads or writes anything itself. So what is computed, and of what, is the
same; a kernel that knows nothing of this waits, and is waited for, as ever. CUDA's programming guide describes it.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch

try:
    import triton
except ImportError:
    triton = None
try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # a Triton that does not know of it
    gdc_wait = None

CAPABILITY = (9, 0)
DRIVER = 12030
"""From CUDA 12.3 on a graph keeps what it captured of such a launch."""

KERNELS: tuple[Any, ...] = ()
if gdc_wait is not None:

    @triton.jit
    def follow():
        """The first thing that a kernel does which is launched so."""
        gdc_launch_dependents()
        gdc_wait()

    KERNELS = (follow,)
elif triton is not None:

    @triton.jit
    def follow():
        """Never called, but named by kernels."""


@functools.cache
def follows(capability: tuple[int, int]) -> bool:
    """Whether kernels can, on a card of that capability."""
    return capability >= CAPABILITY and _known()


def options(follows: bool) -> dict[str, Any]:
    """For Triton's launcher; releases that do not know of it would refuse the name."""
    return {"launch_pdl": True} if follows else {}


@functools.cache
def _known() -> bool:
    """Whether driver and Triton know of it; its interpreter does not."""
    if gdc_wait is None or triton.knobs.runtime.interpret or not torch.version.cuda:
        return False
    from triton.backends.nvidia.compiler import CUDAOptions

    return "launch_pdl" in CUDAOptions.__dataclass_fields__ and _driver() >= DRIVER


def _driver() -> int:
    """The newest CUDA that the driver knows, as 12030 for 12.3."""
    version = ctypes.c_int()
    found = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion(ctypes.byref(version)) == 0
    return version.value if found else 0
