"""The Triton kernels' logic under Triton's interpreter, on a CPU; run by test_interpreted.py in a process of its own.

fp32 and fp16 only: the interpreter cuts bf16 off where a GPU rounds.
"""

from dataclasses import replace

import pytest
import torch

from batch_invariant_ops import reduction, tiles
from batch_invariant_ops.ops import matmul, rows
from batch_invariant_ops.ops.log_softmax import log_softmax
from batch_invariant_ops.ops.mean import mean
from batch_invariant_ops.ops.rms_norm import rms_norm
from batch_invariant_ops.ops.softmax import softmax
from batch_invariant_ops.ops.topk import topk
from batch_invariant_ops.proof import same_bits

DTYPES = [torch.float32, torch.float16]
LENGTHS = [1, 31, 64, 100, 8192, 8200]
SMALL = tiles.Tile(m=16, n=16, k=16, warps=4, stages=1)
SWAPPED = tiles.Tile(m=16, n=32, k=32, warps=4, stages=1, swap=True)
HALVED = tiles.Tile(m=128, n=256, k=32, warps=8, stages=1)

needs_descriptors = pytest.mark.skipif(matmul.TensorDescriptor is None, reason="this Triton has no descriptors")


def test_the_kernels_are_what_runs():
    assert rows.uses_triton(torch.ones(1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length", LENGTHS)
def test_rows_are_near_fp64_and_the_same_alone(row_operation, dtype, length, random):
    weight, x = random(length, dtype=dtype), random(3, length, dtype=dtype)
    y = row_operation.run(x, weight)
    error = (y.double() - row_operation.exact(x.double(), weight.double())).abs()
    assert bool((error <= row_operation.bound(x, weight)).all())
    for i in range(3):
        assert same_bits(row_operation.run(x[i : i + 1].clone(), weight), y[i : i + 1].contiguous())


@pytest.mark.parametrize("length", [100, 8200])
def test_residual_gives_the_rounded_sum_and_the_norm_of_it(length, random):
    x, residual = random(2, length, dtype=torch.float16), random(2, length, dtype=torch.float16)
    y, total = rms_norm(x, None, residual=residual)
    assert same_bits(total, x + residual)
    assert same_bits(y, rms_norm(total, None))


@pytest.mark.parametrize("length", [60, 64])
def test_views_have_the_bits_of_their_copies(row_operation, length, random):
    weight = random(length)
    for view in (
        random(length, 3).t(),
        random(6, 2 * length)[::2, ::2],
        random(3 * length + 1)[1:].view(3, length),
        random(1, length).expand(3, length),
        random(3, length + 3)[:, :length],
    ):
        assert same_bits(row_operation.run(view, weight), row_operation.run(view.clone().contiguous(), weight))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("length, k", [(1, 1), (100, 100), (100, 7), (4096, 20), (4100, 20), (9000, 5), (9000, 70)])
def test_the_largest_are_the_beginning_of_a_stable_sort(dtype, length, k, random):
    x = (4 * random(3, length + 2)[:, 1:-1]).round().to(dtype)
    x[1, ::3] = -0.0
    x[2, length // 2 :] = torch.nan
    ordered = x.sort(dim=-1, descending=True, stable=True)
    values, places = topk(x, k)
    assert torch.equal(places, ordered.indices[:, :k])
    assert same_bits(values, ordered.values[:, :k].contiguous())


def test_other_dimensions_and_empty_tensors(random):
    x = random(3, 4, 5)
    assert torch.allclose(softmax(x, 0), x.softmax(0))
    assert torch.allclose(log_softmax(x, 1), x.log_softmax(1), atol=1e-6)
    assert torch.allclose(mean(x, (0, 2)), x.mean((0, 2)), atol=1e-6)
    assert softmax(x[:0]).shape == (0, 4, 5)
    assert mean(x[:, :0], 1).isnan().all()
    assert rms_norm(x[..., :0]).shape == (3, 4, 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [SMALL, SWAPPED], ids=["plain", "swapped"])
@pytest.mark.parametrize("m, k, n", [(1, 16, 16), (17, 40, 33), (3, 100, 5)])
def test_products_are_near_fp64_and_the_same_alone(dtype, tile, m, k, n, random):
    a, b, bias = random(m, k, dtype=dtype), random(k, n, dtype=dtype), random(n, dtype=dtype)
    y = matmul.gemm(a, b, bias, tile=tile)
    exact = a.double() @ b.double() + bias.double()
    assert torch.allclose(y.double(), exact, rtol=2 * torch.finfo(dtype).eps, atol=1e-4 if dtype == DTYPES[0] else 1e-2)
    assert same_bits(matmul.gemm(a[-1:].clone(), b, bias, tile=tile), y[-1:])


def form_that_runs(a, b, bias=None, tile=SMALL):
    """The form in which a product would run."""
    c = a.new_empty(1, a.shape[0], b.shape[1])
    kernel, _, _, options = matmul._call(a[None], b[None], bias, c, tile)
    if kernel is matmul._matmul_kernel:
        return tiles.PLAIN
    return tiles.FLATTENED if options["FLATTENED"] else tiles.STAYING if options["PERSISTENT"] else tiles.COPYING


@needs_descriptors
@pytest.mark.parametrize("form", [tiles.COPYING, tiles.STAYING, tiles.FLATTENED])
@pytest.mark.parametrize("tile", [SMALL, SWAPPED, HALVED], ids=["plain", "swapped", "halved"])
@pytest.mark.parametrize("m, k, n", [(1, 16, 16), (17, 40, 40), (100, 104, 280)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_other_forms_have_the_plain_ones_bits(form, tile, m, k, n, has_bias, random):
    a, b = random(m, k, dtype=torch.float16), random(n, k, dtype=torch.float16).t()
    bias = random(n, dtype=torch.float16) if has_bias else None
    chosen = replace(tile, form=form)
    assert form_that_runs(a, b, bias, chosen) == form
    assert same_bits(matmul.gemm(a, b, bias, tile=chosen), matmul.gemm(a, b, bias, tile=tile))


@needs_descriptors
@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("m, k, n", [(1, 64, 16), (17, 128, 40), (17, 40, 40), (5, 36, 24)])
def test_where_a_specialised_tile_does_not_serve_its_copying_one_or_pointers_do(swap, m, k, n, random):
    a, b = random(m, k, dtype=torch.float16), random(n, k, dtype=torch.float16).t()
    tile = tiles.Tile(m=16, n=16, k=64, warps=4, stages=2, swap=swap, form=tiles.SPECIALISED)
    assert form_that_runs(a, b, tile=tile) == (tiles.COPYING if k % 8 == 0 else tiles.PLAIN)
    # the interpreter's sums go by the step along K
    assert same_bits(matmul.gemm(a, b, tile=tile), matmul.gemm(a, b, tile=replace(tile.general, form=tiles.PLAIN)))


@needs_descriptors
@pytest.mark.parametrize(
    "operands, serves",
    {
        "contiguous": (lambda random: (random(5, 40), random(24, 40).t()), True),
        "distant rows": (lambda random: (random(5, 80)[:, :40], random(24, 48)[:, :40].t()), True),
        "distant rows of a depth like any": (lambda random: (random(5, 80)[:, :37], random(24, 48)[:, :37].t()), True),
        "one row, at any distance": (lambda random: (random(5, 41)[:1, :40], random(24, 40).t()), True),
        "a depth of no multiple of 8": (lambda random: (random(5, 36), random(24, 36).t()), False),
        "a width of no multiple of 8": (lambda random: (random(5, 40), random(20, 40).t()), False),
        "columns that lie together": (lambda random: (random(5, 40), random(40, 24)), False),
        "rows that lie together": (lambda random: (random(40, 8).t(), random(24, 40).t()), False),
        "one row for all": (lambda random: (random(1, 40).expand(5, -1), random(24, 40).t()), False),
        "an odd address": (lambda random: (random(5, 48)[:, 1:41], random(24, 40).t()), False),
    }.values(),
)
def test_what_the_copy_engine_cannot_read_comes_through_pointers(operands, serves, random):
    a, b = operands(lambda *shape: random(*shape, dtype=torch.float16))
    tile = replace(SMALL, form=tiles.COPYING)
    assert form_that_runs(a, b, tile=tile) == (tiles.COPYING if serves else tiles.PLAIN)
    assert same_bits(matmul.gemm(a, b, tile=tile), matmul.gemm(a, b, tile=SMALL))


@needs_descriptors
def test_other_forms_serve_neither_fp32_nor_entries_nor_an_old_triton(random, monkeypatch):
    tile = replace(SMALL, form=tiles.STAYING)
    a, b = random(3, 5, 40), random(3, 40, 24)
    assert form_that_runs(a[0], b[0], tile=tile) == tiles.PLAIN
    assert same_bits(matmul.gemm(a[0], b[0], tile=tile), matmul.gemm(a[0], b[0], tile=tiles.FP32))
    a, b = a.half(), b.half()
    assert same_bits(matmul.bmm(a, b, tile=tile), matmul.bmm(a, b, tile=SMALL))
    monkeypatch.setattr(matmul, "TensorDescriptor", None)
    assert form_that_runs(a[0], b[0].t().contiguous().t(), tile=tile) == tiles.PLAIN


def test_tf32_has_its_own_tile(random, monkeypatch):
    """The interpreter multiplies in fp32 all the same."""
    a, b = random(130, 40), random(40, 24)
    expected = matmul.gemm(a, b, tile=tiles.TF32)
    monkeypatch.setattr(reduction, "in_tf32", lambda dtype: dtype == torch.float32)
    *_, options = matmul._call(a[None], b[None], None, a.new_empty(1, 130, 24), tiles.TF32)
    assert options["PRECISION"] == "tf32"
    for part in (a, a[:1], a[:129]):
        assert same_bits(matmul.gemm(part, b), expected[: len(part)])


def test_a_product_of_views_has_the_bits_of_their_copies(random):
    a, b, bias = random(40, 9).t(), random(33, 80)[:, ::2].t(), random(66)[::2]
    copies = [t.clone(memory_format=torch.contiguous_format) for t in (a, b, bias)]
    assert same_bits(matmul.gemm(a, b, bias, tile=SMALL), matmul.gemm(*copies, tile=SMALL))


def test_entries_of_a_batched_product(random):
    a, b = random(3, 5, 40), random(3, 40, 7)
    for entry, product in enumerate(matmul.bmm(a, b, tile=SMALL)):
        assert same_bits(product, matmul.gemm(a[entry], b[entry], tile=SMALL))
