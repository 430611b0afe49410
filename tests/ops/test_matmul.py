"""The GEMM on a CPU: bits of a row in any batch, edges, and what it refuses."""

import pytest
import torch

from batch_invariant_ops.ops import bmm as batched
from batch_invariant_ops.ops import matmul
from batch_invariant_ops.ops.linear import linear
from batch_invariant_ops.proof import same_bits


@pytest.mark.parametrize("n, k", [(1, 1), (5, 3), (60, 100), (130, 257), (64, 1536), (17, 4097)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_row_is_the_same_alone_and_in_a_batch(n, k, has_bias, dtype, random, keeps_bits):
    b, x = random(k, n, dtype=dtype), random(67, k, dtype=dtype)
    bias = random(n, dtype=dtype) if has_bias else None
    assert keeps_bits(lambda rows: matmul.gemm(rows, b, bias), x, [1, 2, 3, 4, 5, 15, 16, 17, 31, 64, 67])


def test_row_is_the_same_in_batches_to_1024(random, keeps_bits):
    b, x = random(40, 24), random(1024, 40)
    assert keeps_bits(lambda rows: matmul.gemm(rows, b), x, [*range(1, 34), *range(63, 1024, 127), 1023, 1024])


def test_torchs_own_product_fails_the_same_check(random, keeps_bits):
    b, x = random(257, 130), random(300, 257)
    assert not keeps_bits(lambda rows: torch.mm(rows, b), x, [1, 2, 3, 4, 16, 100])


def test_neighbours_with_nan_and_infinity_change_nothing(dtype, random):
    b, x = random(64, 48, dtype=dtype), random(9, 64, dtype=dtype)
    alone = matmul.gemm(x[3:4], b)
    x[:3], x[4:] = torch.nan, torch.inf
    assert same_bits(matmul.gemm(x, b)[3:4], alone)


@pytest.mark.parametrize("m, k, n", [(0, 4, 5), (3, 0, 5), (3, 4, 0), (0, 0, 0)])
def test_empty_operands_give_the_bias_or_zeros(m, k, n, random):
    a, b, bias = random(m, k), random(k, n), random(n)
    assert torch.equal(matmul.gemm(a, b), torch.zeros(m, n))
    assert torch.equal(matmul.gemm(a, b, bias), bias.expand(m, n))


def test_each_entry_of_a_batched_product_has_the_bits_of_a_product_alone(dtype, random):
    a, b = random(3, 7, 40, dtype=dtype), random(3, 40, 24, dtype=dtype)
    together = batched.bmm(a, b)
    for entry in range(3):
        assert same_bits(together[entry], matmul.gemm(a[entry], b[entry]))


def test_matmul_persistent_is_the_product_with_a_bias(random):
    a, b, bias = random(7, 40), random(40, 24), random(24)
    assert same_bits(matmul.matmul_persistent(a, b), matmul.gemm(a, b))
    assert same_bits(matmul.matmul_persistent(a, b, bias), matmul.gemm(a, b, bias))
    assert same_bits(matmul.matmul_persistent(a, b, bias=bias), matmul.gemm(a, b, bias))


@pytest.mark.parametrize(
    "a, b, bias",
    [
        (torch.ones(2, 3), torch.ones(4, 5), None),
        (torch.ones(2, 3), torch.ones(3, 5).half(), None),
        (torch.ones(2, 3), torch.ones(3, 5), torch.ones(5, 1)),
    ],
)
def test_matmul_persistent_asserts_as_the_package_it_replaces(a, b, bias):
    with pytest.raises(AssertionError):
        matmul.matmul_persistent(a, b, bias)


@pytest.mark.parametrize(
    "a, b, bias, message",
    [
        (torch.ones(2, 3), torch.ones(4, 5), None, r"a is \[2, 3\], b is \[4, 5\]"),
        (torch.ones(3), torch.ones(3, 5), None, "Incompatible dimensions"),
        (torch.ones(2, 3), torch.ones(3, 5), torch.ones(4), r"bias is \[4\], N is 5"),
        (torch.ones(2, 3), torch.ones(3, 5).half(), None, "they must be alike"),
        (torch.ones(2, 3).double(), torch.ones(3, 5).double(), None, "torch.float64 is not supported"),
    ],
)
def test_what_does_not_go_together_is_refused(a, b, bias, message):
    with pytest.raises(ValueError, match=message):
        matmul.gemm(a, b, bias)


def test_gradients_of_linear_are_those_of_torch(random):
    ours = [random(2, 5, 12).requires_grad_(), random(7, 12).requires_grad_(), random(7).requires_grad_()]
    theirs = [t.detach().clone().requires_grad_() for t in ours]
    scale = random(2, 5, 7)
    (linear(*ours) * scale).sum().backward()
    (torch.nn.functional.linear(*theirs) * scale).sum().backward()
    for a, b in zip(ours, theirs, strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-5)


@pytest.mark.parametrize(("k", "n"), [(8, 5), (8, 11), (11, 5), (11, 7), (17, 5), (31, 7), (40, 7), (63, 2), (63, 7)])
@pytest.mark.parametrize("packed", [False, True])
def test_few_columns_on_a_cpu_do_not_depend_on_the_batch(k, n, packed):
    """The vendor sums some of these in another order at another place, which one sample of few columns seldom shows."""
    generator = torch.Generator().manual_seed(k * 100 + n)
    for _ in range(20):
        b = torch.randn(n, k, generator=generator).t() if packed else torch.randn(k, n, generator=generator)
        x = torch.randn(9, k, generator=generator)
        y = matmul.gemm(x, b, None)
        for i in range(len(x)):
            assert same_bits(y[i : i + 1], matmul.gemm(x[i : i + 1].clone(), b, None))
