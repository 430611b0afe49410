"""The proofs of one GEMM on one device: over a sample of M at a server's start, over every M once, to keep.

On a GPU the bits to keep are our Triton kernel's, so that both mix freely. On a CPU, where it does not run, they are
the vendor's own at the largest M.
"""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterable, Iterator, Sequence

import torch

from batch_invariant_ops import certificates, tiles
from batch_invariant_ops.certificates import Case, Certificate
from batch_invariant_ops.ops import cublaslt, vendor_gemm
from batch_invariant_ops.ops import matmul as own
from batch_invariant_ops.proof import Gemm, Progress, Window, agreement, probe, window_of

logger = logging.getLogger(__name__)

LARGER_SIZES = (513, 640, 768, 1000, 1024, 1536, 2048, 3000, 4096, 6000, 8192, 12288, 16384)
SAMPLE = (*range(1, 513), *LARGER_SIZES)
"""Every M up to the largest CUDA graph's, as steps of prompts and answers have them, and a spread above."""
REPEATED = (1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), *tiles.STEPS, 8192)
"""M of the steps that CUDA graphs launch, and one above: what confirms a kept proof."""
ALIGNMENT = 256
"""Of all operands, in bytes: cuBLASLt chooses its kernel by theirs up to this, and torch's allocator gives more."""
LARGEST_FLOOR = 64
LARGEST_OUTPUT = 2**29
SMALLEST_CAP = 512


def settle(case: Case, device: torch.device) -> Window | None:
    """Where the vendor may run: by a kept certificate that a few values of M confirm, else by a sample of M.

    Returns:
        The window, or None: our kernel is to run.
    """
    certificate = certificates.load(case, device)
    if certificate is not None:
        if certificate.window is None:
            return None
        try:
            window = _confirmed(case, device, certificate, certificate.window)
        except torch.OutOfMemoryError:  # a sample makes do with less, and is no better than what is kept
            torch.cuda.empty_cache()
            return sample(case, device, keep=False)
        if window is not None:
            return window
        logger.warning("linear %s: the vendor's bits are not those of its certificate, which is ignored", case)
    return sample(case, device)


def _confirmed(case: Case, device: torch.device, certificate: Certificate, window: Window) -> Window | None:
    """A certificate's window, and as far beyond it as a sample shows; None where the vendor is seen to be another.

    Raises:
        torch.OutOfMemoryError: the operands and results do not fit into the device's memory.
    """
    repeated = {min(max(size, window.floor), window.cap) for size in REPEATED}
    proven = frozenset(map(bytes.fromhex, certificate.kernels))
    if proven and not _kernels(case, device, repeated) <= proven:
        return None
    # vLLM's steps may be longer than what was proven, and there our kernel would run
    larger = sizes_of(case, device, above=window.cap) if device.type == "cuda" else []
    if proven or larger:
        every = 0 if proven else window.cap
        cublaslt.restrict(_shape(case, device), every, proven | _kernels(case, device, larger))
    if all(verdicts := compare(case, device, sorted(repeated | {*larger}))):
        return dataclasses.replace(window, cap=max([window.cap, *larger]))
    return window if all(verdicts[: len(repeated)]) else None


