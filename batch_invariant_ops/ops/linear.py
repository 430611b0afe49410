"""y = x·Wᵀ + b: the vendor's GEMM where its bits were proven to be our Triton kernel's, else our Triton kernel.

Both give the same bits, so they mix freely, and a proof that nobody could make costs speed, never bits. The choice is
made for each (N, K, dtype, bias, layout) when the op runs, never when a compiler traces it.
"""

from __future__ import annotations

import functools
import logging
import os
from collections.abc import Iterable

import torch

from batch_invariant_ops.ops import matmul as own
from batch_invariant_ops.proof import Window, find_window

logger = logging.getLogger(__name__)

CHOICES = ("auto", "vendor", "triton")
GRAPH_SIZES = (1, 2, 4, *range(8, 513, 8))
LARGER_SIZES = (3, 5, 17, 100, 513, 640, 768, 1000, 1024, 1536, 2048, 3000, 4096, 6000, 8192)
LARGEST_FLOOR = 64
LARGEST_OUTPUT = 2**29
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)

Key = tuple[int, int, torch.dtype, bool, bool, "int | None"]
_windows: dict[Key, Window | None] = {}


def choice() -> str:
    """``BATCH_INVARIANT_GEMM``: ``auto`` proves and then uses the vendor, ``triton`` never does, ``vendor`` must.

    Raises:
        ValueError: any other value.
    """
    value = os.environ.get("BATCH_INVARIANT_GEMM", "auto")
    if value not in CHOICES:
        raise ValueError(f"BATCH_INVARIANT_GEMM={value!r} is not valid: one of {', '.join(CHOICES)} is needed")
    return value


def linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    """y [..., N] = x [..., K] · w [N, K]ᵀ + b [N], each row's bits independent of all other rows.

    fp32 accumulation with k ascending, the bias joins in fp32, one rounding to the dtype of x. Opaque to
    ``torch.compile`` and usable in a CUDA graph.
    """
    return torch.ops.batch_invariant_ops.linear(x, w, b)


def gemm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a [M, K] · b [K, N] + bias [N] on a GPU, by the vendor where that was proven, else by our kernel."""
    if not _is_plain(a, b, bias):
        return own.gemm(a, b, bias)
    key = (b.shape[1], b.shape[0], a.dtype, bias is not None, b.stride(0) == 1, a.device.index)
    try:
        window = _windows[key]
    except KeyError:
        if torch.cuda.is_current_stream_capturing():
            return own.gemm(a, b, bias)
        window = _windows[key] = prove(b, bias)
    if window is None:
        return own.gemm(a, b, bias)
    return window.apply(lambda rows: _vendor(rows, b, bias), a)


def prove(
    b: torch.Tensor, bias: torch.Tensor | None, sizes: Iterable[int] = (*GRAPH_SIZES, *LARGER_SIZES)
) -> Window | None:
    """Compare the vendor's bits with our kernel's over M, for one b [K, N] and bias on its GPU.

    Returns:
        The window in which they agree, or None where ours is to run.

    Raises:
        RuntimeError: ``BATCH_INVARIANT_GEMM=vendor`` and they do not agree.
    """
    if choice() == "triton":
        return None
    k, n = b.shape
    tried = [size for size in sizes if size * n <= LARGEST_OUTPUT]
    generator = torch.Generator(device=b.device).manual_seed(0)
    x = torch.randn(max(tried), k, generator=generator, device=b.device, dtype=torch.float32).to(b.dtype)
    with torch.no_grad():
        reference = own.gemm(x, b, bias)
        window = find_window(lambda rows: _vendor(rows, b, bias), reference, x, tried, LARGEST_FLOOR)
    what = f"linear N={n} K={k} {str(b.dtype).removeprefix('torch.')}{' with bias' if bias is not None else ''}"
    if window is None and choice() == "vendor":
        raise RuntimeError(f"BATCH_INVARIANT_GEMM=vendor: {what}: the vendor's bits vary with M on this GPU")
    if window is None:
        logger.info("%s: the vendor's bits vary with M, our Triton kernel runs", what)
    else:
        logger.info("%s: vendor proven at %d values of M up to %d", what, window.tried, window.cap)
    return window


def prepare(weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Make the proof for a layer's weight [N, K] now, so that no request waits for it."""
    if weight.is_cuda and weight.dim() == 2 and weight.is_floating_point():
        gemm(weight.new_zeros(1, weight.shape[1]), weight.t(), bias)


def windows() -> dict[Key, Window | None]:
    """What was decided in this process, by (N, K, dtype, has bias, weight is row-major, GPU)."""
    return dict(_windows)


def _is_plain(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> bool:
    """Whether the operands are laid out as in the proof: packed, 16-byte aligned, of one 16- or 32-bit float type."""
    tensors = (a, b) if bias is None else (a, b, bias)
    return (
        a.dtype in own.SUPPORTED_DTYPES
        and a.numel() > 0
        and b.numel() > 0
        and a.is_contiguous()
        and (b.is_contiguous() or b.t().is_contiguous())
        and (bias is None or (bias.dim() == 1 and bias.is_contiguous()))
        and all(t.dtype == a.dtype and t.data_ptr() % 16 == 0 for t in tensors)
    )


@functools.cache
def _vendor_kernels() -> tuple[torch._C._SafeKernelFunction, torch._C._SafeKernelFunction]:
    """aten's own mm and addmm; taken when this module is imported, before a mode can replace them."""
    return torch.library.get_kernel("aten::mm", "CUDA"), torch.library.get_kernel("aten::addmm", "CUDA")


if torch.backends.cuda.is_built():  # asking for a device here would make CUDA unusable in a forked process
    _vendor_kernels()


def _vendor(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    mm, addmm = _vendor_kernels()
    return mm.call_boxed(_CUDA, a, b) if bias is None else addmm.call_boxed(_CUDA, bias, a, b)


def _linear(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    rows = x.reshape(-1, x.shape[-1])
    y = gemm(rows, w.t(), b) if x.is_cuda else own.gemm(rows, w.t(), b)
    return y.view(*x.shape[:-1], w.shape[0])


def _fake(x: torch.Tensor, w: torch.Tensor, b: torch.Tensor | None = None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], w.shape[0]))


def _save(ctx, inputs, output) -> None:
    x, w, b = inputs
    ctx.save_for_backward(x, w)
    ctx.has_bias = b is not None


def _backward(ctx, dy: torch.Tensor):
    """dx = dy·W, dW = dyᵀ·x, db = 1ᵀ·dy, each by the same GEMM in its fixed order."""
    x, w = ctx.saved_tensors
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = dw = db = None
    if ctx.needs_input_grad[0]:
        dx = linear(dy, w.t())
    if ctx.needs_input_grad[1]:
        dw = linear(dy_rows.t(), rows.t())
    if ctx.has_bias and ctx.needs_input_grad[2]:
        db = linear(dy_rows.new_ones(1, len(dy_rows)), dy_rows.t())[0]
    return dx, dw, db


_library = torch.library.Library("batch_invariant_ops", "FRAGMENT")
_library.define("linear(Tensor x, Tensor w, Tensor? b=None) -> Tensor")
_library.impl("linear", _linear, "CUDA")
_library.impl("linear", _linear, "CPU")
torch.library.register_fake("batch_invariant_ops::linear", _fake, lib=_library)
torch.library.register_autograd("batch_invariant_ops::linear", _backward, setup_context=_save, lib=_library)
