"""Every operation on a GPU: bits of a row alone and at each place of batches to 1024, edges, values against fp64."""

import pytest
import torch

import batch_invariant_ops as ours
from batch_invariant_ops.ops import matmul, rms_norm
from batch_invariant_ops.proof import agreement, same_bits

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
K, N = 1024, 512
EVERY_SIZE = range(1, 1025)


def operations(values, dtype):
    """By name: a function of x [M, K] whose result [M, ...] is made row by row."""
    w, bias, scale = values(N, K, dtype=dtype, seed=1), values(N, dtype=dtype, seed=2), values(K, dtype=dtype, seed=3)
    return {
        "triton": lambda x: matmul.gemm(x, w.t()),
        "linear": lambda x: ours.linear(x, w),
        "linear with bias": lambda x: ours.linear(x, w, bias),
        "bmm": lambda x: ours.bmm(x.expand(2, -1, -1), w.t().expand(2, -1, -1))[1],
        "log_softmax": lambda x: ours.log_softmax(x),
        "softmax": lambda x: ours.softmax(x),
        "mean": lambda x: ours.mean(x, -1, keepdim=True),
        "topk": lambda x: ours.topk((4 * x).round(), 20)[1],
        "rms_norm": lambda x: ours.rms_norm(x, scale),
        "fused_add_rms_norm": lambda x: ours.rms_norm(x, scale, residual=x.flip(-1))[0],
        "the sum of fused_add_rms_norm": lambda x: ours.rms_norm(x, scale, residual=x.flip(-1))[1],
    }


NAMES = [
    *("triton", "linear", "linear with bias", "bmm", "log_softmax", "softmax", "mean", "topk", "rms_norm"),
    *("fused_add_rms_norm", "the sum of fused_add_rms_norm"),
]


@pytest.mark.parametrize("name", NAMES)
def test_row_is_the_same_alone_and_at_each_place_of_every_batch(name, dtype, values):
    """The last row stands at every place once, as the last of each batch; each row stands at as many as it can."""
    operation, x = operations(values, dtype)[name], values(1024, K, dtype=dtype)
    verdicts = agreement(operation, operation(x), x, EVERY_SIZE)
    assert [size for size, agrees in zip(EVERY_SIZE, verdicts, strict=True) if not agrees] == []


def test_an_operation_that_looks_at_its_batch_fails_the_same_check(values):
    x = values(1024, K)
    verdicts = agreement(lambda x: x + (len(x) == 700) * 1e-3, x.clone(), x, EVERY_SIZE)
    assert [size for size, agrees in zip(EVERY_SIZE, verdicts, strict=True) if not agrees] == [700]


@pytest.mark.parametrize("name", ["log_softmax", "softmax", "mean", "topk", "rms_norm", "fused_add_rms_norm"])
@pytest.mark.parametrize("length", [100, 20000])
def test_rows_of_other_lengths_too(name, length, values):
    scale = values(length, dtype=torch.bfloat16, seed=3)
    operation = {
        "log_softmax": lambda x: ours.log_softmax(x),
        "softmax": lambda x: ours.softmax(x),
        "mean": lambda x: ours.mean(x, -1, keepdim=True),
        "topk": lambda x: ours.topk((4 * x).round(), 20)[1],
        "rms_norm": lambda x: ours.rms_norm(x, scale),
        "fused_add_rms_norm": lambda x: ours.rms_norm(x, scale, residual=x)[0],
    }[name]
    x = values(300, length, dtype=torch.bfloat16)
    assert all(agreement(operation, operation(x), x, [1, 2, 3, 16, 17, 255, 299, 300]))


