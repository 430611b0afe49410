"""The largest of a row and their places: of equal ones the first, whatever the other rows are and k is."""

import pytest
import torch

from batch_invariant_ops.ops.topk import topk
from batch_invariant_ops.proof import same_bits

LENGTHS = [1, 2, 31, 100, 4096, 4097, 20000]
NAN, INF = torch.nan, torch.inf


def coarse(random, *shape, dtype=torch.float32):
    """Random values of which many are equal."""
    return (4 * random(*shape)).round().to(dtype) / 4


@pytest.mark.parametrize("length", LENGTHS)
def test_it_is_the_beginning_of_a_stable_sort(length, dtype, random):
    x = coarse(random, 5, length, dtype=dtype)
    for k in {1, 2, 20, 65, length - 1, length}:
        if 0 < k <= length:
            values, places = topk(x, k)
            ordered = x.sort(dim=-1, descending=True, stable=True)
            assert same_bits(values, ordered.values[:, :k].contiguous())
            assert torch.equal(places, ordered.indices[:, :k])


def test_a_row_has_the_same_alone_and_in_a_batch(random, keeps_bits):
    x = coarse(random, 33, 5000)
    for k in (1, 5, 20):
        assert keeps_bits(lambda rows, k=k: topk(rows, k)[1], x, [1, 2, 3, 7, 16, 32, 33])


def test_fewer_are_the_first_of_more(random):
    x = coarse(random, 40, 3000)
    most = topk(x, 20)[1]
    for k in range(1, 20):
        assert torch.equal(topk(x, k)[1], most[:, :k])


def test_atens_are_not_which_is_why_this_one_exists(random):
    x = coarse(random, 40, 3000)
    assert any(not torch.equal(x.topk(k).indices, x.topk(20).indices[:, :k]) for k in range(1, 20))


@pytest.mark.parametrize(
    "row, places",
    [
        ([0.0, NAN, INF, NAN, -INF], [1, 3, 2, 0, 4]),
        ([0.0, -0.0, 1.0, -0.0, 0.0], [2, 0, 1, 3, 4]),
        ([-INF] * 5, [0, 1, 2, 3, 4]),
        ([1e-45, 0.0, -1e-45, 3e-45, 3.4e38], [4, 3, 0, 1, 2]),
    ],
)
def test_nan_is_the_largest_and_the_zeros_are_equal(row, places):
    x = torch.tensor([row, [1.0, 2.0, 3.0, 4.0, 5.0]])
    assert topk(x, 5)[1].tolist() == [places, [4, 3, 2, 1, 0]]
    assert topk(x, 3)[1].tolist() == [places[:3], [4, 3, 2]]


def test_any_strides_and_leading_dimensions(random):
    x = coarse(random, 40, 2, 3).permute(1, 2, 0)
    values, places = topk(x, 7)
    assert values.shape == places.shape == (2, 3, 7)
    assert torch.equal(places, topk(x.contiguous().view(6, 40), 7)[1].view(2, 3, 7))
    assert topk(x[0, 0], 7)[1].tolist() == places[0, 0].tolist()


@pytest.mark.parametrize("shape, k", [((0, 8), 3), ((3, 8), 0), ((3, 0), 0), ((0, 0), 0)])
def test_nothing_has_no_largest(shape, k):
    values, places = topk(torch.ones(shape), k)
    assert values.shape == places.shape == (shape[0], k)


@pytest.mark.parametrize(
    "x, k, words",
    [
        (torch.ones(2, 3), 4, "k = 4 is not valid for rows of 3: 0 to 3 is"),
        (torch.ones(2, 3), -1, "k = -1 is not valid"),
        (torch.tensor(1.0), 1, "at least one dimension"),
        (torch.ones(2, 3, dtype=torch.int64), 1, "torch.int64 is not supported"),
    ],
)
def test_what_has_no_k_largest_is_refused(x, k, words):
    with pytest.raises(ValueError, match=words):
        topk(x, k)
