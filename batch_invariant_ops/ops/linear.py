"""y = x·Wᵀ + b: the vendor's GEMM where its bits were proven to be our Triton kernel's, else our Triton kernel.

Both give the same bits, so they mix freely, and a proof that nobody could make costs speed, never bits. The choice is
made for each (N, K, dtype, bias, layout) and M when the op runs, never when a compiler traces it.
"""

from __future__ import annotations

import logging
import os
from collections import Counter
from typing import NamedTuple

import torch

from batch_invariant_ops import proving, reduction, tiles
from batch_invariant_ops.certificates import Case
from batch_invariant_ops.ops import matmul as own
from batch_invariant_ops.ops import opaque, vendor_gemm
from batch_invariant_ops.ops.cublaslt import NoKernel, Shape
from batch_invariant_ops.proof import Window

logger = logging.getLogger(__name__)

CHOICES = ("auto", "vendor", "triton")
PROVE_AT_CALL = 3
WIDTH_STEP = 8
HIDDEN, FEW_ROWS = 2.5e11, 175
"""N·K·M of a GEMM that takes an H200 some 700 µs, so that the host has long launched ours by then; with fewer rows than
that the weights take as long."""


class Decision(NamedTuple):
    """Which GEMM runs: the vendor's for M in the window, where there is one, but ours where it is the faster."""

    window: Window | None
    faster: tiles.Ranges = ()


_decisions: dict[Shape, Decision] = {}
_calls: Counter[Shape] = Counter()


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
    return opaque_gemm(x, w.t(), b)


