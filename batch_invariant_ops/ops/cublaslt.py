"""cuBLASLt's matmul without workspace or splits of K, its kernel asked for once a shape, and kept.

torch asks cuBLASLt anew at every call. Without workspace that took the host of an H200 0.4 to 0.9 ms, many times what a
launch takes, and was most of the time of a step that no graph launches. So the library that torch has loaded is called
here past torch, through ctypes. Names and numbers are those of NVIDIA's ``cublasLt.h``, alike from CUDA 11 to 13.

cuBLASLt answers with several kernels, the one that it deems the fastest first. Which of them is was measured for the
shapes and M of a card's table (:mod:`batch_invariant_ops.tiles`), and that one runs there, and shortly below. Its place
among the others is another at another M, so that there it is the kernel that counts, not the place.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
from collections.abc import Collection
from typing import Any

import torch

from batch_invariant_ops import tiles
from batch_invariant_ops.ops.launching import empty
from batch_invariant_ops.ops.rows import on_device_of

logger = logging.getLogger(__name__)

ROUNDING = ((512, 1), (2048, 32), (tiles.NO_LIMIT, 64))
"""(largest M, step): so many rows get the kernel of the next multiple of so many, whose tiles are hardly more."""
KERNELS = 8
"""That are asked for; there may be fewer."""
NEAR = 0.75
"""Of a measured M, from which on up to it the kernel that was the fastest there is taken, if cuBLASLt lists it."""
PLANS = 16384
"""Kept at a time, about a kilobyte each; a start makes some 700 for each shape of its model."""

Shape = tuple[int, int, torch.dtype, bool, bool, int]
"""N, K, dtype, whether there is a bias, whether it is w [N, K] that is packed rather than wᵀ, and the GPU's index."""

_TYPES = {torch.float32: 0, torch.float16: 2, torch.bfloat16: 14}  # cudaDataType_t
_COMPUTE_32F, _SCALE_32F, _OP_T, _EPILOGUE_BIAS = 68, 0, 1, 4
_DESC_TRANSA, _DESC_EPILOGUE, _DESC_BIAS_POINTER = 3, 7, 8
_PREF_MAX_WORKSPACE_BYTES, _PREF_REDUCTION_SCHEME_MASK, _REDUCTION_SCHEME_NONE = 1, 3, 0
_SOME_ALIGNED_ADDRESS = 4096  # only its alignment is looked at

_ONE, _ZERO = ctypes.c_float(1), ctypes.c_float(0)
_ALPHA, _BETA = ctypes.addressof(_ONE), ctypes.addressof(_ZERO)

_ARGUMENTS: dict[str, list[Any]] = {
    "Create": [ctypes.c_void_p],
    "Matmul": [*[ctypes.c_void_p] * 14, ctypes.c_size_t, ctypes.c_void_p],
    "MatmulAlgoCheck": [ctypes.c_void_p] * 8,
    "MatmulAlgoGetHeuristic": [*[ctypes.c_void_p] * 7, ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p],
    "MatmulDescCreate": [ctypes.c_void_p, ctypes.c_int, ctypes.c_int],
    "MatmulDescSetAttribute": [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t],
    "MatmulPreferenceCreate": [ctypes.c_void_p],
    "MatmulPreferenceDestroy": [ctypes.c_void_p],
    "MatmulPreferenceSetAttribute": [ctypes.c_void_p, ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t],
    "MatrixLayoutCreate": [ctypes.c_void_p, ctypes.c_int, ctypes.c_uint64, ctypes.c_uint64, ctypes.c_int64],
    "MatrixLayoutDestroy": [ctypes.c_void_p],
}


class NoKernel(RuntimeError):
    """cuBLASLt has none for a GEMM that needs neither workspace nor a split."""


class _Algorithm(ctypes.Structure):
    """``cublasLtMatmulHeuristicResult_t``, which begins with the algorithm itself."""

    _fields_ = (
        ("data", ctypes.c_uint64 * 8),
        ("workspace", ctypes.c_size_t),
        ("state", ctypes.c_int),
        ("waves", ctypes.c_float),
        ("reserved", ctypes.c_int * 4),
    )


def _loaded() -> ctypes.CDLL:
    return ctypes.CDLL(f"libcublasLt.so.{(torch.version.cuda or '').split('.')[0]}")


@functools.cache
def library() -> Any:
    """The library, or None where torch has none or it lacks a function; the log then says so."""
    if torch.version.cuda is None:
        return None
    try:
        found = _loaded()
        for name, arguments in _ARGUMENTS.items():
            getattr(found, f"cublasLt{name}").argtypes = arguments
    except (OSError, AttributeError) as error:
        logger.warning("cuBLASLt is called through torch, which takes the host longer: %s", error)
        return None
    return found


