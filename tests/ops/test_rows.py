"""The row operations on a CPU: bits of a row in any batch, values against fp64, any strides, dtypes and shapes."""

import pytest
import torch

from batch_invariant_ops.ops.log_softmax import log_softmax
from batch_invariant_ops.ops.mean import mean, mean_dim
from batch_invariant_ops.ops.rms_norm import rms_norm
from batch_invariant_ops.ops.softmax import softmax
from batch_invariant_ops.proof import same_bits

LENGTHS = [1, 2, 31, 64, 100, 1537, 8192, 8193, 20000]


@pytest.mark.parametrize("length", LENGTHS)
def test_row_is_the_same_alone_and_in_a_batch(row_operation, dtype, length, random, keeps_bits):
    weight = random(length, dtype=dtype)
    x = random(33, length, dtype=dtype)
    assert keeps_bits(lambda rows: row_operation.run(rows, weight), x, [1, 2, 3, 7, 16, 32, 33])


def test_row_is_the_same_in_batches_to_1024(row_operation, random, keeps_bits):
    weight, x = random(24), random(1024, 24)
    sizes = [*range(1, 66), *range(67, 1024, 61), 1023, 1024]
    assert keeps_bits(lambda rows: row_operation.run(rows, weight), x, sizes)


def test_an_operation_that_looks_at_its_batch_is_found_out(random, keeps_bits):
    def liar(rows):
        return torch.nextafter(rows, rows + 1) if len(rows) == 7 else rows

    assert not keeps_bits(liar, random(33, 8), [1, 2, 7])


@pytest.mark.parametrize("length", LENGTHS)
def test_values_are_within_the_bound_of_fp64(row_operation, dtype, length, random):
    weight, x = random(length, dtype=dtype), 3 * random(5, length, dtype=dtype)
    error = (row_operation.run(x, weight).double() - row_operation.exact(x.double(), weight.double())).abs()
    assert bool((error <= row_operation.bound(x, weight)).all())


def test_the_bound_is_tight_enough_to_find_a_wrong_value(row_operation, random):
    weight, x = random(100), random(5, 100) + 3
    exact = row_operation.exact(x.double(), weight.double())
    assert bool(((exact * 1e-4).abs() > row_operation.bound(x, weight)).float().mean() > 0.9)


def test_neighbours_with_nan_and_infinity_change_nothing(row_operation, random):
    weight, x = random(129), random(4, 129)
    alone = row_operation.run(x[1:3], weight)
    x[0], x[3] = torch.nan, torch.inf
    assert same_bits(row_operation.run(x, weight)[1:3].contiguous(), alone)


def test_nan_in_a_row_reaches_its_result(row_operation, random):
    weight, x = random(40), random(2, 40)
    x[0, 5] = torch.nan
    y = row_operation.run(x, weight)
    assert y[0].isnan().all() or y[0, 5].isnan()
    assert not y[1].isnan().any()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0, 8), (8,), (1, 1, 1, 8), (2, 3, 4, 8)])
def test_leading_dimensions_are_kept(row_operation, dtype, shape, random):
    weight, x = random(8, dtype=dtype), random(*shape, dtype=dtype)
    y = row_operation.run(x, weight)
    exact = row_operation.exact(x.double(), weight.double())
    assert y.shape == exact.shape
    assert y.dtype == dtype
    assert torch.allclose(y.double(), exact, rtol=3e-2, atol=3e-2)