@pytest.mark.parametrize("length", [1, 100, 1024, 20000])
def test_a_norm_compiled_before_serves_other_strides_and_addresses(length, dtype, values):
    """What the compiled form is found by, types and lengths, is all that Triton compiles it for."""
    wide, scale = values(40, 2 * length + 9, dtype=dtype), values(length + 1, dtype=dtype, seed=3)[1:]
    calls = [
        lambda rows, at=at, residual=residual, weight=weight: ours.rms_norm(
            wide[:rows, at : at + length], weight, residual=wide[:rows, 1 : 1 + length] if residual else None
        )
        for at in (0, 1, 8)
        for residual in (False, True)
        for weight in (None, scale, scale.float())
    ]

    def made_anew(call):
        rms_norm._launch.compiled.clear()
        return call(40)

    expected = [made_anew(call) for call in calls]
    for num_rows in (40, 1, 16, 3):
        for call, all_rows in zip(calls, expected, strict=True):
            found = call(num_rows)
            for y, of in zip(*((t if isinstance(t, tuple) else (t,)) for t in (found, all_rows)), strict=True):
                assert same_bits(y, of[:num_rows])


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_of_any_kind_change_nothing(name, dtype, values):
    operation, x = operations(values, dtype)[name], values(67, K, dtype=dtype)
    alone = operation(x[20:21].clone())
    tiny = torch.finfo(dtype).tiny
    for neighbour in (torch.nan, torch.inf, -torch.inf, torch.finfo(dtype).max, tiny / 4, -0.0):
        x[:20], x[21:] = neighbour, neighbour
        assert same_bits(operation(x)[20:21].contiguous(), alone), neighbour


@pytest.mark.parametrize("name", NAMES)
def test_a_row_of_subnormal_numbers_is_the_same_alone_and_in_a_batch(name, dtype, values):
    operation = operations(values, dtype)[name]
    x = values(67, K, dtype=dtype)
    x[20] = (x[20].float() * torch.finfo(dtype).tiny / 8).to(dtype)
    assert bool((x[20] != 0).any())
    assert same_bits(operation(x)[20:21].contiguous(), operation(x[20:21].clone()))


# Triton compiles a product anew for each kind of strides: one type is enough to show that none of them matters
VIEWED = [(name, dtype) for name in NAMES for dtype in DTYPES if dtype == torch.bfloat16 or name not in NAMES[:4]]


@pytest.mark.parametrize("name, dtype", VIEWED)
def test_a_view_has_the_bits_of_its_packed_copy(name, dtype, values):
    operation = operations(values, dtype)[name]
    flat, wide = values(33 * K + 1, dtype=dtype), values(66, 2 * K, dtype=dtype)
    views = {
        "misaligned": flat[1:].view(33, K),
        "rows apart": wide[::2, :K],
        "aligned to 16 bytes": wide.view(-1)[16 // dtype.itemsize :][: 33 * K].view(33, K),
        "every second": wide[:33, ::2],
        "transposed": values(K, 33, dtype=dtype).t(),
        "one row again and again": values(1, K, dtype=dtype).expand(33, K),
    }
    for kind, view in views.items():
        packed = operation(view.clone(memory_format=torch.contiguous_format))
        assert same_bits(operation(view).contiguous(), packed.contiguous()), kind


@pytest.mark.parametrize("name", NAMES)
def test_no_rows(name, dtype, values):
    assert operations(values, dtype)[name](values(0, K, dtype=dtype)).shape[0] == 0


def exactly(name, x, values, dtype):
    """The result in fp64, and what the errors of fp32 sums are proportional to."""
    w, bias = values(N, K, dtype=dtype, seed=1).double(), values(N, dtype=dtype, seed=2).double()
    scale = values(K, dtype=dtype, seed=3).double()
    total = x + x.flip(-1)
    if name in ("triton", "linear", "bmm"):
        return x @ w.t(), x.abs() @ w.t().abs()
    if name == "linear with bias":
        return x @ w.t() + bias, x.abs() @ w.t().abs() + bias.abs()
    if name == "the sum of fused_add_rms_norm":
        return total, total.abs()
    if "rms_norm" in name:
        x = total.to(dtype).double() if "fused" in name else x
        y = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + 1e-6) * scale
        return y, y.abs()
    if name == "topk":
        places = (4 * x).round().sort(dim=-1, descending=True, stable=True).indices[:, :20].double()
        return places, torch.zeros_like(places)
    if name == "mean":
        return x.mean(-1, keepdim=True), x.abs().mean(-1, keepdim=True)
    y = x.softmax(-1) if name == "softmax" else x.log_softmax(-1)
    return y, y.abs() * 16 if name == "softmax" else y.abs() + 1