@functools.cache
def version() -> str:
    """cuBLASLt's own version number, or CUDA's where the library does not tell."""
    try:
        tell = _loaded().cublasLtGetVersion
    except (OSError, AttributeError):
        return f"of CUDA {torch.version.cuda}"
    tell.restype = ctypes.c_size_t
    return str(tell())


def ranks(n: int, k: int, dtype: torch.dtype, device: torch.device) -> tiles.Ranks:
    """The places of the fastest kernels, by M, as far as a table says."""
    return tiles.ranks(n, k, dtype, *tiles.card(device), version())


def gemm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, rank: int | None = None) -> torch.Tensor:
    """a [M, K] · b [K, N] + bias [N] → [M, N] on a GPU, the sum and the bias in fp32, rounded once.

    a is packed, and b or its transpose; all start at multiples of 256 bytes, as memory from torch's allocator does. At
    home in a CUDA graph's capture, too.

    Args:
        rank: the kernel's place in cuBLASLt's order; by default what the card's table says, else the first.

    Raises:
        NoKernel: cuBLASLt has no such kernel for this shape, or not as many.
        RuntimeError: it could not launch one.
    """
    num_rows, depth = a.shape
    width = b.shape[1]
    plan = _plan((width, depth, a.dtype, bias is not None, b.stride(0) == 1, a.get_device()), num_rows, rank)
    with on_device_of(a):
        return plan.run(a, b, bias)


def kernel(shape: Shape, num_rows: int) -> bytes:
    """What tells the kernel that :func:`gemm` runs by default from others: cuBLASLt's own description of it.

    Raises:
        NoKernel: see there.
    """
    return bytes(_plan(shape, num_rows, None).algorithm.data)


