"""A window holds exactly the numbers of rows at which a vendor's bits agree, and a vendor that lies is found out."""

import pytest
import torch

from batch_invariant_ops.ops import proven
from batch_invariant_ops.proof import Window, find_window, same_bits

K, N = 24, 10
WEIGHT = torch.randn(K, N, generator=torch.Generator().manual_seed(3))
X = torch.randn(64, K, generator=torch.Generator().manual_seed(4))


def exact(rows):
    """Row by row, so that no row can depend on another."""
    return torch.stack([row @ WEIGHT for row in rows])


def liar(at):
    """A vendor that differs in one bit of one element when it is called with ``at`` rows."""

    def gemm(rows):
        y = exact(rows)
        if len(rows) in at:
            y[len(rows) // 2, 3] = torch.nextafter(y[len(rows) // 2, 3], torch.tensor(9e9))
        return y

    return gemm


def window(gemm, sizes=range(1, 65), largest_floor=16):
    return find_window(gemm, exact(X), X, sizes, largest_floor)


def test_an_honest_vendor_is_used_for_every_size():
    assert window(exact) == Window(floor=1, cap=64, tried=64)


def test_sizes_that_differ_below_some_m_make_a_floor():
    assert window(liar({1, 2, 3})) == Window(floor=4, cap=64, tried=61)


def test_one_bit_at_one_size_moves_the_floor_above_it():
    assert window(liar({9})).floor == 10


def test_a_liar_above_the_largest_floor_is_not_used():
    assert window(liar({40})) is None


def test_a_liar_at_the_largest_size_is_not_used():
    assert window(liar({64})) is None


def test_bits_that_depend_on_the_place_in_the_batch_are_found():
    def by_place(rows):
        y = exact(rows)
        y[-1] += torch.finfo(y.dtype).eps * y[-1]
        return y

    assert window(by_place) is None


@pytest.mark.parametrize("num_rows", [1, 2, 3, 4, 5, 16, 17, 33, 64])
def test_a_window_shows_the_vendor_only_sizes_inside_it(num_rows):
    seen = []

    def gemm(rows):
        seen.append(len(rows))
        return exact(rows)

    y = Window(floor=4, cap=16, tried=13).apply(gemm, X[:num_rows])
    assert torch.equal(y, exact(X[:num_rows]))
    assert all(4 <= size <= 16 for size in seen)


def test_zeros_of_either_sign_and_equal_nans_are_told_apart():
    zero, minus, nan = torch.tensor([0.0]), torch.tensor([-0.0]), torch.tensor([float("nan")])
    assert same_bits(nan, nan.clone()) and not same_bits(zero, minus)


def layer(vendor):
    return proven.ProvenLinear(vendor, n=N, k=K, dtype=torch.float32)


def test_a_layer_pads_up_to_its_floor_and_keeps_every_row():
    def vendor(x, weight, bias):
        y = exact(x)
        return y + 1e-3 if len(x) < 4 else y

    proof = layer(vendor)
    assert proof.prove(WEIGHT, None).floor == 4
    assert torch.equal(proof(X[:1], WEIGHT, None), exact(X[:1]))
    assert torch.equal(proof(X.view(4, 16, K), WEIGHT, None).view(64, N), exact(X))
    assert proof(X[:0], WEIGHT, None).shape == (0, N)


def test_a_layer_without_a_window_runs_one_constant_number_of_rows():
    sizes = []

    def vendor(x, weight, bias):
        sizes.append(len(x))
        return exact(x) * (1 + len(x) * 1e-6)

    proof = layer(vendor)
    proof.prove(WEIGHT, None)
    sizes.clear()
    alone, together = proof(X[:1], WEIGHT, None), proof(X[:37], WEIGHT, None)
    assert set(sizes) == {proven.FALLBACK_ROWS}
    assert torch.equal(alone[0], together[0])


def test_a_vendor_that_is_not_even_repeatable_is_refused():
    def vendor(x, weight, bias):
        return exact(x) + torch.rand(1)

    with pytest.raises(RuntimeError, match="from call to call"):
        layer(vendor).prove(WEIGHT, None)


def test_a_vendor_whose_bits_depend_on_the_place_is_refused():
    def vendor(x, weight, bias):
        return exact(x) + 1e-3 * torch.arange(len(x))[:, None]

    with pytest.raises(RuntimeError, match="its place in the batch"):
        layer(vendor).prove(WEIGHT, None)


def test_the_choice_by_m_is_made_when_the_op_runs_not_when_it_is_traced():
    def vendor(x, weight, bias):
        y = exact(x)
        return y + 1e-3 if len(x) < 4 else y

    proof = layer(vendor)
    number = proven.register(proof)

    @torch.compile(fullgraph=True, dynamic=True, backend="eager")
    def model(x):
        return proven.proven_linear(x * 2, WEIGHT, None, number, N)

    large = model(X)
    for num_rows in (1, 2, 3, 4, 63):
        assert torch.equal(model(X[:num_rows]), large[:num_rows])


def test_the_op_keeps_the_rules_of_torch_library():
    number = proven.register(layer(lambda x, weight, bias: exact(x)))
    op = torch.ops.batch_invariant_ops.proven_linear.default
    torch.library.opcheck(op, (X, WEIGHT, None, number, N), test_utils=("test_schema", "test_faketensor"))
