"""Any shape, strides and dtype: an operation on a view gives the bits that it gives on a packed copy, row by row."""

import pytest
import torch

from batch_invariant_ops.ops import matmul
from batch_invariant_ops.proof import same_bits

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from batch_invariant_ops.ops.linear import linear

DTYPES = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])
SEEDS = st.integers(0, 2**16)
relaxed = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])


def values(seed, *shape, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


ROWS, COLUMNS = st.integers(1, 9), st.integers(1, 70)


@st.composite
def views(draw, rows=ROWS, columns=COLUMNS):
    """A [rows, columns] tensor that lies in memory in one of many ways."""
    m, n, dtype, seed = draw(rows), draw(columns), draw(DTYPES), draw(SEEDS)
    layout = draw(st.sampled_from(["packed", "transposed", "every second", "offset", "expanded", "wide rows"]))
    if layout == "transposed":
        return values(seed, n, m, dtype=dtype).t()
    if layout == "every second":
        return values(seed, 2 * m, 2 * n, dtype=dtype)[::2, ::2]
    if layout == "offset":
        return values(seed, m * n + 1, dtype=dtype)[1:].view(m, n)
    if layout == "expanded":
        return values(seed, 1, n, dtype=dtype).expand(m, n)
    if layout == "wide rows":
        return values(seed, m, n + 3, dtype=dtype)[:, :n]
    return values(seed, m, n, dtype=dtype)


@relaxed
@given(x=views(), seed=SEEDS)
def test_row_of_a_view_has_the_bits_of_its_copy_alone(row_operation, x, seed):
    weight = values(seed, x.shape[-1], dtype=x.dtype)
    y = row_operation.run(x, weight)
    for i in range(len(x)):
        assert same_bits(y[i].contiguous(), row_operation.run(x[i].clone(), weight))


@relaxed
@given(x=views(), n=st.integers(1, 40), seed=SEEDS, has_bias=st.booleans(), transposed=st.booleans())
def test_row_of_a_product_has_the_bits_of_its_copy_alone(x, n, seed, has_bias, transposed):
    k = x.shape[1]
    weight = values(seed, k, n, dtype=x.dtype).t() if transposed else values(seed, n, k, dtype=x.dtype)
    bias = values(seed + 1, n, dtype=x.dtype) if has_bias else None
    y = linear(x, weight, bias)
    for i in range(len(x)):
        assert same_bits(y[i].contiguous(), linear(x[i].clone(), weight, bias))


@relaxed
@given(x=views(), n=st.integers(1, 40), seed=SEEDS, has_bias=st.booleans())
def test_products_are_within_the_bound_of_fp64(x, n, seed, has_bias):
    b = values(seed, x.shape[1], n, dtype=x.dtype)
    bias = values(seed + 1, n, dtype=x.dtype) if has_bias else None
    exact = x.double() @ b.double() + (0 if bias is None else bias.double())
    size = x.double().abs() @ b.double().abs() + (0 if bias is None else bias.double().abs())
    bound = torch.finfo(x.dtype).eps * exact.abs() + (x.shape[1] + 2) * torch.finfo(torch.float32).eps * size
    # oneDNN rounds a product before it adds a bias in some types
    bound = bound + torch.finfo(x.dtype).eps * size * has_bias
    assert bool(((matmul.gemm(x, b, bias).double() - exact).abs() <= bound + torch.finfo(x.dtype).tiny).all())