class TestRmsNorm:
    def test_residual_gives_the_rounded_sum_and_the_norm_of_it(self, dtype, random):
        x, residual, weight = random(5, 96, dtype=dtype), random(5, 96, dtype=dtype), random(96, dtype=dtype)
        y, total = rms_norm(x, weight, residual=residual)
        assert same_bits(total, x + residual)
        assert same_bits(y, rms_norm(total, weight))

    def test_inputs_are_left_as_they_are(self, random):
        x, residual = random(5, 96), random(5, 96)
        before = x.clone(), residual.clone()
        rms_norm(x, None, residual=residual)
        assert torch.equal(x, before[0])
        assert torch.equal(residual, before[1])

    def test_a_weight_of_another_type_multiplies_in_that_type(self, random):
        x, weight = random(5, 96, dtype=torch.bfloat16), random(96)
        scaled = x.float() * torch.rsqrt(x.double().pow(2).mean(-1, keepdim=True) + 1e-6).float()
        assert torch.allclose(rms_norm(x, weight).float(), (scaled * weight).bfloat16().float(), rtol=8e-3)

    @pytest.mark.parametrize(
        "x, weight, residual, message",
        [
            (torch.ones(2, 8, dtype=torch.float64), None, None, "torch.float64 is not supported"),
            (torch.ones(2, 8), torch.ones(7), None, r"the weight is \[7\]"),
            (torch.ones(2, 8), torch.ones(8, dtype=torch.int32), None, "torch.int32 is not supported"),
            (torch.ones(2, 8), None, torch.ones(1, 8), "the residual is"),
            (torch.ones(2, 8), None, torch.ones(2, 8).half(), "the residual is"),
            (torch.tensor(1.0), None, None, "at least one dimension"),
        ],
    )
    def test_what_does_not_go_together_is_refused(self, x, weight, residual, message):
        with pytest.raises(ValueError, match=message):
            rms_norm(x, weight, residual=residual)


class TestSoftmax:
    @pytest.mark.parametrize("dim", [0, 1, 2, -1, -3])
    def test_any_dimension(self, dim, random):
        x = random(3, 4, 5)
        assert torch.allclose(softmax(x, dim), torch.softmax(x, dim))
        assert torch.allclose(log_softmax(x, dim), torch.log_softmax(x, dim), atol=1e-6)

    def test_minus_infinity_is_a_probability_of_zero(self, random):
        x = random(2, 50)
        x[0, ::2] = -torch.inf
        assert bool((softmax(x)[0, ::2] == 0).all())
        assert bool((log_softmax(x)[0, ::2] == -torch.inf).all())
        assert torch.allclose(softmax(x), torch.softmax(x, -1))

    def test_a_row_of_minus_infinity_alone_is_nan_as_in_torch(self):
        assert softmax(torch.full((1, 9), -torch.inf)).isnan().all()
        assert log_softmax(torch.full((1, 9), -torch.inf)).isnan().all()

    def test_half_types_may_give_fp32(self, random):
        x = random(3, 40, dtype=torch.bfloat16)
        assert torch.allclose(softmax(x, -1, torch.float32), torch.softmax(x.float(), -1), rtol=1e-6, atol=0)

    def test_a_scalar(self):
        assert softmax(torch.tensor(3.0), 0) == 1
        assert log_softmax(torch.tensor(3.0), -1) == 0

    def test_what_is_not_there_is_refused(self):
        with pytest.raises(IndexError, match="Dimension out of range"):
            softmax(torch.ones(2, 3), 2)
        with pytest.raises(ValueError, match=r"torch\.int64 is not supported"):
            log_softmax(torch.ones(2, 3, dtype=torch.int64))
        with pytest.raises(ValueError, match="is not supported"):
            softmax(torch.ones(2, 3), dtype=torch.float16)


class TestMean:
    @pytest.mark.parametrize("dim", [None, (), 0, -1, (0, 2), (1, 2, 3), (3, 0), (0, 1, 2, 3)])
    @pytest.mark.parametrize("keepdim", [False, True])
    def test_any_dimensions(self, dim, keepdim, random):
        x = random(2, 3, 4, 5)
        expected = torch.mean(x, dim=() if dim is None else dim, keepdim=keepdim)
        y = mean(x, dim, keepdim)
        assert y.shape == expected.shape
        assert torch.allclose(y, expected, atol=1e-6)

    def test_the_dtype_asked_for(self, random):
        x = random(3, 500, dtype=torch.bfloat16)
        assert torch.allclose(mean(x, -1, dtype=torch.float32), x.float().mean(-1), atol=1e-6)
        assert mean(random(3, 5), -1, dtype=torch.float16).dtype == torch.float16

    def test_the_mean_of_nothing_is_nan(self):
        assert mean(torch.ones(2, 0), -1).isnan().all()
        assert mean(torch.ones(0, 2), -1).shape == (0,)

    def test_mean_dim_takes_integers(self):
        assert mean_dim(torch.arange(6).view(2, 3), 1).tolist() == [1.0, 4.0]
        with pytest.raises(AssertionError, match="Invalid dimension 2"):
            mean_dim(torch.ones(2, 3), 2)

    def test_a_dimension_twice_is_refused(self):
        with pytest.raises(ValueError, match="appears twice"):
            mean(torch.ones(2, 3), (0, -2))