def sample(case: Case, device: torch.device, keep: bool = True) -> Window | None:
    """The window over a sample of M; a GPU's is kept, as its kernels tell what of the M between was proven."""
    begin = time.perf_counter()
    sizes = sizes_of(case, device) or [1]
    while True:
        try:
            verdicts = compare(case, device, sizes)
            break
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            sizes = [size for size in sizes if size <= sizes[-1] // 2]
            if not sizes or sizes[-1] < SMALLEST_CAP:
                logger.warning("linear %s: too little memory is free for a proof", case)
                return None
    window = window_of(sizes, verdicts, LARGEST_FLOOR)
    kernels = _kernels(case, device, sizes)
    if kernels:
        cublaslt.restrict(_shape(case, device), 0, kernels)
    if keep and kernels and all(verdicts):
        names = tuple(sorted(kernel.hex() for kernel in kernels))
        _keep(case, device, Certificate(sizes[-1], (), window, time.perf_counter() - begin, names))
    return window


def _keep(case: Case, device: torch.device, certificate: Certificate) -> None:
    """For later starts, which are faster by it; a folder that nobody can write to costs no more than that."""
    try:
        certificates.save(case, device, certificate)
    except OSError as error:
        logger.debug("linear %s: its proof is not kept: %s", case, error)


def sizes_of(case: Case, device: torch.device, above: int = 0, largest: int = tiles.NO_LIMIT) -> list[int]:
    """A start's sample: sizes whose result is not too large for it, and one for each kernel that runs at no other.

    So where a GPU's vendor tells which kernel it runs, none goes unseen, however the sizes are spread.
    """
    sizes = [size for size in SAMPLE if above < size <= largest and size * case.n <= LARGEST_OUTPUT]
    if device.type != "cuda" or not sizes:
        return sizes
    seen = _kernels(case, device, sizes)
    more, asked = [], cublaslt.rounded(above + 1)
    while asked < sizes[-1]:
        # the one before is odd, for which many kernels do not serve
        for size in (asked - 1, asked):
            if size > above and (new := _kernels(case, device, [size]) - seen):
                seen |= new
                more.append(size)
        asked = cublaslt.rounded(asked + 1)
    return sorted({*sizes, *more})


def _kernels(case: Case, device: torch.device, sizes: Iterable[int]) -> frozenset[bytes]:
    """Those of the vendor's that run at these numbers of rows, as far as it tells."""
    if device.type != "cuda":
        return frozenset()
    shape = _shape(case, device)
    found = {vendor_gemm.kernel(shape, size) for size in sizes}
    return frozenset(kernel for kernel in found if kernel is not None)


def _shape(case: Case, device: torch.device) -> cublaslt.Shape:
    index = torch.cuda.current_device() if device.index is None else device.index
    return case.n, case.k, case.dtype, case.has_bias, case.weight_is_packed, index


def exhaustively(case: Case, device: torch.device, largest: int, progress: Progress | None = None) -> Certificate:
    """Compare every M from 1 to ``largest``.

    Raises:
        torch.OutOfMemoryError: the operands and results do not fit into the device's memory.
    """
    start = time.perf_counter()
    sizes = range(1, largest + 1)
    # the largest first: all later results fit into the memory that its result took
    verdicts = compare(case, device, sizes[::-1], progress)[::-1]
    window = window_of(sizes, verdicts, LARGEST_FLOOR)
    disagree = [size for size, agrees in zip(sizes, verdicts, strict=True) if not agrees]
    return Certificate(largest, tuple(_ranges(disagree)), window, time.perf_counter() - start)


@torch.no_grad()
def compare(case: Case, device: torch.device, sizes: Sequence[int], progress: Progress | None = None) -> list[bool]:
    """For each M, whether the vendor's bits are those to keep, in all rows, at the batch's first and last places."""
    x, w, bias = probe(max(sizes), case.n, case.k, case.dtype, device, case.has_bias)
    b = w.t() if case.weight_is_packed else w.t().contiguous()
    del w

    def vendor(rows: torch.Tensor) -> torch.Tensor:
        return vendor_gemm.call(rows.clone() if rows.data_ptr() % ALIGNMENT else rows, b, bias)

    reference: Gemm = vendor if device.type == "cpu" else lambda rows: own.gemm(rows, b, bias)
    return agreement(vendor, reference(x), x, sizes, progress=progress)


def _ranges(numbers: Sequence[int]) -> Iterator[tuple[int, int]]:
    """Ascending numbers as ranges, both ends included."""
    low = None
    for i, number in enumerate(numbers):
        low = number if low is None else low
        if i + 1 == len(numbers) or numbers[i + 1] != number + 1:
            yield low, number
            low = None