def rounded(num_rows: int) -> int:
    """The number of rows, no less, that is asked for.

    >>> rounded(512), rounded(513), rounded(2048), rounded(2049)
    (512, 544, 2048, 2112)
    """
    step = next(step for largest, step in ROUNDING if num_rows <= largest)
    return -(-num_rows // step) * step


def restrict(shape: Shape, above: int, kernels: Collection[bytes]) -> None:
    """Have numbers of rows beyond ``above`` that the kernel of their :func:`rounded` does not serve run one of these.

    Where cuBLASLt lists none of them there is no kernel. Nothing else is restricted: these numbers are too many to be
    looked at one by one when a server starts.
    """
    _allowed[shape] = above, frozenset(kernels)


def near(measured: tiles.Ranks, num_rows: int) -> tuple[int, int]:
    """The measured M that is no less than a number of rows, and near, with its kernel's place; else these, and 0.

    >>> near(((32, 1), (64, 0), (96, 2)), 30), near(((32, 1),), 23), near(((32, 1),), 33)
    ((32, 1), (23, 0), (33, 0))
    """
    for m, place in measured:
        if num_rows <= m:
            return (m, place) if num_rows >= NEAR * m else (num_rows, 0)
    return num_rows, 0


class _Plan:
    """A GEMM of one shape and M: all that a launch takes besides addresses."""

    def __init__(self, shape: Shape, num_rows: int, rank: int | None) -> None:
        n, k, dtype, _, weight_is_packed, index = shape
        self.n, self.num_rows, self.index = n, num_rows, index
        self.handle, (self.operation, self.lock) = _handle(index), _operation(shape)
        # cuBLAS sees matrices column by column: y [N, M] = w [N, K] · x [K, M]
        self.weight = _Layout(dtype, *((k, n) if weight_is_packed else (n, k)))
        self.rows = _Layout(dtype, k, num_rows)
        self.result = _Layout(dtype, n, num_rows)
        self.algorithm = self._algorithm(shape, rank)
        self.algorithm_address = ctypes.addressof(self.algorithm)

    def run(self, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        y = empty(self.num_rows, self.n, a)
        at = y.data_ptr()
        result = self.result.address
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        arguments = (
            self.handle, self.operation,
            _ALPHA, b.data_ptr(), self.weight.address, a.data_ptr(), self.rows.address,
            _BETA, at, result, at, result,
            self.algorithm_address, None, 0, stream,
        )  # fmt: skip
        if bias is None:
            status = library().cublasLtMatmul(*arguments)
        else:
            with self.lock:  # the bias's address is part of the operation, which all calls of this shape share
                _set("MatmulDesc", self.operation, _DESC_BIAS_POINTER, ctypes.c_void_p(bias.data_ptr()))
                status = library().cublasLtMatmul(*arguments)
        _check("Matmul", status)
        return y

    def _algorithm(self, shape: Shape, rank: int | None) -> _Algorithm:
        next_asked = rounded(self.num_rows)
        if next_asked != self.num_rows:
            found, checked = _plan(shape, next_asked, rank).algorithm, _Algorithm()
            status = library().cublasLtMatmulAlgoCheck(*self._problem(), ctypes.byref(found), ctypes.byref(checked))
            if status == 0 and checked.workspace == 0:
                return found
        if rank is not None:
            return self._kernel(rank)
        n, k, dtype, *_ = shape
        measured, place = near(ranks(n, k, dtype, torch.device("cuda", self.index)), self.num_rows)
        if next_asked == self.num_rows and (measured == self.num_rows or place == 0):
            try:
                return self._kernel(place)
            except NoKernel:  # it was measured for operands of another type, or without a bias
                return self._kernel(0)
        listed = self._kernels(KERNELS)
        if next_asked != self.num_rows and shape in _allowed and self.num_rows > _allowed[shape][0]:
            listed = [one for one in listed if bytes(one.data) in _allowed[shape][1]]
            if not listed:
                raise NoKernel(f"cuBLASLt lists no kernel that was proven for {self.num_rows} rows")
        fastest = bytes(_plan(shape, measured, None).algorithm.data) if place else None
        return next((one for one in listed if bytes(one.data) == fastest), listed[0])

    def _kernel(self, rank: int) -> _Algorithm:
        """The one at that place in cuBLASLt's order."""
        kernels = self._kernels(rank + 1)
        if len(kernels) <= rank:
            raise NoKernel(f"cuBLASLt has {len(kernels)} kernels without workspace for {self.num_rows} rows")
        return kernels[rank]

    def _kernels(self, most: int) -> list[_Algorithm]:
        """The first of them in cuBLASLt's order, at least one."""
        preference = _create("MatmulPreference")
        try:
            workspace, schemes = ctypes.c_uint64(0), ctypes.c_uint32(_REDUCTION_SCHEME_NONE)
            _set("MatmulPreference", preference, _PREF_MAX_WORKSPACE_BYTES, workspace)
            _set("MatmulPreference", preference, _PREF_REDUCTION_SCHEME_MASK, schemes)
            found, count = (_Algorithm * most)(), ctypes.c_int()
            status = library().cublasLtMatmulAlgoGetHeuristic(
                *self._problem(), preference, most, found, ctypes.byref(count)
            )
        finally:
            library().cublasLtMatmulPreferenceDestroy(preference)
        kernels = [kernel for kernel in found[: count.value] if kernel.state == 0]
        if status or not kernels:
            raise NoKernel(f"cuBLASLt has no kernel without workspace for {self.num_rows} rows")
        return kernels

    def _problem(self) -> tuple[int, ...]:
        result = self.result.address
        return self.handle, self.operation, self.weight.address, self.rows.address, result, result


_plan = functools.lru_cache(maxsize=PLANS)(_Plan)
_allowed: dict[Shape, tuple[int, frozenset[bytes]]] = {}


class _Layout:
    """A matrix of packed columns, as cuBLASLt describes it, while this object lives."""

    def __init__(self, dtype: torch.dtype, num_rows: int, num_columns: int) -> None:
        self.address = _create("MatrixLayout", _TYPES[dtype], num_rows, num_columns, num_rows)
        self._destroy = library().cublasLtMatrixLayoutDestroy

    def __del__(self) -> None:
        if hasattr(self, "_destroy"):
            self._destroy(self.address)


@functools.cache
def _handle(index: int) -> int:
    """A GPU's; it lives as long as the process."""
    with torch.cuda.device(index):
        return _create("")


@functools.cache
def _operation(shape: Shape) -> tuple[int, threading.Lock]:
    """y = w·x or wᵀ·x, with or without a bias, and its lock; there are as many as a model has shapes, and they stay."""
    *_, has_bias, weight_is_packed, _ = shape
    made = _create("MatmulDesc", _COMPUTE_32F, _SCALE_32F)
    if weight_is_packed:
        _set("MatmulDesc", made, _DESC_TRANSA, ctypes.c_int32(_OP_T))
    if has_bias:
        _set("MatmulDesc", made, _DESC_EPILOGUE, ctypes.c_uint32(_EPILOGUE_BIAS))
        _set("MatmulDesc", made, _DESC_BIAS_POINTER, ctypes.c_void_p(_SOME_ALIGNED_ADDRESS))
    return made, threading.Lock()


def _create(kind: str, *arguments: int) -> int:
    made = ctypes.c_void_p()
    _check(f"{kind}Create", getattr(library(), f"cublasLt{kind}Create")(ctypes.byref(made), *arguments))
    return made.value or 0


def _set(kind: str, of: int, attribute: int, value: Any) -> None:
    setter = getattr(library(), f"cublasLt{kind}SetAttribute")
    _check(f"{kind}SetAttribute", setter(of, attribute, ctypes.byref(value), ctypes.sizeof(value)))


def _check(function: str, status: int) -> None:
    """Raise RuntimeError unless a function of the library's succeeded."""
    if status:
        raise RuntimeError(f"cublasLt{function} failed with status {status}")