def opaque_gemm(x: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """x [..., K] · b [K, N] + bias [N], as :func:`linear` computes it."""
    return torch.ops.batch_invariant_ops.gemm(x, b, bias)


def gemm(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """a [M, K] · b [K, N] + bias [N] on a GPU, by the vendor where that was proven, else by our kernel.

    Ours also runs at those M where the card's table says that it is the faster one: in a graph, and outside of one
    where the GPU is at work for longer than the host takes to launch it, which is longer than for the vendor's. A GEMM
    that no ``prepare`` announced is proven when it is called for the third time, outside a graph's capture.
    """
    key = _key(a, b, bias)
    if key is None:
        if a.shape[0] == 1 and a.stride(1) == 1 and a.stride(0) != a.shape[1]:
            return gemm(a.as_strided(a.shape, (a.shape[1], 1)), b, bias)  # one row is packed, whatever its stride
        return own.gemm(a, b, bias)
    width = key[0]
    if width % WIDTH_STEP and (wide := _widened(b, bias)) is not None:
        return gemm(a, *wide)[:, :width].contiguous()
    try:
        window, faster = _decisions[key]
    except KeyError:
        window, faster = _decide(key)
    if window is None or not window.floor <= (num_rows := a.shape[0]) <= window.cap:
        return own.gemm(a, b, bias)
    for first, last in faster:
        if first <= num_rows <= last and (
            width * key[1] * max(num_rows, FEW_ROWS) >= HIDDEN or torch.cuda.is_current_stream_capturing()
        ):
            return own.gemm(a, b, bias)
    try:
        return vendor_gemm.call(a, b, bias)
    except NoKernel:
        return own.gemm(a, b, bias)


def _key(a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> Shape | None:
    """What the choice goes by; None for operands that are not laid out as a proof's.

    Those are packed, aligned as memory from torch's allocator is (cuBLASLt chooses its kernel by alignment, too), of
    one 16- or 32-bit float type, with more than one column and step, and not to be computed in TF32.
    """
    depth, width = b.shape
    strides = b.stride()
    if strides == (1, depth):
        weight_is_packed = True
    elif strides == (width, 1):
        weight_is_packed = False
    else:
        return None
    dtype = a.dtype
    if (
        depth < 2
        or width < 2
        or a.shape[0] == 0
        or a.stride() != (depth, 1)
        or a.data_ptr() % proving.ALIGNMENT
        or b.data_ptr() % proving.ALIGNMENT
        or b.dtype != dtype
        or dtype not in own.SUPPORTED_DTYPES
        or reduction.in_tf32(dtype)
    ):
        return None
    if bias is None:
        return width, depth, dtype, False, weight_is_packed, a.get_device()
    if bias.dtype != dtype or bias.stride() != (1,) or bias.shape[0] != width or bias.data_ptr() % proving.ALIGNMENT:
        return None
    return width, depth, dtype, True, weight_is_packed, a.get_device()


def _decide(key: Shape) -> Decision:
    """Prove, once it is worth it; until then ours runs."""
    if torch.cuda.is_current_stream_capturing():
        return Decision(None)
    _calls[key] += 1
    if _calls[key] < PROVE_AT_CALL and choice() == "auto":
        return Decision(None)
    return _prove(key)


def _prove(key: Shape) -> Decision:
    if key not in _decisions:
        n, k, dtype, has_bias, weight_is_packed, index = key
        device = torch.device("cuda", index) if index >= 0 else torch.device("cpu")
        measured = choice() == "auto" and weight_is_packed
        faster = tiles.faster(n, k, dtype, *tiles.card(device)) if measured else ()
        _decisions[key] = Decision(prove(Case(n, k, dtype, has_bias, weight_is_packed), device), faster)
    return _decisions[key]


def prove(case: Case, device: torch.device) -> Window | None:
    """Compare the vendor's bits with our kernel's over M, and say in the log what will run.

    Returns:
        The window in which they agree, or None where ours is to run.

    Raises:
        RuntimeError: ``BATCH_INVARIANT_GEMM=vendor`` and they do not agree, or there is no such kernel.
    """
    if choice() == "triton":
        return None
    reason = "the vendor's bits vary with M"
    try:
        window = proving.settle(case, device)
    except NoKernel as error:
        window, reason = None, str(error)
    if window is None and choice() == "vendor":
        raise RuntimeError(f"BATCH_INVARIANT_GEMM=vendor: linear {case}: {reason} on this device")
    if window is None:
        logger.info("linear %s: %s, our Triton kernel runs", case, reason)
    else:
        logger.info("linear %s: vendor proven at %d values of M up to %d", case, window.tried, window.cap)
    return window


def prepare(weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
    """Make the proof for a layer's weight [N, K] now, so that no request waits for it.

    A weight whose N is no multiple of 8, for which vendors have but slow kernels with other bits, gets its place in
    memory followed by as many rows of zeros as it lacks, and with it its bias: the vendor then computes columns that
    nobody sees. The weight's own values, shape and strides stay as they are.
    """
    if not (weight.is_cuda and weight.dim() == 2 and weight.dtype in own.SUPPORTED_DTYPES):
        return
    width = weight.shape[0]
    if width % WIDTH_STEP and choice() != "triton":
        for tensor in (weight, bias):
            if tensor is not None:
                _append_room(tensor)
    b = weight.detach().t()
    bias = None if bias is None else bias.detach()
    if width % WIDTH_STEP and (wide := _widened(b, bias)) is not None:
        b, bias = wide
    key = _key(b.new_empty(1, b.shape[0]), b, bias)
    if key is not None:
        _prove(key)


def _append_room(tensor: torch.Tensor) -> None:
    """Move a tensor that owns its memory to a place that is followed by zeros, up to a multiple of 8 in its length."""
    packed = tensor.is_contiguous() and tensor.storage_offset() == 0
    if not packed or tensor.untyped_storage().nbytes() != tensor.numel() * tensor.element_size():
        return
    length = tensor.shape[0]
    roomy = tensor.detach().new_zeros(length + -length % WIDTH_STEP, *tensor.shape[1:])
    roomy[:length] = tensor.detach()
    tensor.data = roomy[:length]


def _widened(b: torch.Tensor, bias: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """b [K, N] and the bias with N rounded up to a multiple of 8, over memory that is there behind them; else None."""
    depth, width = b.shape
    wider = width + -width % WIDTH_STEP
    if b.stride() != (1, depth) or not _has_room(b, wider * depth) or not (bias is None or _has_room(bias, wider)):
        return None
    return b.as_strided((depth, wider), (1, depth)), None if bias is None else bias.as_strided((wider,), (1,))


def _has_room(tensor: torch.Tensor, numel: int) -> bool:
    """Whether a tensor's memory holds that many elements from its first on."""
    return (tensor.storage_offset() + numel) * tensor.element_size() <= tensor.untyped_storage().nbytes()


def windows() -> dict[Shape, Window | None]:
    """What was decided in this process, by (N, K, dtype, has bias, weight is packed, GPU)."""
    return {key: made.window for key, made in _decisions.items()}


def _on_gpu(x: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    if x.dim() == 2:
        return gemm(x, b, bias)
    return gemm(x.reshape(-1, x.shape[-1]), b, bias).view(*x.shape[:-1], b.shape[1])


def _on_cpu(x: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return own.gemm(x.reshape(-1, x.shape[-1]), b, bias).view(*x.shape[:-1], b.shape[1])


def _fake(x: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], b.shape[1]))


def _save(ctx, inputs, output) -> None:
    x, b, bias = inputs
    ctx.save_for_backward(x, b)
    ctx.has_bias = bias is not None


def _backward(ctx, dy: torch.Tensor):
    """dx = dy·bᵀ, db = xᵀ·dy, dbias = 1ᵀ·dy, each by the same GEMM in its fixed order."""
    x, b = ctx.saved_tensors
    rows, dy_rows = x.reshape(-1, x.shape[-1]), dy.reshape(-1, dy.shape[-1])
    dx = db = dbias = None
    if ctx.needs_input_grad[0]:
        dx = opaque_gemm(dy, b.t(), None)
    if ctx.needs_input_grad[1]:
        db = opaque_gemm(rows.t(), dy_rows, None)
    if ctx.has_bias and ctx.needs_input_grad[2]:
        dbias = opaque_gemm(dy_rows.new_ones(1, len(dy_rows)), dy_rows, None)[0]
    return dx, db, dbias


# b rather than w: compiled code hands on a view as a plain tensor, but a parameter as its own class, which vLLM's
# is slow to ask
opaque.define(
    "gemm(Tensor x, Tensor b, Tensor? bias) -> Tensor",
    gpu=_on_gpu, cpu=_on_cpu, fake=_fake, save=_save, backward=_backward,
)  # fmt: skip