@pytest.mark.parametrize("name", NAMES)
def test_values_are_within_the_bound_of_fp64(name, dtype, values):
    x = values(130, K, dtype=dtype)
    exact, size = exactly(name, x.double(), values, dtype)
    error = (operations(values, dtype)[name](x).double() - exact).abs()
    bound = 3 * torch.finfo(dtype).eps / 2 * exact.abs() + 64 * torch.finfo(torch.float32).eps * size
    assert bool((error <= bound + torch.finfo(dtype).tiny).all()), (error / bound).max()


def test_products_are_no_less_accurate_than_the_vendors(dtype, values):
    x, w = values(130, K, dtype=dtype), values(N, K, dtype=dtype, seed=1)
    exact = x.double() @ w.double().t()
    mine, theirs = ((y.double() - exact).square().mean().sqrt() for y in (matmul.gemm(x, w.t()), x @ w.t()))
    # in fp32 the vendor may sum several parts of K side by side, which rounds less than one ascending sum
    assert mine <= (2 if dtype == torch.float32 else 1.05) * theirs, (mine, theirs)


class TestPast2To31Elements:
    @pytest.fixture(autouse=True)
    def memory(self):
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < 20 * 2**30:
            pytest.skip("needs 20 GiB of free GPU memory")
        yield
        torch.cuda.empty_cache()

    @pytest.mark.parametrize(
        "operation",
        [ours.softmax, ours.log_softmax, ours.rms_norm, lambda x: ours.mean(x, -1, keepdim=True)],
        ids=["softmax", "log_softmax", "rms_norm", "mean"],
    )
    def test_row_operations(self, operation, values):
        x = torch.empty(2**31 // 4096 + 3, 4096, dtype=torch.bfloat16, device="cuda")
        x[:3], x[-3:] = values(3, 4096, dtype=x.dtype), values(3, 4096, dtype=x.dtype)
        x[3:-3] = 1
        y = operation(x)
        assert same_bits(y[-3:], operation(x[-3:].clone())) and same_bits(y[:3], y[-3:])

    def test_a_product_with_many_rows(self, values):
        a = torch.empty(2**31 // 1024 + 3, 1024, dtype=torch.bfloat16, device="cuda").fill_(1)
        b = values(1024, 16, dtype=a.dtype)
        a[-3:] = values(3, 1024, dtype=a.dtype)
        assert same_bits(matmul.gemm(a, b)[-3:], matmul.gemm(a[-3:].clone(), b))

    def test_a_product_with_a_large_result(self, values):
        a, b = values(2**16 + 3, 64, dtype=torch.bfloat16), values(64, 2**15, dtype=torch.bfloat16)
        y = matmul.gemm(a, b)
        assert y.numel() > 2**31
        assert same_bits(y[-3:], matmul.gemm(a[-3:].clone(), b))

    def test_a_view_with_strides_past_it(self, values):
        whole = torch.empty(2**31 // 64 + 64, 64, dtype=torch.bfloat16, device="cuda")
        far = whole[:: len(whole) - 1]
        far.copy_(values(2, 64, dtype=whole.dtype))
        b = values(64, 48, dtype=whole.dtype)
        assert same_bits(matmul.gemm(far, b), matmul.gemm(far.clone(), b))
        assert same_bits(ours.softmax(far), ours.softmax(far.clone()))

    def test_rows_past_a_proofs_largest_are_split(self, values):
        x, w = values(20000, K, dtype=torch.bfloat16), values(N, K, dtype=torch.bfloat16, seed=1)
        for _ in range(3):
            y = ours.linear(x, w)
        assert same_bits(y[-3:], ours.linear(x[-3:].clone(), w)) and same_bits(y, matmul.gemm(x, w.t()))
