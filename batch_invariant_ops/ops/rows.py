"""Rows as the row kernels take them: two-dimensional, packed along the row, aligned by a rule of the length alone.

Triton spreads a row over threads by what it knows of the addresses' alignment, and the order of a reduction follows.
So alignment must not be a matter of where a row happens to lie: it is a function of the row's length and type, and a
row that does not have it is copied.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence

import torch

try:
    import triton
except ImportError:  # the CPU forms need no Triton
    triton = None

SUPPORTED_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ALIGNMENT = 16


def check_dtype(x: torch.Tensor, operation: str) -> None:
    """Raise ValueError unless x is of a type that the row operations take."""
    if x.dtype not in SUPPORTED_DTYPES:
        raise ValueError(f"{operation}: {x.dtype} is not supported: one of {', '.join(map(str, SUPPORTED_DTYPES))}")


def is_aligned(length: int, dtype: torch.dtype) -> bool:
    """Whether rows of that length start at multiples of 16 bytes when they lie one after the other."""
    return length * dtype.itemsize % ALIGNMENT == 0


def as_rows(x: torch.Tensor, length: int) -> torch.Tensor:
    """x [..., length] as [rows, length] with stride 1 along a row, aligned if :func:`is_aligned`; copied if it must."""
    rows = x if x.dim() == 2 and x.shape[1] == length else x.reshape(-1, length)
    step, element = rows.stride()
    if element == 1 or length == 1:
        if not is_aligned(length, x.dtype):
            return rows
        if rows.data_ptr() % ALIGNMENT == 0 and (step * x.itemsize % ALIGNMENT == 0 or rows.shape[0] == 1):
            return rows
    return rows.clone(memory_format=torch.contiguous_format)


def row_step(matrix: torch.Tensor) -> int:
    """Elements from one row of a matrix to the next; of a row that is alone torch may say anything."""
    return matrix.stride(0) if matrix.shape[0] > 1 else matrix.shape[1]


def split_dims(x: torch.Tensor, dims: Sequence[int]) -> tuple[torch.Tensor, int]:
    """x with ``dims`` moved last and flattened, [kept..., length], and that length."""
    reduced = sorted(dim % x.dim() for dim in dims) if x.dim() else []
    kept = [dim for dim in range(x.dim()) if dim not in reduced]
    length = math.prod(x.shape[dim] for dim in reduced)
    return x.permute([*kept, *reduced]).reshape([x.shape[dim] for dim in kept] + [length]), length


def uses_triton(x: torch.Tensor) -> bool:
    """Whether the Triton kernel runs on x: on a GPU, and on a CPU under Triton's interpreter.

    Raises:
        RuntimeError: x is on a GPU and Triton is not installed.
    """
    if x.device.type == "cpu":
        return triton is not None and triton.knobs.runtime.interpret
    if triton is None:
        raise RuntimeError(f"an operation on {x.device} needs Triton, which is not installed: `pip install triton`")
    return True


_HERE = contextlib.nullcontext()


def on_device_of(x: torch.Tensor) -> contextlib.AbstractContextManager:
    """Launches inside go to the GPU that holds x."""
    if not x.is_cuda or x.get_device() == torch._C._cuda_getDevice():
        return _HERE
    return torch.cuda.device(x.device)
