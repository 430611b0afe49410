"""The peers' kernels that benchmarks measure against, written anew from their published design."""

import torch
import triton
import triton.language as tl


@triton.jit
def _persistent_kernel(
    a_ptr, b_ptr, c_ptr, M, N, K, stride_am, stride_ak, stride_bk, stride_bn, stride_cm, stride_cn,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP_M: tl.constexpr, PROGRAMS: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """c = a·b; each program walks over output tiles, PROGRAMS apart."""
    tiles_m = tl.cdiv(M, BLOCK_M)
    tiles_n = tl.cdiv(N, BLOCK_N)
    in_group = GROUP_M * tiles_n
    ks = tl.arange(0, BLOCK_K)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True):
        first_m = (tile // in_group) * GROUP_M
        group_m = min(tiles_m - first_m, GROUP_M)
        rows = (first_m + (tile % in_group) % group_m) * BLOCK_M + tl.arange(0, BLOCK_M)
        columns = ((tile % in_group) // group_m) * BLOCK_N + tl.arange(0, BLOCK_N)
        safe_rows = tl.where(rows < M, rows, 0)
        safe_columns = tl.where(columns < N, columns, 0)
        sums = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            depth = k * BLOCK_K + ks
            a = tl.load(
                a_ptr + safe_rows[:, None] * stride_am + depth[None, :] * stride_ak, mask=depth[None, :] < K, other=0.0
            )
            b = tl.load(
                b_ptr + depth[:, None] * stride_bk + safe_columns[None, :] * stride_bn,
                mask=depth[:, None] < K,
                other=0.0,
            )
            sums = tl.dot(a, b, sums, input_precision=PRECISION)
        tl.store(
            c_ptr + rows[:, None] * stride_cm + columns[None, :] * stride_cn,
            sums.to(c_ptr.dtype.element_ty),
            mask=(rows < M)[:, None] & (columns < N)[None, :],
        )


def matmul_one_tile(a, b, precision):
    """Thinking Machines' form: one persistent kernel, one tile for every M.

    That is 128 x 128 x 64, in fp16 128 x 256 x 64, in fp32 128 x 128 x 32. precision: of products of fp32, "tf32", as
    theirs always are, or "ieee".

    Design: https://github.com/thinking-machines-lab/batch_invariant_ops
    """
    m, k = a.shape
    n = b.shape[1]
    c = torch.empty((m, n), device=a.device, dtype=a.dtype)
    block_n = 256 if a.dtype == torch.float16 else 128
    block_k = 32 if a.dtype == torch.float32 else 64
    programs = torch.cuda.get_device_properties(a.device).multi_processor_count
    grid = (min(programs, triton.cdiv(m, 128) * triton.cdiv(n, block_n)),)
    _persistent_kernel[grid](
        a, b, c, m, n, k, *a.stride(), *b.stride(), *c.stride(),
        BLOCK_M=128, BLOCK_N=block_n, BLOCK_K=block_k, GROUP_M=8, PROGRAMS=programs, PRECISION=precision,
        num_warps=8, num_stages=3,
    )  # fmt: skip
    return c
